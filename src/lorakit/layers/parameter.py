"""LoRA on a bare parameter of a module: stacks of experts, or the projections inside `nn.MultiheadAttention`.

Such a parameter is multiplied by its module's own forward, which cannot be split. So the wrapper calls that forward on
a stand-in of the module that holds the changed parameter: the module itself is never changed, and calls on other
threads see nothing of it.

Cost. Modules that are known to only select and multiply (`multiplies_only`) get the change in factored form. Any other
module gets the dense sum: one product of the parameter's size and one tensor like it, for each call and, in training,
its gradient. One wrapper adapts one parameter; several on a module are nested, the module's last parameter outermost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from lorakit.layers.base import LoraLayer
from lorakit.layers.factored import Change, FactoredWeight
from lorakit.layers.factors import let_go, plain_linear
from lorakit.layers.linear import Linear, held_by_modules
from lorakit.layers.stacks import Arrangement, StackKeeper
from lorakit.layers.standin import call_on_stand_in, stand_in
from lorakit.layers.varied import offset_of
from lorakit.layers.whole import acting_on_all
from lorakit.weights.parameter import ParameterCodec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorakit.weights import WeightCodec


@final
class ParamWrapper(LoraLayer):
    """A module one of whose parameters carries adapters: `W + sum over the routed ones of scaling · B A`.

    The parameter is (out, in), or (experts, out, in), or (experts, in, out) where the module's `is_transposed` says so.

    Attributes:
        parameter_name: the parameter's name in the module.
        num_experts: how many matrices are stacked in it, 1 for a plain matrix.
        lora_A, lora_B: the factors by adapter name, as Linears: A (r·experts, in), expert by expert, and B
            (out, r·experts), rank by rank.
    """

    def __init__(self, base_layer: nn.Module, codec: WeightCodec) -> None:
        super().__init__(base_layer, codec)
        assert isinstance(codec, ParameterCodec)
        self.num_experts = max(self.layout.experts, 1)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self._stacks = StackKeeper()
        self.parameter_name = codec.attribute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the module takes and gives, computed with the changed parameters."""
        module = self.get_base_layer()
        changed = {
            wrapper.parameter_name: wrapper.changed() for wrapper in self.chain() if wrapper._acting_names()
        }
        read = {name: child.stand_in() for name, child in _children_read(module)}
        if not changed and not read:
            return module(*args, **kwargs)
        if torch.compiler.is_compiling() or _is_bound(module):
            dense = {name: weight.dense() for name, weight in changed.items()}
            for name, child in read.items():
                dense |= {
                    f"{name}.base_layer.{key}": value
                    for key, value in child._parameters.items()
                    if value is not None
                }
            return torch.func.functional_call(module, dense, args, kwargs)
        given = (
            changed if multiplies_only(module) else {name: weight.dense() for name, weight in changed.items()}
        )
        return call_on_stand_in(module, given, read, args, kwargs)

    def chain(self) -> Iterator[ParamWrapper]:
        """This wrapper and those that it wraps."""
        wrapper: nn.Module = self
        while isinstance(wrapper, ParamWrapper):
            yield wrapper
            wrapper = wrapper.base_layer

    def _acting_names(self) -> tuple[str, ...]:
        """The adapters that act on this parameter in the running call; one for each sample is refused."""
        module = type(self.get_base_layer()).__name__
        where = f"on the parameter {self.parameter_name!r} of a {module}, which does not see samples"
        return acting_on_all(self, where)

    def changed(self) -> FactoredWeight:
        """The parameter with the changes of the acting adapters."""
        base = self.codec.state(self.get_base_layer()).weight
        names = self._acting_names()
        changes = [self._change(name) for name in names]
        return FactoredWeight(base, changes + [change for name in names for change in self._taken_off(name)])

    def acting_value(self) -> Tensor:
        """The parameter as the running call computes with it: itself where nothing acts, else the dense sum."""
        return (
            self.changed().dense() if self._acting_names() else self.codec.state(self.get_base_layer()).weight
        )

    def _change(self, name: str) -> Change:
        A, B, _ = self.stored(name)
        return self._stacked(name, A, B, self.scaling[name])

    def _taken_off(self, name: str) -> list[Change]:
        """What an adapter takes off the parameter, if anything."""
        offset = offset_of(self, name)
        # adapters have no spaces in their names
        return [] if offset is None else [self._stacked(f"{name} 0", offset.A, offset.B, offset.scaling)]

    def _stacked(self, key: str, A: Tensor, B: Tensor, scaling: float | Tensor) -> Change:
        experts = self.layout.experts
        right = self._stacks.stack(f"A {key}", A, Arrangement(experts, by_rank=False))
        left = self._stacks.stack(f"B {key}", B, Arrangement(experts, by_rank=True))
        if self.layout.transposed:
            left, right = right, left
        return Change(left, right, scaling)

    @property
    def weight(self) -> Tensor:
        """The module's `weight`, where it has one, as the running call computes with it."""
        found: Tensor = self._of_module("weight")
        return found

    def __getattr__(self, name: str) -> Any:
        """What the wrapper does not have is the module's; a parameter is given as the running call computes with it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "parameter_name" not in self.__dict__ or not _is_open(name):  # it is set when all else is
                raise
            return self._of_module(name)

    def _of_module(self, name: str) -> Any:
        module = self.get_base_layer()
        for wrapper in self.chain():
            if name == wrapper.parameter_name:
                return wrapper.acting_value()
        found = getattr(module, name)
        if isinstance(found, Linear) and _is_read(module, name):
            return found.stand_in()
        if getattr(found, "__self__", None) is module and not type(module).__module__.startswith("torch.nn."):
            # a method may read the parameters
            values = {wrapper.parameter_name: wrapper.acting_value() for wrapper in self.chain()}
            return getattr(stand_in(module, values), name)
        return found

    def extra_repr(self) -> str:
        """Which parameter it is, since several wrappers may be nested."""
        return f"parameter_name={self.parameter_name!r}"

    def _hold(self, name: str, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        assert bias is None, "the planner refuses lora_bias on a parameter"
        self.lora_A[name] = plain_linear(A)
        self.lora_B[name] = plain_linear(B)

    def _let_go(self, name: str) -> None:
        self._stacks.clear()
        let_go(name, self.lora_A, self.lora_B)

    def _held(self, name: str) -> dict[str, tuple[str, nn.Parameter]]:
        return held_by_modules(self.lora_A, self.lora_B, name)


def _is_open(name: str) -> bool:
    """Whether others may ask a wrapper for what its module calls so; torch's encoder layers ask for a private name."""
    return not name.startswith("_") or name == "_qkv_same_embed_dim"


