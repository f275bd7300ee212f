"""LoRA on a bare parameter of a module: stacks of experts, or the projections inside `nn.MultiheadAttention`.

Such a parameter is multiplied by its module's own forward, which cannot be split. So the wrapper calls that forward on
a stand-in of the module that holds the changed parameter: the module itself is never changed, and calls on other
threads see nothing of it.

Cost. Experts of transformers, and the like that only select and multiply, get the change in factored form
(`factored`). Any other module gets the dense sum: one product of the parameter's size and one tensor like it, for each
call and, in training, its gradient. One wrapper adapts one parameter; several on a module are nested, the module's
last parameter outermost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from lorakit.errors import UnsupportedError
from lorakit.layers.base import LoraLayer
from lorakit.layers.chosen import Live
from lorakit.layers.factored import Change, FactoredWeight
from lorakit.layers.factors import plain_linear
from lorakit.layers.linear import Linear, held_by_modules
from lorakit.layers.standin import stand_in
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
        lora_A, lora_B: the factors by adapter name, as Linears: A (r·experts, in), expert by expert, and B
            (out, r·experts), rank by rank.
    """

    def __init__(self, base_layer: nn.Module, codec: WeightCodec) -> None:
        super().__init__(base_layer, codec)
        assert isinstance(codec, ParameterCodec)
        self.parameter_name = codec.attribute
        self.num_experts = max(self.layout.experts, 1)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the module takes and gives, computed with the changed parameters."""
        changed = {
            wrapper.parameter_name: wrapper.effective() for wrapper in self.chain() if wrapper.acting()
        }
        module = self.get_base_layer()
        inner = {
            name: child.stand_in()
            for name, child in module._modules.items()
            if isinstance(child, Linear) and _is_read(module, name)
        }
        if not changed and not inner:
            return module(*args, **kwargs)
        if torch.compiler.is_compiling() and not inner:
            dense = {name: _as_dense(value) for name, value in changed.items()}
            return torch.func.functional_call(module, dense, args, kwargs)
        return stand_in(module, changed, inner)(*args, **kwargs)

    def chain(self) -> Iterator[ParamWrapper]:
        """This wrapper and those that it wraps."""
        wrapper: nn.Module = self
        while isinstance(wrapper, ParamWrapper):
            yield wrapper
            wrapper = wrapper.base_layer

    def acting(self) -> tuple[str, ...]:
        """The adapters that act on this parameter in the running call.

        Raises:
            UnsupportedError: the call chose an adapter for each sample, and one of them is here.
        """
        if not Live.any:
            return self._route
        chosen = self._chosen()
        if chosen is None:
            return self._route
        present = self._present(chosen.names)
        if present and chosen.ids is not None:
            raise UnsupportedError(
                f"adapters for each sample do not work on the parameter {self.parameter_name!r} of a "
                f"{type(self.get_base_layer()).__name__}, which does not see samples; {list(present)} are on it. "
                "Choose one adapter for the whole batch"
            )
        return present

    def effective(self) -> FactoredWeight | Tensor:
        """The parameter with the changes of the acting adapters; the parameter itself where none acts."""
        base = self.codec.state(self.get_base_layer()).weight
        names = self.acting()
        if not names:
            return base
        weight = FactoredWeight(base, [self._change(name) for name in names])
        factored = _stays_factored(self.get_base_layer()) and not torch.compiler.is_compiling()
        return weight if factored else weight.dense()

    def _change(self, name: str) -> Change:
        A, B, _ = self.stored(name)
        if self.layout.experts:
            right = A.reshape(self.layout.experts, -1, A.shape[1])
            left = B.reshape(B.shape[0], -1, self.layout.experts).permute(2, 0, 1)
        else:
            left, right = B, A
        if self.layout.transposed:
            left, right = right.mT, left.mT
        return Change(left, right, self.scaling[name])

    def __getattr__(self, name: str) -> Any:
        """What the wrapper does not have is the module's; a parameter is given as the running call computes with it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self._modules:
                raise
            module = self.get_base_layer()
            for wrapper in self.chain():
                if name == wrapper.parameter_name:
                    return wrapper.effective()
            found = getattr(module, name)
            return found.stand_in() if isinstance(found, Linear) and _is_read(module, name) else found

    def _hold(self, name: str, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        assert bias is None, "the planner refuses lora_bias on a parameter"
        self.lora_A[name] = plain_linear(A)
        self.lora_B[name] = plain_linear(B)

    def _let_go(self, name: str) -> None:
        del self.lora_A[name]
        del self.lora_B[name]

    def _held(self, name: str) -> dict[str, tuple[str, nn.Parameter]]:
        return held_by_modules(self.lora_A, self.lora_B, name)


def _is_read(module: nn.Module, child: str) -> bool:
    """Whether a module reads the weight of its child instead of calling it."""
    return isinstance(module, nn.MultiheadAttention) and child == "out_proj"


def _as_dense(weight: FactoredWeight | Tensor) -> Tensor:
    return weight.dense() if isinstance(weight, FactoredWeight) else weight


_FACTORED_FORWARDS = frozenset({"eager", "batched_mm", "grouped_mm", None})


def _stays_factored(module: nn.Module) -> bool:
    """Whether the module's forward is known to select and multiply only.

    True of the experts of transformers: those whose forward is chosen by name, unless a kernel is chosen that reads the
    parameter's memory, and those of Llama 4.
    """
    if not type(module).__module__.startswith("transformers."):
        return False
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
        return getattr(module.config, "_experts_implementation", None) in _FACTORED_FORWARDS
    return type(module).__name__ == "Llama4TextExperts"
