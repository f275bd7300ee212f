"""Which modules a config means: names, patterns, layers, first keys, near names and the time budget."""

from __future__ import annotations

import random
import re
import warnings
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.config import SEQ_CLS_HEADS, TARGET_MODULES, LoraConfig, Matcher
from lorakit.config.patterns import simple
from lorakit.errors import ConfigError

LAYERS = [
    f"model.layers.{i}.{part}"
    for i in range(12)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.experts.3.up_proj")
]
PATHS = [*LAYERS, "lm_head", "model.embed_tokens", "score", "visual.q_proj", "layers.1.q_proj", "q_proj"]


def chosen(**fields):
    matcher = Matcher(LoraConfig(**fields))
    return {path for path in PATHS if matcher.target(path)}


def test_names_are_whole_paths_or_their_ends():
    assert chosen(target_modules=["q_proj"]) == {p for p in PATHS if p.split(".")[-1] == "q_proj"}
    assert chosen(target_modules=["self_attn.v_proj"]) == {p for p in PATHS if p.endswith("self_attn.v_proj")}
    assert chosen(target_modules=["proj", "attn.q_proj", "Q_PROJ", "q.proj"]) == set()
    assert chosen(target_modules=["model.layers.3.mlp.gate_proj"]) == {"model.layers.3.mlp.gate_proj"}
    assert chosen(target_modules=None, target_parameters=["w"]) == set()


def test_exclusion_wins():
    kept = chosen(
        target_modules=["q_proj", "lm_head"], exclude_modules=r"model\..*", modules_to_save=["lm_head"]
    )
    assert kept == {"visual.q_proj", "layers.1.q_proj", "q_proj"}
    assert chosen(target_modules=["q_proj"], exclude_modules=["q_proj"]) == set()


def test_modules_inside_a_saved_module_are_left_out():
    assert chosen(target_modules=["up_proj", "gate_proj"], modules_to_save=["experts"]) == {
        p for p in PATHS if p.endswith("gate_proj")
    }
    assert chosen(target_modules=["q_proj"], modules_to_save=["layers.1", "vis.*"]) == {
        p for p in PATHS if p.endswith("q_proj") and not re.search(r"layers\.1\.|visual", p)
    }


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"layers_to_transform": 2}, {2}),
        ({"layers_to_transform": [1, 11]}, {1, 11}),
        ({"layers_to_transform": [1, 2], "layers_pattern": "layers"}, {1, 2}),
        ({"layers_to_transform": [1, 2], "layers_pattern": ["h", "lay[a-z]*"]}, {1, 2}),
        ({"layers_to_transform": [1, 2], "layers_pattern": ["h"]}, set()),
        ({"layers_to_transform": [3], "layers_pattern": ["experts"]}, set(range(12))),
    ],
)
def test_layers(fields, layers):
    got = chosen(target_modules=["up_proj"], **fields)
    assert got == {f"model.layers.{i}.mlp.experts.3.up_proj" for i in layers}


def test_a_whole_path_needs_no_layer():
    assert chosen(target_modules=["score", "q_proj"], layers_to_transform=[99]) == {"score", "q_proj"}


def test_the_first_key_decides():
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={
            "self_attn.q_proj": 1,
            "^model.layers.0.*": 2,
            "^lm_head$": 3,
            "_proj": 4,
            r".*\.1\..*": 5,
            "q_proj": 6,
        },
        alpha_pattern={"v_proj": 0.5},
    )
    matcher = Matcher(config)
    ranks = {path: matcher.rank(path) for path in PATHS}
    assert ranks["model.layers.0.self_attn.q_proj"] == 1
    assert ranks["model.layers.0.self_attn.v_proj"] == 2
    assert ranks["lm_head"] == 3
    assert ranks["model.layers.1.self_attn.v_proj"] == 5
    assert ranks["visual.q_proj"] == 6
    assert ranks["model.embed_tokens"] == 8
    assert matcher.rank("model.lm_head") == 8
    assert matcher.rank("x.self_attn_q_proj") == 1  # "." is any character, as in PEFT
    assert {matcher.alpha("a.v_proj"), matcher.alpha("a.q_proj")} == {0.5, 16}


KEYS = st.lists(
    st.from_regex(r"\^?[ab_](?:[ab_.]|\\\.){0,4}\$?", fullmatch=True)
    | st.sampled_from(["a+", r".*b", "a|b", "[ab]._"]),
    min_size=1,
    max_size=6,
    unique=True,
)


