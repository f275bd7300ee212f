"""Making a quantised base ready to be trained beside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.errors import UnsupportedError
from lorakit.tuner import check_bare
from lorakit.weights import find_codec, is_quantised_linear

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeVar

    M = TypeVar("M", bound=nn.Module)

_HALVES = frozenset({torch.float16, torch.bfloat16})
_WIDENS = "bitsandbytes"
"""The backend whose layers take fp32 inputs; the kernels of others want the half precision that the model came in."""


def prepare_model_for_kbit_training(
    model: M,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> M:
    """Freeze a base and make its training stable and lean: call it before putting an adapter on.

    Every parameter is frozen. The half-precision parameters that are not quantised (norms, embeddings, head, biases)
    become fp32, unless layers quantised by another library than bitsandbytes are there, whose kernels want what they
    came with. On a quantised base gradient checkpointing is switched on, and its inputs are made to want gradients,
    without which nothing reaches the adapters through a frozen embedding.

    Args:
        model: the base, quantised or not; changed in place.
        use_gradient_checkpointing: of a quantised base, forget activations in forward and compute them again.
        gradient_checkpointing_kwargs: for `torch.utils.checkpoint`, such as {"use_reentrant": False}.

    Returns:
        The model.

    Raises:
        AdapterStateError: the model carries adapters, which this would freeze.
        UnsupportedError: a quantised base knows no gradient checkpointing.
    """
    check_bare(model)
    backends = _backends(model)
    switches = bool(backends) and use_gradient_checkpointing
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the newer name first
    enable = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if switches and enable is None:
        raise UnsupportedError(
            f"{type(model).__name__} knows no gradient checkpointing; pass use_gradient_checkpointing=False"
        )
    widens = all(backend.startswith(_WIDENS) for backend in backends)
    for parameter in model.parameters():
        parameter.requires_grad = False
        if widens and type(parameter) is nn.Parameter and parameter.dtype in _HALVES:
            parameter.data = parameter.data.float()
    if switches and enable is not None:
        options = dict(gradient_checkpointing_kwargs or {})
        if options.get("use_reentrant", True):
            _let_inputs_require_grad(model)
        enable(options or None)
    return model


def _backends(model: nn.Module) -> set[str]:
    """The names of the codecs of all quantised linear layers."""
    layers = [
        module for module in model.modules() if isinstance(module, nn.Linear) or is_quantised_linear(module)
    ]
    codecs = [find_codec(layer) for layer in layers]
    return {codec.name for codec in codecs if codec is not None and codec.on_grid}


def _let_inputs_require_grad(model: nn.Module) -> None:
    known: Any = model
    if hasattr(model, "enable_input_require_grads"):
        known.enable_input_require_grads()
    else:
        known.get_input_embeddings().register_forward_hook(_require_grad)


def _require_grad(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
    output.requires_grad_()
