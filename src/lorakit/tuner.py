"""`LoraModel`: a model with adapters on it, and the operations on them."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from tqdm.auto import tqdm

from lorakit.config import LoraConfig
from lorakit.errors import AdapterStateError, ConfigError
from lorakit.later import Later
from lorakit.penalties import AdapterLosses
from lorakit.putting import put_on

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from lorakit import combiners, surgery, weighted
    from lorakit.init import Misfit
    from lorakit.report import MergeReport
    from lorakit.surgery import AdapterRegistry
    from lorakit.surgery.invocation import Offsets
    from lorakit.weighted import CombineReport
else:
    combiners = Later("lorakit.combiners", globals())
    surgery = Later("lorakit.surgery", globals())
    weighted = Later("lorakit.weighted", globals())


class LoraModel(AdapterLosses, nn.Module):
    """A model whose modules carry LoRA adapters.

    Calling it calls the model; attributes that it does not have itself are the model's.

    Args:
        model: any module without adapters.
        peft_config: the first adapter's config, or a dictionary that holds it under `adapter_name`.
        adapter_name: the first adapter's name.

    Raises:
        ConfigError, UnsupportedError, PlanError, AdapterNameError, AdapterStateError: the model was not touched.
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig | Mapping[str, LoraConfig],
        adapter_name: str = "default",
        *,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__()
        check_bare(model)
        config = peft_config if isinstance(peft_config, LoraConfig) else peft_config[adapter_name]
        self._adopt(put_on(model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype))

    def _adopt(self, registry: AdapterRegistry) -> None:
        self.registry = registry
        self.model = registry.model

    @classmethod
    def of(cls, registry: AdapterRegistry) -> LoraModel:
        """A `LoraModel` around a model that carries adapters already."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._adopt(registry)
        return made

    def forward(
        self,
        *args: Any,
        adapter_names: str | Sequence[str] | None = None,
        alora_offsets: Offsets | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the model.

        Args:
            *args: go to the model.
            adapter_names: one name for each sample of the batch ("__base__" for the base model), or one name for
                the whole call; None takes the active adapters. What other threads call sees nothing of it.
            alora_offsets: for each sample how many tokens at its end an aLoRA adapter acts on, None for none of them;
                by default from the last occurrence of its `alora_invocation_tokens` in the input ids on.
            **kwargs: go to the model.

        Raises:
            AdapterNameError, AdapterStateError, ConfigError, UnsupportedError: the names or the offsets do not fit the
                model or the batch.
        """
        if adapter_names is None and alora_offsets is None and not surgery.invoked(self.registry):
            return self.model(*args, **kwargs)
        with (
            self._choosing(adapter_names),
            surgery.invoking(self.registry, surgery.invoked(self.registry), args, kwargs, alora_offsets),
        ):
            return self.model(*args, **kwargs)

    def generate(
        self,
        *args: Any,
        adapter_names: str | Sequence[str] | None = None,
        alora_offsets: Offsets | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the model's own `generate`.

        `adapter_names` and `alora_offsets` are as in `forward`, one for each prompt; what is generated belongs to
        every aLoRA adapter that acts on the prompt.

        Raises:
            AdapterNameError, AdapterStateError, ConfigError, UnsupportedError: as `forward`; or an aLoRA adapter acts
                and the model is to run several tokens at once (assisted generation, prefilling in chunks).
        """
        generate: Any = self.model.generate
        if adapter_names is None and alora_offsets is None and not surgery.invoked(self.registry):
            return generate(*args, **kwargs)
        with (
            self._choosing(adapter_names, repeats=True),
            surgery.invoking(
                self.registry, surgery.invoked(self.registry), args, kwargs, alora_offsets, adds=True
            ),
        ):
            return generate(*args, **kwargs)

    def _choosing(
        self, names: str | Sequence[str] | None, *, repeats: bool = False
    ) -> AbstractContextManager[None]:
        if names is None:
            return nullcontext()
        if isinstance(names, str):
            return surgery.for_the_call(self.registry, names)
        return surgery.for_each_sample(self.registry, names, repeats=repeats)

    def use_adapter(self, adapter_names: str | Sequence[str]) -> AbstractContextManager[None]:
        """Within this context calls of the model go through these adapters, in this thread or task alone.

        Several names add up; "__base__" or no name stands for the base model. Nothing of the model is changed, so
        threads that share it can use different adapters at the same time.

        Raises:
            AdapterNameError: a name is unknown.
            AdapterStateError: adapters are merged, hold trained biases, or own the same whole module.
        """
        return surgery.for_the_call(self.registry, adapter_names)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet: asking it would ask for it again
                raise
            return getattr(self.model, name)

    # ---- adapters -----------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """The config of each adapter, by name."""
        return self.registry.configs

    @property
    def misfits(self) -> dict[str, dict[str, Misfit]]:
        """By adapter and path: the errors that LoftQ left when it quantised the base, before and after its factors."""
        return self.registry.misfits

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self.registry.active)

    @property
    def active_adapter(self) -> list[str]:
        """The same as `active_adapters`."""
        return self.active_adapters

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones and, unless `inference_mode`, the only trainable parameters.

        The contributions of several active adapters add up. Merged adapters are unmerged first.

        Raises:
            AdapterNameError: a name is unknown.
            AdapterStateError: two of them own a copy of the same module or bias.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self.registry.set_active(names, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set the flag on every floating-point tensor of these adapters, but for embeddings that came with them.

        Raises:
            AdapterNameError: a name is unknown.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.registry.check_known(names)
        for name in names:
            slots = [slot for slot in self.registry.slots.values() if name in slot.adapters]
            untrained = {id(slot.copies[name]) for slot in slots if name not in slot._trainable}
            untrained |= self.registry.frozen(name)
            for item in self.registry.tensors(name):
                if item.state_name and item.tensor.is_floating_point() and id(item.tensor) not in untrained:
                    item.tensor.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off and free its memory. Without any adapter left the model acts as its base.

        Raises:
            AdapterNameError: the name is unknown.
            AdapterStateError: the adapter is merged.
        """
        self.registry.remove(adapter_name)

    def enable_adapter_layers(self) -> None:
        """Let the active adapters act."""
        self.registry.set_enabled(enabled=True)

    def disable_adapter_layers(self) -> None:
        """Let the base model act alone: its output bit for bit, also while adapters are merged."""
        self.registry.set_enabled(enabled=False)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
        *,
        rank: int | None = None,
        energy: float | None = None,
        t: float | None = None,
        epsilon: float | None = None,
        seed: int | None = None,
    ) -> CombineReport:
        """Make a new adapter, not active, out of several: their weighted sum or what a method makes of it.

        The deltas are weighted by `weights`, whatever ranks, patterns and scalings the adapters have. Whole modules,
        trained biases and token rows are combined as what they change. The factors are never multiplied out unless
        the method is defined on elements of the delta.

        Args:
            adapters: names of those to combine.
            weights: a finite number for each; negative ones subtract.
            adapter_name: a free name.
            combination_type: "sum" (exact; reduced with `rank` or `energy`), "cat" (exact, ranks add up), "svd" (the
                best of its rank), "linear" (A's and B's are added apart: NOT the sum of the deltas), "ties", "ties_svd",
                "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd", "magnitude_prune",
                "magnitude_prune_svd", "della", "sce", "slerp".
            svd_rank: rank of the result of methods that end in an SVD; default the largest of the adapters.
            svd_clamp: quantile at which entries of the result are cut.
            svd_full_matrices: accepted; it has no effect on the result.
            svd_driver: of `torch.linalg.svd`, on CUDA.
            density: share of the elements that pruning methods keep, in [0, 1].
            majority_sign_method: how signs are elected, by "total" or "frequency".
            rank: the same as `svd_rank`, also for "sum" and "slerp".
            energy: keep the fewest ranks that hold this share of the energy.
            t: where between two adapters "slerp" goes, in [0, 1].
            epsilon: spread of the keep probabilities of "della".
            seed: of random pruning; default torch's generator.

        Returns:
            For each weight the share of the energy that the result keeps, and its rank.

        Raises:
            AdapterNameError, ConfigError, UnsupportedError, NonFiniteError: nothing was changed.
        """
        if rank is not None and svd_rank is not None and rank != svd_rank:
            raise ConfigError(f"rank={rank} and svd_rank={svd_rank} say different things; pass one of them")
        options = combiners.CombineOptions(
            density=density,
            majority_sign_method=majority_sign_method,
            rank=svd_rank if rank is None else rank,
            svd_clamp=svd_clamp,
            svd_full_matrices=svd_full_matrices,
            svd_driver=svd_driver,
            seed=seed,
            energy=energy,
            t=t,
            epsilon=epsilon,
        )
        return weighted.add_weighted(
            self.registry, adapters, weights, adapter_name, combination_type, options
        )

    # ---- merging ------------------------------------------------------------------------------------

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,  # noqa: ARG002 - the signature users know
        *,
        force: bool = False,
        dequantize: bool = False,
    ) -> MergeReport:
        """Add the deltas of these adapters (default: the active ones) to the base weights.

        Each weight is accumulated in fp32 and rounded once. Either every layer is merged or none. The original
        weights are kept for `unmerge_adapter`; non-finite results are always refused (`safe_merge` or not).

        A quantised weight is quantised again with its own settings, which loses a part of a small delta, or all of it.

        Args:
            adapter_names: default the active ones.
            safe_merge: accepted; merges are always safe.
            force: accept whatever quantising again loses.
            dequantize: give the layers with quantised weights a weight in full precision instead, in the dtype of the
                base's first floating-point parameter. `unmerge_adapter` brings the quantised layers back.

        Returns:
            What quantising again lost, layer by layer; also kept as `merge_report`.

        Raises:
            LossyMergeError: a layer would lose more than 10 % of the adapters' effect; nothing was changed.
            AdapterNameError, UnsupportedError, NonFiniteError: nothing was changed.
        """
        return self.registry.merge(adapter_names, force=force, dequantize=dequantize)

    def unmerge_adapter(self) -> None:
        """Put the original weights back, the same bits as before the first merge."""
        self.registry.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,  # noqa: ARG002
        adapter_names: Sequence[str] | None = None,
        *,
        force: bool = False,
        dequantize: bool = False,
    ) -> nn.Module:
        """Merge adapters (default: the active ones) for good and give the plain model back.

        No original weights are kept: each weight takes the sum where it lies, or is exchanged if another tensor, module
        or process would see that. What quantising again lost is in `merge_report` afterwards; `force` and `dequantize`
        are as for `merge_adapter`.

        Raises:
            LossyMergeError: a layer would lose more than 10 % of the adapters' effect; nothing was changed.
            AdapterNameError, AdapterStateError, UnsupportedError, NonFiniteError: nothing was changed.
        """
        layers = len(self.registry.layers)
        progress = partial(tqdm, desc="merging", total=layers, unit="layer", disable=not progressbar)
        return surgery.merge_and_unload(
            self.registry, adapter_names, progress=progress, force=force, dequantize=dequantize
        )

    @property
    def merge_report(self) -> MergeReport | None:
        """What the last merge lost by quantising weights again; None before the first."""
        return self.registry.merge_report

    def unload(self) -> nn.Module:
        """Take every adapter off and give the base model back, weights and `requires_grad` flags as before."""
        return surgery.unload(self.registry)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.load_state_dict`; refused while adapters are merged.

        Raises:
            AdapterStateError: adapters are merged.
        """
        self.registry.check_unmerged("load_state_dict()")
        return super().load_state_dict(*args, **kwargs)


def check_bare(model: nn.Module) -> None:
    """Refuse a model that carries adapters already.

    Raises:
        AdapterStateError: it does.
    """
    inner = model._modules.get("base_model") or model
    registry = surgery.find_registry(inner.model if isinstance(inner, LoraModel) else model)
    if registry is not None and registry.configs:
        raise AdapterStateError(
            f"this model carries the adapters {list(registry.configs)} already; "
            "use add_adapter() or load_adapter() to add another, or unload() to begin afresh"
        )
