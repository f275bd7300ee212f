"""EVA on a model: right components and ranks, an adapter that lives on, and a model left as it was."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lorakit import (
    EvaConfig,
    LoraConfig,
    PeftModel,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
    inject_adapter_in_model,
)
from lorakit.calibration import eva
from lorakit.errors import AdapterNameError, AdapterStateError, ConfigError, KeyMismatchError, NonFiniteError
from lorakit.surgery import find_registry
from models import WORDS, Snapshot, another, logits, randomise, tiny, tiny_llama

PREFIX = "base_model.model."
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def batches(count=24, seed=0):
    """Token ids with padding, and labels that leave the first two out."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(3, WORDS, (4, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 9:] = 0
        labels = ids.clone()
        labels[:, :2] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def config(**fields):
    options = {
        key: fields.pop(key)
        for key in ("rho", "tau", "use_label_mask", "whiten", "adjust_scaling_factors")
        if key in fields
    }
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"], **fields},
        init_lora_weights="eva",
        eva_config=EvaConfig(**options),
    )  # fmt: skip


def adapted(model=None, **fields):
    return get_peft_model(tiny_llama() if model is None else model, config(**fields), low_cpu_mem_usage=True)


def quiet(model, data=None, **arguments):
    return get_eva_state_dict(
        model, batches() if data is None else data, show_progress_bar=False, **arguments
    )


def inputs_of(model, path, data, keep):
    """Every row that a layer is given, where `keep(batch)` says."""
    seen = []
    layer = model.get_submodule(path)
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    hook.remove()
    return torch.cat([x[keep(batch)] for x, batch in zip(seen, data, strict=True)]).double()


def counted(batch):
    return (batch["attention_mask"] == 1) & (batch["labels"] != -100)


def unmasked(batch):
    return batch["attention_mask"] == 1


@pytest.mark.parametrize(("use_label_mask", "keep"), [(True, counted), (False, unmasked)])
def test_the_rows_that_count_give_the_components(use_label_mask, keep):
    """With a tau that nothing reaches all the data count."""
    base, data = tiny_llama(), batches()
    X = inputs_of(base, "model.layers.1.mlp.down_proj", data, keep)
    wanted = torch.linalg.svd(X - X.mean(dim=0), full_matrices=False)
    found = quiet(adapted(base, rho=1, tau=1.0, use_label_mask=use_label_mask), data)
    A = found[PREFIX + "model.layers.1.mlp.down_proj"].double()
    assert A.shape == (4, 24)
    assert float((A * wanted.Vh[:4]).sum(dim=1).abs().min()) > 1 - 1e-6


def test_whitened():
    base, data = tiny_llama(), batches()
    path = "model.layers.0.self_attn.k_proj"
    X = inputs_of(base, path, data, counted)
    S = torch.linalg.svdvals(X - X.mean(dim=0))[:4]
    for name in (path, path.replace("k_proj", "v_proj")):  # the same input, which is not divided twice
        A = quiet(adapted(tiny_llama(), rho=1, tau=1.0, whiten=True), data)[PREFIX + name].double()
        torch.testing.assert_close(A.norm(dim=1), S.rsqrt(), rtol=1e-4, atol=0)


def test_ranks_are_spread_within_rho_and_keep_their_sum():
    found = quiet(adapted(rho=1.25))
    ranks = [len(A) for A in found.values()]
    assert sum(ranks) == 4 * len(found)
    assert max(ranks) == 5
    assert min(ranks) < 4
    assert {len(A) for A in quiet(adapted(rho=1)).values()} == {4}


def test_rank_pattern_says_what_each_layer_brings():
    found = quiet(adapted(rho=1, rank_pattern={"down_proj": 7}))
    assert {len(A) for name, A in found.items() if "down_proj" in name} == {7}
    assert {len(A) for name, A in found.items() if "down_proj" not in name} == {4}


class Counted(list):
    """Batches that count how many were asked for."""

    asked = 0

    def __iter__(self):
        for batch in super().__iter__():
            self.asked += 1
            yield batch


@pytest.mark.parametrize(("tau", "asked"), [(0.0, range(2, 12)), (1.0, [24])])
def test_settled_components_end_the_run(tau, asked):
    data = Counted(batches())
    quiet(adapted(rho=1, tau=tau), data)
    assert data.asked in asked


def test_layers_that_have_settled_take_no_more_data(monkeypatch):
    """Those with few components settle first; the others go on with theirs."""
    taken = []
    real = eva._Search._take
    monkeypatch.setattr(
        eva._Search, "_take", lambda self, names, rows: (taken.append(names), real(self, names, rows))
    )
    quiet(adapted(rho=1.5, tau=0.95))
    counts = {names: taken.count(names) for names in taken}
    assert len(counts) == 8  # q, k, v share, and gate, up
    assert len(set(counts.values())) > 1


