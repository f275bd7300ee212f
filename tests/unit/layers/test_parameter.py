"""Adapters on bare parameters: every set of targets in every order, the module untouched, files of one's own."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import threading

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from lorakit import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from lorakit.errors import NonFiniteError, PlanError, UnsupportedError
from lorakit.layers import ParamWrapper
from lorakit.layers.factored import FactoredWeight
from models import Snapshot

WIDTH, INNER, MATRICES = 8, 12, 3


class Experts(nn.Module):
    """Parameters of every shape, read in ways of its own."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(MATRICES, WIDTH))
        self.up = nn.Parameter(torch.randn(MATRICES, INNER, WIDTH) / 3)
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.down = nn.Parameter(torch.randn(MATRICES, WIDTH, INNER) / 3)
        self.table = nn.Parameter(torch.arange(6).reshape(2, 3), requires_grad=False)
        self.deep = nn.Parameter(torch.randn(2, 2, 2, 2))
        self.register_parameter("nothing", None)

    def forward(self, x):
        inner = torch.tanh(torch.einsum("efd,...d->...ef", self.up, x))
        outer = torch.einsum("edf,...ef->...ed", self.down, inner)
        return torch.einsum("...ed,...e->...d", outer, self.gates(x)) + self.shift

    def gates(self, x):
        return (x @ self.mix.T).softmax(-1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.top = nn.Parameter(torch.randn(3, 3))
        self.first = nn.Linear(5, WIDTH)
        self.experts = Experts()
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.head(self.experts(self.first(x)))


def build(dtype=torch.float64):
    torch.manual_seed(0)
    return Model().to(dtype).eval()


def x(dtype=torch.float64):
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def config(*targets, **changes):
    return LoraConfig(
        **{"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": list(targets), **changes}
    )


@torch.no_grad()
def randomise(model, name="default", seed=3):
    """Values that depend on the names in the adapter's file alone."""
    generator = torch.Generator().manual_seed(seed)
    for item in sorted(model.base_model.registry.tensors(name), key=lambda item: item.file_name):
        item.tensor.copy_(torch.randn(item.tensor.shape, generator=generator) * 0.3)


TARGETS = {
    "a": ("experts.up",),
    "b": ("experts.down", "first.weight"),
    "c": ("experts.mix", "experts.down"),
    "d": ("experts.up", "experts.mix", "head.weight"),
}


def adapted(names, *, dtype=torch.float64):
    """A model with these adapters, put on in this order; each has the same values whatever the order."""
    model = None
    for name in names:
        if model is None:
            model = get_peft_model(build(dtype), config(*TARGETS[name]), name)
        else:
            model.add_adapter(name, config(*TARGETS[name]))
        randomise(model, name, seed=ord(name))
    return model.eval()


def alone(name):
    return adapted([name])


def deltas(*names):
    """The change that adapters make to each base parameter, spelt out from their files."""
    found = {}
    for name in names:
        state = get_peft_model_state_dict(alone(name), adapter_name=name)
        for target in TARGETS[name]:
            own = [t for t in build().experts._parameters if f"experts.{t}" in TARGETS[name]]
            path, _, attribute = target.rpartition(".")
            depth = list(reversed(own)).index(attribute) if path == "experts" else 0
            key = f"base_model.model.{path}" + ".base_layer" * depth
            A, B = state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"]
            e = MATRICES if attribute in {"up", "down"} else 1
            delta = torch.einsum("ore,eri->eoi", B.reshape(len(B), -1, e), A.reshape(e, -1, A.shape[1]))
            found[target] = found.get(target, 0) + 1.5 * (delta if e > 1 else delta[0])
    return found


def truth(*names):
    base = build()
    state = dict(base.named_parameters())
    return functional_call(base, {key: state[key] + delta for key, delta in deltas(*names).items()}, x())


def close(found, wanted, tolerance=1e-11):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# ---- several adapters with targets of their own ---------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations("abcd"))[::3], ids="".join)
def test_any_order_of_putting_on_gives_the_same_model(order):
    model = adapted(order)
    wanted = adapted("abcd")
    assert model.state_dict().keys() == wanted.state_dict().keys()
    for key, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    for count in (1, 2, 4):
        for names in itertools.combinations("abcd", count):
            model.base_model.set_adapter(list(names))
            close(model(x()), truth(*names))


@pytest.mark.parametrize("order", list(itertools.permutations("abcd"))[1::3], ids="".join)
def test_any_order_of_taking_off_leaves_the_others(order):
    model, base = adapted("abcd"), build()
    plain = base(x())
    model.base_model.set_adapter(order[-1])
    left = list("abcd")
    for name in order:
        model.base_model.set_adapter([])
        assert torch.equal(model(x()), plain)
        for other in left:
            model.base_model.set_adapter(other)
            close(model(x()), truth(other))
        if len(left) > 1:
            model.base_model.set_adapter(order[-1])
            model.delete_adapter(name)
            left.remove(name)
            assert model.state_dict().keys() == adapted(left).state_dict().keys()
            wrapped = {path for path, layer in model.base_model.registry.layers.items()}
            assert wrapped == {target for other in left for target in TARGETS[other]}
    restored = model.unload()
    assert isinstance(restored.experts, Experts)
    assert type(restored.first) is type(restored.head) is nn.Linear
    for (name, parameter), (_, wanted) in zip(
        restored.named_parameters(), base.named_parameters(), strict=True
    ):
        assert torch.equal(parameter, wanted), name


def test_wrappers_are_nested_in_the_order_of_the_parameters():
    model = adapted("dab")
    chain = list(model.base_model.model.experts.chain())
    assert [wrapper.parameter_name for wrapper in chain] == ["down", "up", "mix"]
    model.delete_adapter("b")  # the outermost
    assert [wrapper.parameter_name for wrapper in model.base_model.model.experts.chain()] == ["up", "mix"]
    model.add_adapter("c", config(*TARGETS["c"]))
    model.delete_adapter("a")
    assert [wrapper.parameter_name for wrapper in model.base_model.model.experts.chain()] == [
        "down",
        "up",
        "mix",
    ]
    model.set_adapter("c")
    model.delete_adapter("d")  # the one in the middle
    assert [wrapper.parameter_name for wrapper in model.base_model.model.experts.chain()] == ["down", "mix"]
    assert model.base_model.model.experts is not model.base_model.model.experts.base_layer
    assert (
        model.base_model.model.experts.get_base_layer()
        is model.base_model.model.experts.base_layer.base_layer
    )


@pytest.mark.parametrize("order", ["abcd", "dcba", "bdac"])
def test_files_do_not_know_of_other_adapters(order, tmp_path):
    model = adapted(order)
    model.save_pretrained(tmp_path)
    for name in order:
        alone(name).save_pretrained(tmp_path / "alone")
        files = [
            load_file(folder / name / "adapter_model.safetensors")
            for folder in (tmp_path, tmp_path / "alone")
        ]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][key], value) for key, value in files[1].items())
    fresh = PeftModel.from_pretrained(build(), tmp_path / order[-1], adapter_name=order[-1])
    for name in order[:-1]:
        fresh.load_adapter(tmp_path / name, name)
    for name in order:
        fresh.set_adapter(name)
        close(fresh(x()), truth(name))


