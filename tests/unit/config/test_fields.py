"""Every field refuses wrong values by name, and every config survives its file."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.config import (
    NOT_YET,
    REQUIRED_KEYS,
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    PeftConfig,
    PeftType,
    TaskType,
    check_adapter_name,
    check_supported,
)
from lorakit.config.strict_json import dumps, loads
from lorakit.errors import AdapterNameError, ConfigError, UnsupportedError

NAN, INF = float("nan"), float("inf")

BAD = [
    ("r", "8", "'8' (str)", "a positive int"),
    ("r", True, "True (bool)", "a positive int"),
    ("r", 8.0, "8.0 (float)", "a positive int"),
    ("r", 0, "0 (int)", "a positive int"),
    ("r", -1, "-1 (int)", "a positive int"),
    ("r", None, "None (NoneType)", "a positive int"),
    ("r", 10**5000, "(int)", "a positive int"),
    ("lora_alpha", NAN, "nan (float)", "a finite number other than 0"),
    ("lora_alpha", INF, "inf (float)", "a finite number other than 0"),
    ("lora_alpha", 1e300, "1e+300 (float)", "a finite number other than 0"),
    ("lora_alpha", 10**400, "(int)", "a finite number other than 0"),
    ("lora_alpha", 0, "0 (int)", "a finite number other than 0"),
    ("lora_alpha", "16", "'16' (str)", "a finite number other than 0"),
    ("lora_alpha", True, "True (bool)", "a finite number other than 0"),
    ("lora_dropout", 1.0, "1.0 (float)", "a number of at least 0 and below 1"),
    ("lora_dropout", -0.1, "-0.1 (float)", "a number of at least 0 and below 1"),
    ("lora_dropout", NAN, "nan (float)", "a number of at least 0 and below 1"),
    ("lora_dropout", "0.1", "'0.1' (str)", "a number of at least 0 and below 1"),
    ("use_rslora", "no", "'no' (str)", "True or False"),
    ("use_dora", "false", "'false' (str)", "True or False"),
    ("fan_in_fan_out", 1, "1 (int)", "True or False"),
    ("inference_mode", None, "None (NoneType)", "True or False"),
    ("bias", "lora", "'lora' (str)", "one of 'none', 'all', 'lora_only'"),
    ("bias", ["none"], "['none'] (list)", "one of 'none', 'all', 'lora_only'"),
    ("modules_to_save", "lm_head", "'lm_head' (str)", "a list of names, such as ['lm_head']"),
    ("modules_to_save", ["("], "'(' (str)", "a valid regular expression"),
    ("target_modules", 3, "3 (int)", "a list of non-empty strings"),
    ("target_modules", {"q": 1}, "{'q': 1} (dict)", "a list of non-empty strings"),
    ("target_modules", ["q", 3], "3 (int)", "a non-empty string"),
    ("target_modules", ["q", ""], "'' (str)", "a non-empty string"),
    ("target_modules", "", "'' (str)", "a regular expression"),
    ("target_modules", "(q", "'(q' (str)", "a valid regular expression"),
    ("target_modules", "q" * 1001, "(str)", "at most 1000 characters"),
    ("target_modules", "q{99999999999}", "'q{99999999999}' (str)", "repeat counts"),
    ("target_modules", "(?:(?:(?:a{1000}){1000}){1000})", "(str)", "repeat counts multiply to at most 10000"),
    ("target_modules", "q{e<=1}", "'q{e<=1}' (str)", "braces are repeat counts"),
    ("target_modules", "[[:alpha:]]+", "'[[:alpha:]]+' (str)", "do not start with '['"),
    ("target_modules", r"[a-\U0010ffff]", "(str)", "ASCII"),
    ("target_modules", r"\p{L}", "(str)", "repeat counts"),
    ("target_modules", "(" * 490 + "a" + ")" * 490, "(str)", "a valid regular expression"),
    ("exclude_modules", "*", "'*' (str)", "a valid regular expression"),
    ("rank_pattern", {"q": "3"}, "'3' (str)", "a positive int"),
    ("rank_pattern", {"q": 0}, "0 (int)", "a positive int"),
    ("rank_pattern", {"(": 3}, "'(' (str)", "a valid regular expression"),
    ("rank_pattern", {"(?i)q": 3}, "'(?i)q' (str)", "a valid regular expression"),
    ("rank_pattern", {3: 3}, "3 (int)", "a regular expression"),
    ("rank_pattern", ["q"], "['q'] (list)", "a dict"),
    ("rank_pattern", {f"a{i}+": 1 for i in range(501)}, "501", "at most 500"),
    ("alpha_pattern", {"q": NAN}, "nan (float)", "a finite number"),
    ("alpha_pattern", {"q": True}, "True (bool)", "a finite number"),
    ("layers_to_transform", -1, "-1 (int)", "an int of 0 or more"),
    ("layers_to_transform", "3", "'3' (str)", "an int or a list of ints"),
    ("layers_to_transform", [1, "2"], "'2' (str)", "an int of 0 or more"),
    ("layers_to_transform", [True], "True (bool)", "an int of 0 or more"),
    ("layers_pattern", ["h("], "'h(' (str)", "a valid regular expression"),
    ("layers_pattern", "layers", "'layers' (str)", "layers_to_transform to be set with it"),
    ("init_lora_weights", "bogus", "'bogus' (str)", "'gaussian'"),
    ("init_lora_weights", "pissa_niter_", "'pissa_niter_' (str)", "pissa_niter_<steps>"),
    ("init_lora_weights", 1, "1 (int)", "True, False"),
    ("init_lora_weights", None, "None (NoneType)", "True, False"),
    ("task_type", "CLASSIFY", "'CLASSIFY' (str)", "'CAUSAL_LM'"),
    ("peft_type", "IA3", "'IA3' (str)", "'LORA'"),
    ("auto_mapping", {"a": object}, "(dict)", "a dict that JSON can hold"),
    ("base_model_name_or_path", 7, "7 (int)", "a string"),
    ("trainable_token_indices", ["a"], "'a' (str)", "an int of 0 or more"),
    ("trainable_token_indices", {"embed": 3}, "3 (int)", "a list of ints"),
    ("loftq_config", {"loftq_bits": 3}, "3 (int)", "2, 4 or 8"),
    ("eva_config", {"rho": 0.5}, "0.5 (float)", "a number of at least 1"),
    ("eva_config", EvaConfig(tau=2), "2 (int)", "a number from 0 to 1"),
    ("eva_config", {"rhoo": 2.0}, "'rhoo'", "some of rho, tau"),
    ("velora_config", {"num_groups": 0}, "0 (int)", "a positive int"),
    ("velora_config", {"scale": 0.0}, "0.0 (float)", "a positive number"),
    (
        "velora_config",
        {"init_type": "mean"},
        "'mean' (str)",
        "one of 'batch_average', 'batch_average_once', 'random'",
    ),
    ("arrow_config", {"top_k": 0}, "0 (int)", "a positive int"),
    ("arrow_config", {"router_temperature": -1}, "-1 (int)", "a positive number"),
    ("arrow_config", {"gks_adapter_names": "a"}, "'a' (str)", "a list of non-empty strings"),
    ("arrow_config", {"top": 1}, "'top'", "some of top_k, router_temperature"),
    ("corda_config", CordaConfig(corda_method="x"), "'x' (str)", "'ipm', 'kpm'"),
    ("lora_ga_config", LoraGAConfig(stable_gamma=0), "0 (int)", "a positive number"),
    ("lora_ga_config", 3, "3 (int)", "a LoraGAConfig"),
    ("kasa_config", {"beta": -1e-4}, "-0.0001 (float)", "a finite number of at least 0"),
    ("kasa_config", {"gamma": NAN}, "nan (float)", "a finite number of at least 0"),
    ("kasa_config", {"delta": 1}, "'delta'", "some of beta, gamma"),
    ("use_bdlora", True, "True (bool)", "a BdLoraConfig or a dict"),
    ("use_bdlora", {"nblocks": 0}, "0 (int)", "a positive int"),
    ("use_bdlora", {"target_modules_bd_a": "q"}, "'q' (str)", "a list of non-empty strings"),
    ("use_bdlora", {"target_modules_bd_b": ["q", ""]}, "['q', ''] (list)", "a list of non-empty strings"),
    (
        "use_bdlora",
        {"target_modules_bd_a": ["q", "o"], "target_modules_bd_b": ["q"]},
        "['q'] in target_modules_bd_a and in target_modules_bd_b",
        "one of the two",
    ),
    ("monteclora_config", {"num_samples": 2**16 + 1}, "65537 (int)", "an int from 1 to 65536"),
    ("monteclora_config", {"dirichlet_prior": 0}, "0 (int)", "a positive number"),
    ("monteclora_config", {"sample_scaler": INF}, "inf (float)", "a finite number"),
    ("monteclora_config", {"buffer_size": 0}, "0 (int)", "a positive int"),
    ("qalora_group_size", 0, "0 (int)", "a positive int"),
    ("runtime_config", {"ephemeral_gpu_offload": 1}, "1 (int)", "True or False"),
    ("layer_replication", [[1, 2, 3]], "(1, 2, 3) (tuple)", "a pair of layer indices"),
    ("alora_invocation_tokens", [-5], "-5 (int)", "an int of 0 or more"),
    ("target_parameters", "w", "'w' (str)", "a list of non-empty strings"),
    ("extra", {"r": 3}, "'r'", "the field r"),
]


@pytest.mark.parametrize(
    ("field", "value", "got", "wanted"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)]
)
def test_refuses(field, value, got, wanted):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**{field: value})
    line = next(line for line in str(caught.value).splitlines() if line.startswith(f"  - {field}"))
    assert got in line
    assert wanted in line
    assert len(line) < 600


@pytest.mark.parametrize(
    ("fields", "blamed"),
    [
        ({"target_modules": "q.*", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": "q.*", "layers_pattern": ["h"]}, "layers_pattern"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "init_lora_weights"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias"),
        ({"use_dora": True, "megatron_config": {"a": 1}}, "megatron_config"),
    ],
)
def test_refuses_fields_that_exclude_each_other(fields, blamed):
    with pytest.raises(ConfigError, match=f"- {blamed}: got"):
        LoraConfig(**fields)


def test_names_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        LoraConfig(r=0, lora_alpha=0, bias="x")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:]] == [
        "  - r",
        "  - lora_alpha",
        "  - bias",
    ]


def test_validate_again_after_a_change():
    config = LoraConfig(target_modules=["q"])
    config.target_modules = ["v", "q"]
    config.validate()
    assert config.target_modules == {"q", "v"}
    config.r = "8"
    with pytest.raises(ConfigError, match="r: got '8'"):
        config.validate()
    with pytest.raises(ConfigError, match="r: got '8'"):
        config.save_pretrained("never-written")


GOOD = [
    {},
    {"target_modules": ("v", "q"), "exclude_modules": ["x"], "modules_to_save": ("lm_head",)},
    {"target_modules": r".*\.(q|v)_proj", "task_type": "CAUSAL_LM"},
    {"layers_to_transform": 3, "layers_pattern": "h", "target_modules": ["q"]},
    {"layers_to_transform": range(3), "layers_pattern": ["h", "layers"], "target_modules": ["q"]},
    {"rank_pattern": {"^a.b": 4, r"x\.\d+": 2}, "alpha_pattern": {"q": 0.5, "k": -1}, "lora_alpha": -16.5},
    {"rank_pattern": None, "alpha_pattern": None, "loftq_config": None},
    {"init_lora_weights": "pissa_niter_16"},
    {"init_lora_weights": "Gaussian"},
    {"init_lora_weights": False, "lora_bias": True},
    {"loftq_config": LoftQConfig(loftq_bits=8), "init_lora_weights": "loftq"},
    {
        "eva_config": EvaConfig(rho=1),
        "corda_config": CordaConfig(cache_file="c"),
        "lora_ga_config": LoraGAConfig(),
    },
    {"layer_replication": [(0, 4), [2, 5]], "trainable_token_indices": {"embed": [1, 2]}},
    {"kasa_config": {"beta": 1}, "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 1}},
    {"monteclora_config": {"num_samples": 3}, "use_qalora": True, "qalora_group_size": 4},
    {"extra": {"unsloth_fixed": True, "extra": [1, {"a": None}]}},
    {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)},
]


@pytest.mark.parametrize("fields", GOOD)
def test_survives_its_file(fields, tmp_path):
    config = LoraConfig(r=4, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the unknown keys
        assert LoraConfig.from_dict(config.to_dict()) == config
        config.target_modules = config.target_modules or ["q"]
        config.save_pretrained(tmp_path)
        read = PeftConfig.from_pretrained(tmp_path)
    assert type(read) is LoraConfig
    assert read == config
    assert "runtime_config" not in read.to_dict()
    assert dumps(dataclasses.replace(read).to_dict()) == (tmp_path / "adapter_config.json").read_bytes()


def test_values_take_their_usual_types():
    config = LoraConfig(
        peft_type=None, task_type="SEQ_CLS", target_modules=["q"], init_lora_weights="OLoRA", layers_to_transform=(1,),
        loftq_config=LoftQConfig(), eva_config={"rho": 3.0}, layer_replication=[[0, 1]],
    )  # fmt: skip
    assert config.peft_type is PeftType.LORA
    assert config.task_type is TaskType.SEQ_CLS
    assert f"{config.task_type} {config.peft_type}" == "SEQ_CLS LORA"
    assert config.target_modules == {"q"}
    assert config.init_lora_weights == "olora"
    assert config.layers_to_transform == [1]
    assert config.loftq_config == {"loftq_bits": 4, "loftq_iter": 1}
    assert config.eva_config == EvaConfig(rho=3.0)
    assert config.layer_replication == [(0, 1)]
    assert not config.is_prompt_learning
    assert not config.is_adaption_prompt


def test_positional_order():
    config = LoraConfig("CAUSAL_LM", "LORA", None, "0.1", "base", "main", True, 4, ["q"], ["x"], 32, 0.1)
    assert (config.base_model_name_or_path, config.revision, config.inference_mode) == ("base", "main", True)
    assert (config.r, config.target_modules, config.exclude_modules) == (4, {"q"}, {"x"})
    assert (config.lora_alpha, config.lora_dropout) == (32, 0.1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [f.name for f in dataclasses.fields(LoraConfig)]
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
PLAIN_NAMES = st.text("abcxyz_019.", min_size=1, max_size=8)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(FIELDS), JSON)
def test_any_json_in_any_field_is_a_config_or_a_clear_error(field, value):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            config = LoraConfig.from_dict({field: value})
        except ConfigError as error:
            config, said = None, str(error)
        if config is None:
            assert field in said
            return
        assert LoraConfig.from_dict(loads(dumps(config.to_dict()), where="x")) == config
        try:
            check_supported(config)
        except UnsupportedError as error:
            said = str(error)
        else:
            said = field
        assert field in said


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "r": st.integers(1, 999),
            "lora_alpha": st.integers(1, 99) | st.floats(0.01, 99),
            "lora_dropout": st.floats(0, 0.99),
            "target_modules": st.lists(TEXTS, max_size=4),
            "exclude_modules": st.lists(TEXTS, max_size=4) | st.none(),
            "modules_to_save": st.lists(PLAIN_NAMES, max_size=3),
            "rank_pattern": st.dictionaries(PLAIN_NAMES, st.integers(1, 99), max_size=3),
            "alpha_pattern": st.dictionaries(PLAIN_NAMES, st.floats(0.1, 99), max_size=3),
            "bias": st.sampled_from(["none", "all", "lora_only"]),
            "task_type": st.sampled_from(TaskType) | st.none(),
            "use_rslora": st.booleans(),
            "layers_to_transform": st.integers(0, 99) | st.lists(st.integers(0, 99), max_size=3),
            "base_model_name_or_path": TEXTS,
        },
    )
)
def test_parse_after_dump_is_the_identity(fields):
    config = LoraConfig(**fields)
    data = dumps(config.to_dict())
    again = LoraConfig.from_dict(loads(data, where="x"))
    assert again == config
    assert dumps(again.to_dict()) == data


def test_the_not_yet_table_names_fields_only():
    assert {name.partition("=")[0] for name in NOT_YET} <= set(FIELDS)


UNSUPPORTED = [
    ("megatron_config", {"a": 1}), ("runtime_config", LoraRuntimeConfig(ephemeral_gpu_offload=True)),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED)
@pytest.mark.parametrize("loading", [False, True])
def test_unsupported_fields_are_refused_by_name(field, value, loading):
    config = LoraConfig(**{field: value})
    with pytest.raises(UnsupportedError, match=f"- {field}=.*: "):
        check_supported(config, loading=loading)


@pytest.mark.parametrize("scheme", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_a_file_that_needs_a_changed_base_is_refused(scheme):
    """A new adapter of the scheme is fine; an unconverted file of it is for a base that is not there."""
    config = LoraConfig(init_lora_weights=scheme)
    check_supported(config)
    with pytest.raises(
        UnsupportedError, match=f"- init_lora_weights='{scheme}': the adapter was saved without"
    ):
        check_supported(config, loading=True)


OPTIONS = [
    ("loftq_config", {"loftq_bits": 4}, "loftq"), ("eva_config", EvaConfig(), "eva"),
    ("corda_config", CordaConfig(), "corda"), ("lora_ga_config", LoraGAConfig(), "lora_ga"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "scheme"), OPTIONS)
def test_options_of_another_initialiser_are_refused(field, value, scheme):
    check_supported(LoraConfig(**{field: value}, init_lora_weights=scheme))
    config = LoraConfig(**{field: value})
    with pytest.raises(UnsupportedError, match=f"- {field}=.*: only init_lora_weights='{scheme}' reads it"):
        check_supported(config)
    check_supported(config, loading=True)  # of a file nothing is begun


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica", "loftq", "eva"])
def test_plain_configs_are_supported(init):
    config = LoraConfig(init_lora_weights=init, target_modules=["q"], rank_pattern={"q": 2})
    check_supported(config)
    check_supported(config, loading=True)


@pytest.mark.parametrize("name", ["default", "a", "A-1_b", "x" * 64, "0", "layers", "q_proj"])
def test_adapter_names(name):
    check_adapter_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "x" * 65, "a.b", "a/b", "../x", "/tmp/x", "a\n", "é", "__base__", "keys", "training", "forward", "pop", "get",
     "_modules", None, 3, b"a"],
)  # fmt: skip
def test_refused_adapter_names(name):
    with pytest.raises(AdapterNameError, match="adapter name: "):
        check_adapter_name(name)


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_a_file_must_have_the_required_keys(key, tmp_path):
    values = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q"]}
    del values[key]
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"adapter_config\.json.*\n?.*{key}"):
        PeftConfig.from_pretrained(tmp_path)