def test_a_model_without_adapters():
    bare = quiet(tiny_llama(), peft_config=config())
    wrapped = quiet(adapted())
    assert [PREFIX + name for name in bare] == list(wrapped)
    for name, A in bare.items():
        torch.testing.assert_close(A, wrapped[PREFIX + name])


def test_adapters_and_modes_play_no_part():
    plain = quiet(adapted())
    noisy = adapted()
    randomise(noisy)
    another(noisy, "other", target_modules=["q_proj"])
    noisy.set_adapter("other")
    noisy.train()
    for name, A in quiet(noisy).items():
        torch.testing.assert_close(A, plain[name])


def test_a_bfloat16_base_under_autocast():
    def forward(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**batch)

    found = quiet(adapted(tiny_llama().bfloat16()), forward_fn=forward)
    assert {A.dtype for A in found.values()} == {torch.float32}
    gram = found[PREFIX + "model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(gram @ gram.T, torch.eye(len(gram)), rtol=0, atol=1e-5)


# ---- functions of the caller's -----------------------------------------------------------------------


def test_any_model_with_functions_of_its_own():
    """Conv1D, ids as the only input, and rows chosen layer by layer."""
    model = get_peft_model(tiny(), config(target_modules=["q_proj", "c_fc"], rho=1), low_cpu_mem_usage=True)
    seen = []

    def first_token(inputs, about, name):
        seen.append((name, about))
        return inputs[0][:, 0]

    ids = [torch.randint(WORDS, (6, 5), generator=torch.Generator().manual_seed(seed)) for seed in range(9)]
    arguments = {
        "forward_fn": lambda model, batch: model(batch),
        "prepare_model_inputs_fn": lambda batch, config: config.r,
    }
    all_rows = quiet(model, ids, prepare_layer_inputs_fn=None, **arguments)
    mixed = quiet(model, ids, prepare_layer_inputs_fn={PREFIX + "layers.0.c_fc": first_token}, **arguments)
    short = quiet(model, ids, prepare_layer_inputs_fn={"layers.0.c_fc": first_token}, **arguments)
    assert set(seen) == {(PREFIX + "layers.0.c_fc", 4)}
    for name, A in mixed.items():
        same = A.shape == all_rows[name].shape and torch.allclose(A, all_rows[name], atol=1e-4)
        assert same == ("layers.0.c_fc" not in name)
        assert torch.equal(A, short[name])


def test_layers_with_their_own_rows_do_not_share(monkeypatch):
    shared = set()
    real = eva._Search._take
    monkeypatch.setattr(
        eva._Search, "_take", lambda self, names, rows: (shared.add(names), real(self, names, rows))
    )
    path = PREFIX + "model.layers.0.self_attn.v_proj"
    quiet(adapted(), prepare_layer_inputs_fn={path: lambda inputs, about, name: inputs[0][0]})
    assert {path} in shared
    assert {path.replace("v_proj", part) for part in ("q_proj", "k_proj")} in shared


# ---- the adapter afterwards ----------------------------------------------------------------------------


def begun(data=None, model=None, **fields):
    peft = adapted(model, **fields)
    initialize_lora_eva_weights(peft, batches() if data is None else data, show_progress_bar=False)
    return peft


def test_an_adapter_that_began_lives_on(tmp_path):
    """A as found, B zero, ranks and alphas in the config, layers without rank bare; trains, saves, loads."""
    data = batches()
    peft = adapted(rho=2.0)
    found = quiet(peft, data)
    gone = [name for name, A in found.items() if not len(A)]
    initialize_lora_eva_weights(peft, data, show_progress_bar=False)
    registry = peft.base_model.registry
    assert registry.active == ("default",)
    for name, A in found.items():
        layer = registry.layers.get(name.removeprefix(PREFIX))
        if name in gone:
            assert layer is None
            assert isinstance(peft.get_submodule(name), nn.Linear)
            continue
        weight = layer.lora_A["default"].weight
        torch.testing.assert_close(weight, A, rtol=0, atol=0)
        assert weight.requires_grad
        assert not layer.lora_B["default"].weight.any()
        assert layer.scaling["default"] == 2.0
        assert layer.r["default"] == len(A)
    randomise(peft)
    peft.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(fresh), logits(peft))
    peft.unload()


def test_layers_that_get_no_rank_lose_the_adapter():
    """All variance in one layer's input: the others' components explain less and get nothing."""
    peft = adapted()
    name = PREFIX + "model.layers.0.self_attn.q_proj"
    ranks = dict.fromkeys(quiet(peft), 0) | {name: 5}
    state = {key: torch.eye(24 if "down" in key else 16)[:rank] for key, rank in ranks.items()}
    initialize_lora_eva_weights(peft, eva_state_dict=state)
    settings = peft.peft_config["default"]
    assert list(peft.base_model.registry.layers) == [name.removeprefix(PREFIX)]
    assert settings.target_modules == {"0.self_attn.q_proj"}
    assert settings.rank_pattern == {r"^model\.layers\.0\.self_attn\.q_proj": 5}
    assert settings.alpha_pattern == {r"^model\.layers\.0\.self_attn\.q_proj": 10.0}