@pytest.mark.parametrize("names", ["a", "bc", "abcd", "dcba"])
def test_merging_equals_the_sum_and_unmerging_gives_the_bits_back(names):
    model = adapted("abcd")
    model.base_model.set_adapter(list(names))
    start = {key: value.clone() for key, value in model.state_dict().items()}
    before, base = model(x()), build()
    model.merge_adapter(list(names))
    close(model(x()), before)
    for target, delta in deltas(*names).items():
        path, _, attribute = target.rpartition(".")
        module = model.base_model.model.get_submodule(path)
        close(getattr(module.get_base_layer(), attribute), base.get_parameter(target) + delta)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in start.items())
    with model.disable_adapter():
        assert torch.equal(model(x()), base(x()))
    model.unmerge_adapter()
    assert torch.equal(model(x()), before)
    for target in deltas(*names):
        path, _, attribute = target.rpartition(".")
        module = model.base_model.model.get_submodule(path)
        assert torch.equal(getattr(module.get_base_layer(), attribute), base.get_parameter(target))
    merged = model.merge_and_unload(adapter_names=list(names))
    close(merged(x()), before)
    assert merged.state_dict().keys() == base.state_dict().keys()


def test_gradients_are_those_of_the_dense_sum():
    model = adapted("abcd")
    model.base_model.set_adapter(list("abcd"))
    model(x()).square().sum().backward()
    registry = model.base_model.registry
    base = build()
    state = dict(base.named_parameters())
    leaves, dense = {}, {}
    for path, layer in registry.layers.items():
        for name in layer.adapters:
            A, B, _ = layer.stored(name)
            leaves[path, name] = [t.detach().clone().requires_grad_() for t in (A, B)]
            blocks = layer.layout.split(*leaves[path, name], 1.5)
            delta = torch.stack([1.5 * block.B @ block.A for block in blocks])
            dense[path] = dense.get(path, state[path]) + (delta if layer.layout.experts else delta[0])
    functional_call(base, dense, x()).square().sum().backward()
    for (path, name), (A, B) in leaves.items():
        mine = registry.layers[path].stored(name)
        close(mine.A.grad, A.grad, 1e-10)
        close(mine.B.grad, B.grad, 1e-10)