def _is_bound(module: nn.Module) -> bool:
    """Whether calling the module runs something that knows this very object, so that no other can stand in for it.

    So do a `forward` that was put onto the object (accelerate), and `module.compile()`.
    """
    return "forward" in module.__dict__ or module.__dict__.get("_compiled_call_impl") is not None


def _is_read(module: nn.Module, child: str) -> bool:
    """Whether a module reads the weight of its child instead of calling it."""
    return isinstance(module, nn.MultiheadAttention) and child == "out_proj"


def _children_read(module: nn.Module) -> Iterator[tuple[str, Linear]]:
    for name, child in module._modules.items():
        if isinstance(child, Linear) and _is_read(module, name):
            yield name, child


_EXPERT_FORWARDS = frozenset({"eager", "batched_mm", "grouped_mm", None})


def multiplies_only(module: nn.Module) -> bool:
    """Whether the module's forward is known to do no more with its parameters than select and multiply.

    True of a plain Linear and of the experts of transformers: those whose forward is chosen by name, unless a kernel is
    chosen that reads the parameter's memory, and those of Llama 4 and JetMoe.
    """
    if type(module) is nn.Linear:
        return True
    if not type(module).__module__.startswith("transformers."):
        return False
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
        return getattr(module.config, "_experts_implementation", None) in _EXPERT_FORWARDS
    return type(module).__name__ in {"Llama4TextExperts", "JetMoeParallelExperts"}