@pytest.mark.parametrize(("adjust", "alpha", "scaling"), [(True, 12.0, 2.0), (False, 8.0, 8 / 6)])
def test_scalings_follow_the_ranks_or_not(adjust, alpha, scaling):
    peft = adapted(target_modules=["q_proj"], adjust_scaling_factors=adjust)
    state = {name: torch.eye(16)[:6] for name in quiet(peft)}
    initialize_lora_eva_weights(peft, eva_state_dict=state)
    for layer in peft.base_model.registry.layers.values():
        assert (layer.lora_alpha["default"], layer.scaling["default"]) == (alpha, pytest.approx(scaling))


def test_what_else_the_adapter_has_stays_with_it(tmp_path):
    """Whole modules, biases, token rows, bare parameters, an attention module, and another adapter."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(WORDS, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.table = nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, ids):
            x = self.embed(ids)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head(self.second(torch.tanh(self.first(x))) + self.table(x))

    torch.manual_seed(1)
    base = Odd()
    fields = config(
        target_modules=["attention", "first", "second"],
        target_parameters=["table.weight"],
        modules_to_save=["head"],
        trainable_token_indices={"embed": [1, 2]},
        bias="all",
    )
    peft = get_peft_model(copy.deepcopy(base), fields, low_cpu_mem_usage=True)
    another(peft, "other", target_modules=["first"])
    randomise(peft)
    others = {item.file_name: item.tensor.clone() for item in peft.base_model.registry.tensors("default")}
    other = {item.file_name: item.tensor for item in peft.base_model.registry.tensors("other")}
    state = {"first": torch.eye(8)[:3], "second": torch.empty(0, 8)}
    with pytest.warns(UserWarning, match=r"EVA has nothing for \['attention"):
        initialize_lora_eva_weights(peft, eva_state_dict=state)
    registry = peft.base_model.registry
    for item in registry.tensors("default"):
        former = others.get(
            item.file_name, others.get(item.file_name.replace("second.", "second.base_layer."))
        )
        if item.file_name.startswith("first.lora"):
            continue
        assert torch.equal(item.tensor, former), item.file_name
    assert all(item.tensor is other[item.file_name] for item in registry.tensors("other"))
    assert "default" not in getattr(registry.layers.get("second"), "r", ())
    randomise(peft)
    peft.save_pretrained(tmp_path, selected_adapters=["default"])
    fresh = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    batch = torch.randint(WORDS, (2, 5), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(fresh.eval(), batch), logits(peft.eval(), batch), rtol=0, atol=0)


def test_an_adapter_that_was_injected_and_is_not_active():
    model = tiny_llama()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model, "first")
    inject_adapter_in_model(config(), model, "late")
    registry = find_registry(model)
    registry.set_active(["first"])
    initialize_lora_eva_weights(model, batches(), adapter_name="late", show_progress_bar=False)
    assert registry.active == ("first",)
    assert not any(item.tensor.requires_grad for item in registry.tensors("late"))
    assert all(item.tensor.requires_grad for item in registry.tensors("first"))


# ---- the model afterwards, and refusals ------------------------------------------------------------------


def mixed_modes(peft):
    """Some modules train, some do not; some parameters want gradients."""
    peft.train()
    peft.get_base_model().model.layers[0].eval()
    return peft


@contextmanager
def unchanged(model):
    """The model and torch's generator are what they were."""
    before, generator = Snapshot(model), torch.get_rng_state()
    yield
    before.assert_same(model)
    assert torch.equal(torch.get_rng_state(), generator)


def drawing(data):
    """Batches from a loader that draws random numbers."""
    for batch in data:
        torch.rand(3)
        yield batch


def test_looking_leaves_the_model_alone():
    peft = mixed_modes(adapted())
    with unchanged(peft):
        quiet(peft, drawing(batches()))


class Stop(Exception):
    pass


def stops_at(number):
    def forward(model, batch, calls=[]):  # noqa: B006
        calls.append(batch)
        if len(calls) == number:
            raise Stop
        return model(**batch)

    return forward


@pytest.mark.parametrize("run", [get_eva_state_dict, initialize_lora_eva_weights])
def test_an_interruption_leaves_the_model_alone(run):
    peft = mixed_modes(adapted())
    with unchanged(peft), pytest.raises(Stop):
        run(peft, drawing(batches()), forward_fn=stops_at(3), show_progress_bar=False)