def test_a_merge_that_fails_in_one_parameter_changes_none():
    model = adapted("ab")
    with torch.no_grad():
        model.base_model.registry.layers["experts.up"].lora_A["a"].weight[0, 0] = float("inf")
    model.base_model.set_adapter(["a", "b"])
    before = Snapshot(model)
    with pytest.raises(NonFiniteError, match=r"experts\.up"):
        model.merge_adapter()
    before.assert_same(model)


# ---- refusals -------------------------------------------------------------------------------------------

REFUSALS = {
    "dropout": (config("experts.up", lora_dropout=0.1), r"experts\.up: lora_dropout cannot act here"),
    "bias": (
        config("experts.up", lora_bias=True),
        r"experts\.up: lora_bias=True has no place on a parameter",
    ),
    "the model's own": (config("top"), "top: a parameter of the model itself"),
    "integers": (config("experts.table"), r"experts\.table: got Parameter of torch\.int64, 2 dimensions"),
    "one dimension": (
        config("experts.shift"),
        r"experts\.shift: got Parameter of torch\.float64, 1 dimensions",
    ),
    "four dimensions": (
        config("experts.deep"),
        r"experts\.deep: got Parameter of torch\.float64, 4 dimensions",
    ),
    "a bias": (config("first.bias"), r"first\.bias: got Parameter of torch\.float64, 1 dimensions"),
    "both fields": (
        config("first.weight", target_modules=["first"]),
        r"first\.weight: first is named in target_mod",
    ),
    "all-linear": (
        config("first.weight", target_modules="all-linear"),
        r"first\.weight: first is named in target_mod",
    ),
    "trained whole": (
        config("experts.up", modules_to_save=["experts"]),
        r"experts\.up: modules_to_save \['experts'\]",
    ),
    "no match": (config("experts.upp"), r"'experts\.upp' matches no parameter; did you mean 'experts\.up'"),
    "half a name": (config("perts.up"), r"'perts\.up' matches no parameter"),
    "none there": (config("experts.nothing"), r"'experts\.nothing' matches no parameter"),
    "one of two": (config("experts.up", "experts.dwn"), r"'experts\.dwn' matches no parameter; did you mean"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("adapters", ["", "ac"], ids=["bare model", "beside others"])
def test_refused_while_planning(case, adapters):
    wanted, message = REFUSALS[case]
    model = adapted(adapters) if adapters else build()
    before = Snapshot(model)
    with pytest.raises(PlanError, match=message):
        model.add_adapter("new", wanted) if adapters else get_peft_model(model, wanted)
    before.assert_same(model)


def test_a_parameter_of_another_class_is_refused():
    """As quantised ones are: what their memory holds is not the weight."""

    class Packed(nn.Parameter):
        pass

    model = build()
    model.experts.up = Packed(model.experts.up.detach())
    before = Snapshot(model)
    with pytest.raises(
        PlanError, match=r"experts\.up: got Packed of torch\.float64, 3 dimensions; wanted a plain"
    ):
        get_peft_model(model, config("experts.up"))
    before.assert_same(model)


def test_a_file_with_dropout_loads(tmp_path):
    model = adapted("a")
    model.save_pretrained(tmp_path)
    path = tmp_path / "a" / "adapter_config.json"
    fields = json.loads(path.read_text())
    assert fields["lora_dropout"] == 0.0
    path.write_text(json.dumps({**fields, "lora_dropout": 0.5}))
    with pytest.warns(UserWarning, match="lora_dropout"):  # the file was edited after it was written
        loaded = PeftModel.from_pretrained(build(), tmp_path / "a")
    close(loaded.train()(x()), truth("a"))


def test_all_reasons_at_once():
    with pytest.raises(PlanError) as caught:
        get_peft_model(build(), config("top", "experts.shift", "experts.dwn", "experts.up", lora_dropout=0.5))
    for part in ("top: ", "experts.shift: ", "'experts.dwn'", "experts.up: lora_dropout"):
        assert part in str(caught.value)


def test_a_module_is_adapted_as_a_whole_or_by_its_parameters():
    whole = get_peft_model(build(), config(target_modules=["first"]))
    bare = get_peft_model(build(), config("first.weight"))
    for model, other, message in (
        (whole, config("first.weight"), r"first\.weight: first carries an adapter as a module"),
        (
            bare,
            config(target_modules=["first"]),
            r"first: its parameters \['weight'\] carry adapters already",
        ),
        (bare, config(modules_to_save=["first"], target_modules=["head"]), "'first' cannot be trained whole"),
    ):
        before = Snapshot(model)
        with pytest.raises(PlanError, match=message):
            model.add_adapter("new", other)
        before.assert_same(model)


def test_an_adapter_for_each_sample_is_refused_by_the_parameters_name():
    model = adapted("ac")
    before = Snapshot(model)
    with pytest.raises(UnsupportedError, match=r"'down' of a Experts, which does not see samples; \['c'\]"):
        model(x(), adapter_names=["c", "c", "a", "__base__", "a", "a"])
    before.assert_same(model)
    close(model(x(), adapter_names=["__base__"] * 6), build()(x()))


# ---- the module inside ----------------------------------------------------------------------------------


def test_the_module_is_never_changed():
    model = adapted("abcd")
    model.base_model.set_adapter(list("abcd"))
    before = Snapshot(model)
    seen = []
    experts = model.base_model.model.experts.get_base_layer()
    experts.register_forward_pre_hook(
        lambda module, _: seen.append({k: id(v) for k, v in experts._parameters.items()})
    )
    held = {key: id(value) for key, value in experts._parameters.items()}
    with torch.no_grad():
        model(x())
    assert seen == [held]
    experts._forward_pre_hooks.clear()
    before.assert_same(model)


HOOKS = {
    "pre-hook": lambda module, log: module.register_forward_pre_hook(
        lambda m, args: log.append(args[0].shape)
    ),
    "pre-hook that changes": lambda module, log: module.register_forward_pre_hook(
        lambda m, args: (args[0] * 2,)
    ),
    "hook": lambda module, log: module.register_forward_hook(lambda m, args, out: log.append(out.shape)),
    "hook that changes": lambda module, log: module.register_forward_hook(lambda m, args, out: out * 2),
    "backward hook": lambda module, log: module.register_full_backward_hook(
        lambda m, gi, go: log.append(go[0].shape)
    ),
}


@pytest.mark.parametrize("inside", [True, False], ids=["on the module", "on the wrapper"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_run_as_on_the_merged_model(hook, inside):
    model, plain = adapted("d"), alone("d").merge_and_unload()
    logs = [], []
    module = model.base_model.model.experts
    HOOKS[hook](module.get_base_layer() if inside else module, logs[0])
    HOOKS[hook](plain.experts, logs[1])
    inputs = [x().requires_grad_() for _ in range(2)]
    outputs = [model(inputs[0]), plain(inputs[1])]
    close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    close(inputs[0].grad, inputs[1].grad, 1e-10)
    assert logs[0] == logs[1]
    assert logs[0] or "changes" in hook


class Counting(Experts):
    """Notes on itself, as modules do that keep statistics or a cache."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        self.last = x.detach()
        self.seen = self.seen + 1
        if self.calls == 3:
            raise RuntimeError("the third call fails")
        return super().forward(x)


def test_what_a_forward_notes_on_itself_stays():
    base = build()
    base.experts = Counting().double()
    model = get_peft_model(base, config("experts.up", "experts.down"))
    randomise(model)
    experts = model.base_model.model.experts.get_base_layer()
    model(x())
    model(x())
    with pytest.raises(RuntimeError, match="third"):
        model(x())
    assert experts.calls == 3
    assert experts.seen == 3
    assert experts.last.shape == (6, WIDTH)
    assert set(experts._parameters) == set(Experts()._parameters)


def test_a_forward_put_onto_the_module_runs():
    """As accelerate does; it knows the module itself, so the weights are put there for the call."""
    model, plain = adapted("d"), alone("d").merge_and_unload()
    for experts in (model.base_model.model.experts.get_base_layer(), plain.experts):
        own = experts.forward
        experts.forward = lambda x, own=own: own(x) * 3
    close(model(x()), plain(x()))
    before = Snapshot(model)
    model(x())
    before.assert_same(model)


@torch.no_grad()  # torch warns of a weight that is no leaf
def test_a_module_that_was_compiled_in_place_computes_with_its_adapters():
    model, wanted = adapted("d"), alone("d").merge_and_unload()(x())
    experts = model.base_model.model.experts.get_base_layer()
    calls = []

    def backend(graph, _):
        calls.append(graph)
        return graph.forward

    torch._dynamo.reset()
    experts.compile(backend=backend)
    close(model(x()), wanted)
    assert calls
    with model.disable_adapter():
        close(model(x()), build()(x()))
    torch._dynamo.reset()


def test_it_shows_its_parameter():
    text = repr(adapted("c"))
    assert text.count("lora.ParamWrapper(") == 2
    assert text.index("parameter_name='down'") < text.index("parameter_name='mix'")


def test_others_read_the_parameter_as_it_acts():
    model = adapted("d")
    merged = alone("d").merge_and_unload()
    experts, head = model.base_model.model.experts, model.base_model.model.head
    for name in ("up", "mix", "down", "shift"):
        assert isinstance(getattr(experts, name), torch.Tensor)
        close(getattr(experts, name), getattr(merged.experts, name))
    close(head.weight, merged.head.weight)
    assert head.bias is head.get_base_layer().bias
    assert head.in_features == WIDTH
    hidden = torch.randn(2, WIDTH, dtype=torch.float64)
    close(experts.gates(hidden), merged.experts.gates(hidden))
    with model.disable_adapter():
        assert experts.up is experts.get_base_layer().up
        assert head.weight is head.get_base_layer().weight
    for name in ("no_such_name", "_private", "__deepcopy__"):
        with pytest.raises(AttributeError, match=name):
            getattr(experts, name)
    assert not hasattr(head, "padding_idx")


def test_a_linear_stays_factored(monkeypatch):
    model = get_peft_model(build(), config("first.weight", "head.weight"))
    randomise(model)
    wanted = copy.deepcopy(model).merge_and_unload()(x())

    def refuse(_):
        raise AssertionError("the dense sum was built")

    monkeypatch.setattr(FactoredWeight, "dense", refuse)
    close(model(x()), wanted)


# ---- copies, calls, threads ------------------------------------------------------------------------------


def test_copies_and_pickles_are_models_of_their_own():
    model = adapted("abd")
    with torch.no_grad():
        wanted = model(x())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin(x()), wanted)
        assert isinstance(twin.base_model.model.experts, ParamWrapper)
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.is_floating_point():
                    parameter.zero_()
        assert torch.equal(model(x()), wanted)
        twin.delete_adapter("b")
        twin.unload()
    assert model.base_model.registry.configs.keys() == set("abd")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_call_may_bring_its_own_values(dtype):
    model = adapted("d", dtype=dtype)
    other = adapted("d", dtype=dtype)
    randomise(other, "d", seed=9)
    given = dict(other.named_parameters())
    close(
        functional_call(model, given, (x(dtype),)), other(x(dtype)), 1e-5 if dtype == torch.float32 else 1e-12
    )
    wanted = [p for p in other.parameters() if p.requires_grad]

    def loss(values):
        return functional_call(model, {**given, **values}, (x(dtype),)).square().sum()

    trained = {name: p for name, p in given.items() if p.requires_grad}
    grads = torch.func.grad(loss)({name: p.detach() for name, p in trained.items()})
    other(x(dtype)).square().sum().backward()
    for mine, parameter in zip(grads.values(), wanted, strict=True):
        close(mine, parameter.grad, 1e-4 if dtype == torch.float32 else 1e-10)


def test_threads_with_adapters_of_their_own():
    model = adapted("abcd")
    wanted = {name: truth(name).detach() for name in "abcd"}
    wanted["__base__"] = build()(x()).detach()
    failures, start = [], threading.Barrier(len(wanted))

    def work(name):
        start.wait()
        for _ in range(20):
            with torch.no_grad(), model.use_adapter(name):
                found = model(x())
            if not torch.allclose(found, wanted[name], rtol=1e-11, atol=1e-11):
                failures.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_kept_factors_follow_training_and_loading(tmp_path):
    """Without gradients the factors are kept as products want them; any write makes them new."""
    model = get_peft_model(build(torch.float32), config("first.weight", "experts.up"))
    randomise(model, seed=3)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        first = model(x(torch.float32))
        assert torch.equal(model(x(torch.float32)), first)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x(torch.float32)).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        second = model(x(torch.float32))
        close(second, copy.deepcopy(model).merge_and_unload()(x(torch.float32)), 1e-5)
        model.load_state_dict(
            get_peft_model(build(torch.float32), config("first.weight", "experts.up")).state_dict()
        )
        close(model(x(torch.float32)), build(torch.float32)(x(torch.float32)), 1e-6)
        model.load_adapter(tmp_path, "again")
        model.set_adapter("again")
        assert torch.equal(model(x(torch.float32)), first)
    assert (second - first).abs().max() > 1e-3


def test_moving_the_model_moves_what_is_kept():
    model = adapted("abd")
    with torch.no_grad():
        model(x())
        model.to(torch.float32)
        found = model(x(torch.float32))
        assert found.dtype == torch.float32
        close(found.double(), truth("a"), 1e-5)