@settings(max_examples=300, deadline=None)
@given(KEYS, st.lists(st.text("ab_.", min_size=1, max_size=7), max_size=8))
def test_first_key_is_what_re_finds(keys, paths):
    config = LoraConfig(rank_pattern={key: order + 100 for order, key in enumerate(keys)})
    matcher = Matcher(config)
    for path in paths:
        hits = [order + 100 for order, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", path)]
        assert matcher.rank(path) == (hits[0] if hits else 8), (path, keys)


PIECES = ["q_proj", "(q|v)_proj", ".*", r"\.", r"\d+", "model", "layers", "[a-z_]+", "(?:mlp|self_attn)", r"[^.]*", "x?",
          r"\w+", "(?!lm)", "(?<=s)", r"[0-9]{1,2}", "(?P<n>a|b)?", "^", "$", r"\b", "self_attn", ".", "experts", "gate.*"]  # fmt: skip
REAL = [r".*\.(q|k|v|o)_proj", r"model\.layers\.\d+\..*proj", r"^(?!.*visual).*q_proj$", r".*layers\.([0-4])\..*",
        r"(?i).*Q_PROJ", r".*\.layers\.(?:[5-9]|1[01])\.(?:self_attn|mlp)\.[a-z]+_proj", r".*attn.*", r"lm_head|.*gate_proj"]  # fmt: skip


def generated_patterns() -> list[str]:
    """300 patterns put together at random, and some real ones."""
    source = random.Random(0)
    built = ["".join(source.choices(PIECES, k=source.randint(1, 7))) for _ in range(600)]
    good = []
    for text in dict.fromkeys(built):
        try:
            re.compile(text)
        except re.error:
            continue
        good.append(text)
    return [*REAL, *good[:300]]


def test_patterns_match_as_re_does():
    patterns = generated_patterns()
    assert len(patterns) >= 200
    matched = 0
    for pattern in patterns:
        wanted = {path for path in PATHS if re.fullmatch(pattern, path)}
        assert chosen(target_modules=pattern) == wanted, pattern
        matched += bool(wanted)
    assert matched >= 30


SLOW = r"(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)\1\2\3\4x[^a]"


class TestBudget:
    """A pattern that would run for hours ends in an error that names it."""

    FIELDS: ClassVar = [
        {"target_modules": SLOW},
        {"target_modules": ["q_proj"], "exclude_modules": SLOW},
        {"target_modules": ["q_proj"], "rank_pattern": {SLOW.replace(r"\1\2\3\4", r"\3\4\5\6"): 2}},
        {"target_modules": ["q_proj"], "alpha_pattern": {SLOW.replace(r"\1\2\3\4", r"\3\4\5\6"): 2}},
        {"target_modules": ["q_proj"], "modules_to_save": [SLOW.replace(r"\1\2\3\4", r"\2\3\4\5")]},
        {"target_modules": ["q_proj"], "layers_pattern": [SLOW], "layers_to_transform": [0]},
    ]

    @pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: list(fields)[-1])
    def test_slow_patterns(self, fields):
        matcher = Matcher(LoraConfig(**fields))
        path = "model.layers.12.mlp.experts.100.gate_and_up_proj.base.q_proj"
        with pytest.raises(ConfigError, match=r"_(modules|pattern|to_save): .* is too slow"):
            for _ in range(3):
                matcher.target(path)
                matcher.rank(path)
                matcher.alpha(path)

    @pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
                                       "modules_to_save", "layers_pattern"])  # fmt: skip
    def test_nested_repeats_end(self, field):
        text = "([a-z0-9_.]+)+!"
        value = {text: 2} if field in ("rank_pattern", "alpha_pattern") else text
        fields = {"target_modules": ["q_proj"], field: [text] if field == "modules_to_save" else value}
        if field == "layers_pattern":
            fields["layers_to_transform"] = [0]
        matcher = Matcher(LoraConfig(**fields))
        path = "model.layers.12." + "a" * 60 + ".q_proj"
        hit = (matcher.target(path), matcher.rank(path), matcher.alpha(path))
        assert hit == (field not in ("target_modules", "layers_pattern"), 8, 8)


def test_unused_entries_are_named_with_near_names():
    config = LoraConfig(
        target_modules=["q_porj", "v_proj", "mlp.gate_prj"],
        exclude_modules=["lm_haed", "zzz"],
        rank_pattern={"^model.layers.3.self_attn.v_porj": 2, "v_proj": 3, r".*\.up_.*": 4},
        alpha_pattern={"v_proj": 3},
        layers_to_transform=[2, 99],
    )
    matcher = Matcher(config)
    for path in [*LAYERS, "lm_head"]:
        if matcher.target(path):
            matcher.rank(path)
            matcher.alpha(path)
    lines = matcher.unused()
    starts = [
        "target_modules: 'mlp.gate_prj' matches no module; did you mean 'mlp.gate_proj'",
        "target_modules: 'q_porj' matches no module; did you mean 'q_proj'",
        "exclude_modules: 'lm_haed' matches no module; did you mean 'lm_head'?",
        "exclude_modules: 'zzz' matches no module",
        "layers_to_transform: 99 is the index of no layer with a targeted module",
        "rank_pattern: '^model.layers.3.self_attn.v_porj' decides for no targeted module; did you mean 'model.layers.3.",
        r"rank_pattern: '.*\\.up_.*' decides for no targeted module",
    ]
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines


def test_nothing_is_unused_when_all_is_hit():
    matcher = Matcher(LoraConfig(target_modules=r".*q_proj", exclude_modules=["lm_head"]))
    assert matcher.unused() == [
        "target_modules: the pattern '.*q_proj' matches no module",
        "exclude_modules: 'lm_head' matches no module",
    ]
    for path in PATHS:
        matcher.target(path)
    assert matcher.unused() == []


def test_many_names_cost_few_look_ups():
    """Ten thousand modules, hundreds of names and thousands of keys: no pattern is run, so the budget is not touched."""
    names = [f"model.layers.{i}.experts.{j}.up_proj" for i in range(100) for j in range(100)]
    config = LoraConfig(
        target_modules=names[:300], rank_pattern={f"^{name}": 3 for name in names[:5000]},
        alpha_pattern=dict.fromkeys(names[:5000], 3.0),
    )  # fmt: skip
    assert all(simple(key) for key in config.rank_pattern)
    matcher = Matcher(config)
    assert sum(matcher.target(name) for name in names) == 300
    assert sum(matcher.rank(name) == 3 for name in names) == 5000
    assert sum(matcher.alpha(name) == 3 for name in names) == 5000


@pytest.mark.parametrize("model_type", sorted(TARGET_MODULES))
def test_known_targets_are_good_configs(model_type):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Matcher(LoraConfig(target_modules=TARGET_MODULES[model_type], exclude_modules=SEQ_CLS_HEADS))