def nan_in_the_middle():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    return model


EYE = torch.eye(16)
Q = PREFIX + "model.layers.0.self_attn.q_proj"
REFUSED = {
    "no data": ({}, {}, ConfigError, "dataloader: None"),
    "empty": ({}, {"dataloader": []}, ConfigError, "no batch"),
    "unknown adapter": ({}, {"dataloader": batches(1), "adapter_name": "x"}, AdapterNameError, "'x'"),
    "not a mapping": ({}, {"dataloader": [torch.zeros(1)]}, ConfigError, "Tensor.*prepare_model_inputs_fn=None"),
    "no ids": ({}, {"dataloader": [{"pixels": torch.zeros(1)}]}, ConfigError, "pixels.*prepare_model_inputs_fn=None"),
    "no such layer": ({}, {"dataloader": batches(1), "prepare_layer_inputs_fn": {"nope": None}}, ConfigError, "nope"),
    "no rows": (
        {},
        {"dataloader": batches(1), "prepare_layer_inputs_fn": lambda inputs, about, name: inputs[0]},
        ConfigError,
        r"q_proj: .* gave \(4, 12, 16\), wanted a tensor of \(n, in\)",
    ),
    "NaN": ({"model": nan_in_the_middle}, {"dataloader": batches(1)}, NonFiniteError, "layers.1.self_attn.q_proj: the input holds NaN"),
    "unknown key": ({}, {"eva_state_dict": {PREFIX + "nope": EYE}}, KeyMismatchError, "unexpected: nope"),
    "wrong width": ({}, {"eva_state_dict": {Q: torch.eye(8)}}, KeyMismatchError, r"found \(8, 8\), expected \(rank, 16\)"),
    "infinite": ({}, {"eva_state_dict": {Q: EYE / 0}}, NonFiniteError, "q_proj"),
    "nothing left": (
        {"target_modules": ["layers.0.self_attn.q_proj"]},
        {"eva_state_dict": {Q: EYE[:0]}},
        ConfigError,
        "every rank is 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    fields, arguments, error, message = REFUSED[case]
    fields = dict(fields)
    peft = adapted(fields.pop("model", tiny_llama)(), **fields)
    with unchanged(peft), pytest.raises(error, match=message):
        initialize_lora_eva_weights(peft, **arguments, show_progress_bar=False)


def test_refused_for_another_scheme():
    peft = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with unchanged(peft), pytest.raises(ConfigError, match=r"has True, wanted 'eva'"):
        initialize_lora_eva_weights(peft, batches())


def test_refused_while_merged():
    peft = adapted()
    peft.merge_adapter()
    with unchanged(peft), pytest.raises(AdapterStateError, match="merged"):
        initialize_lora_eva_weights(peft, batches())


def test_a_bare_model_needs_a_config():
    with pytest.raises(ConfigError, match="peft_config: needed"):
        quiet(tiny_llama())


def test_a_failed_exchange_brings_the_former_adapter_back(monkeypatch):
    from lorakit import loading

    peft = adapted()
    randomise(peft)
    real, calls = loading.attach, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise Stop
        return real(*args, **kwargs)

    monkeypatch.setattr(loading, "attach", failing)
    registry = peft.base_model.registry
    before = {item.file_name: (item.tensor, item.tensor.clone()) for item in registry.tensors("default")}
    settings = peft.peft_config["default"].to_dict()
    with pytest.raises(Stop):
        initialize_lora_eva_weights(peft, batches(), show_progress_bar=False)
    assert len(calls) == 2
    for item in registry.tensors("default"):
        tensor, value = before.pop(item.file_name)
        assert item.tensor is tensor
        assert torch.equal(tensor, value)
        assert tensor.requires_grad
    assert not before
    assert (registry.active, peft.peft_config["default"].to_dict()) == (("default",), settings)


def test_a_reminder_unless_one_knows():
    with pytest.warns(UserWarning, match="until initialize_lora_eva_weights"):
        get_peft_model(tiny_llama(), config())


# ---- several processes -------------------------------------------------------------------------------------


def _one_rank(rank, path, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    data = batches(16)[rank::2]
    found = quiet(adapted(rho=1.5, tau=1.0), data)
    results[rank] = {name: A.tolist() for name, A in found.items()}
    torch.distributed.destroy_process_group()


def test_the_inputs_of_all_ranks_count(tmp_path):
    alone = quiet(adapted(rho=1.5, tau=1.0), batches(16))
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_one_rank, (str(tmp_path / "meet"), results), nprocs=2)
        first, second = results[0], results[1]
    assert first == second
    for name, A in alone.items():
        torch.testing.assert_close(torch.tensor(first[name]).reshape(A.shape), A, rtol=0, atol=2e-3)
