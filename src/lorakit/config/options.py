"""The option groups of a `LoraConfig`: plain data, one dataclass each, checked together with the config.

Every group is written to `adapter_config.json` as an object, but for `LoraRuntimeConfig`, which describes the
run and not the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LoftQConfig:
    """LoftQ, an initialiser that fits the factors to the error of quantisation (Li et al., 2023, arXiv:2310.08659).

    Attributes:
        loftq_bits: bits of the quantised weight: 2, 4 or 8.
        loftq_iter: how many alternating steps are taken; at least 1.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class EvaConfig:
    """EVA, an initialiser from the activations' right singular vectors (Paischer et al., 2024, arXiv:2410.07170).

    Attributes:
        rho: a module's rank may grow to `rho * r` when ranks are spread by explained variance; at least 1.
        tau: cosine similarity, in [0, 1], at which a singular vector counts as converged.
        use_label_mask: leave out the positions whose label is `label_mask_value`.
        label_mask_value: the label of the positions to leave out.
        whiten: divide each component by the square root of its singular value.
        adjust_scaling_factors: keep `lora_alpha / r` of a module as it was before its rank changed.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True


@dataclass
class CordaConfig:
    """CorDA, an initialiser oriented by the input's covariance (Yang et al., 2024, arXiv:2406.05223).

    Attributes:
        cache_file: where the decomposition is kept between runs, or None.
        covariance_file: where the covariance matrices are kept between runs, or None.
        corda_method: "ipm" (learn a task faster) or "kpm" (preserve the base's knowledge).
        verbose: print progress.
        use_float16_for_covariance: accumulate the covariance in float16 to save memory.
        prune_temporary_fields: drop the decomposition from the modules when it is no longer needed.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass
class LoraGAConfig:
    """LoRA-GA, an initialiser from the base weight's first gradient (Wang et al., 2024, arXiv:2407.05000).

    Attributes:
        direction: which singular vectors go to A and which to B: "ArBr", "A2rBr", "ArB2r" or "random".
        scale: how the factors are scaled: "stable", "weight_svd", "gd_scale" or "unit".
        stable_gamma: the gamma of the "stable" scale; positive.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16


@dataclass
class KasaConfig:
    """KaSA, a diagonal between the factors and a base without its least singular values (arXiv:2412.06071).

    Attributes:
        beta: weight of the penalty on the diagonal's squares; at least 0.
        gamma: weight of the penalty on factors that are not orthonormal; at least 0.
    """

    beta: float = 1e-4
    gamma: float = 1e-3


@dataclass
class BdLoraConfig:
    """Block-diagonal LoRA, for serving on several devices (Wang et al., 2025, arXiv:2510.23346).

    Attributes:
        target_modules_bd_a: texts; a targeted module whose path holds one of them gets a block-diagonal A.
        target_modules_bd_b: the same for B.
        nblocks: how many blocks; at least 1.
        match_strict: refuse targeted modules that neither list names; otherwise they get plain LoRA.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True


@dataclass
class MontecloraConfig:
    """MonteCLoRA, noise on A whose size is learned (Seth et al., 2024, arXiv:2411.04358).

    Attributes:
        num_samples: how many draws are averaged in a step; from 1 to 65,536.
        use_entropy: add the sum of the squared weights of the draws to the loss.
        dirichlet_prior: concentration of the prior of these weights; positive.
        sample_scaler: factor on the noise.
        kl_loss_weight: weight of the divergence from the priors in the loss.
        buffer_size: accepted; it has no effect, since nothing is drawn in advance. At least 1.
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150


@dataclass
class VeloraConfig:
    """VeLoRA, a projection of the input in place of the input in backward (Miles et al., 2024, arXiv:2405.17991).

    Attributes:
        num_groups: groups that the input's features are split into; one number is kept for each. At least 1.
        scale: factor on the projected input; positive.
        init_type: what is projected on: the mean group of each step's input ("batch_average"), of the first step's
            ("batch_average_once"), or a random direction ("random").
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: str = "batch_average"


@dataclass
class ArrowConfig:
    """Arrow, which routes each token to the adapters that fit it (Ostapenko et al., 2024, arXiv:2405.11157).

    Attributes:
        top_k: how many adapters act on a token; at least 1.
        router_temperature: of the softmax over their similarities to the token; positive.
        use_gks: take the mean of the general adapters off the others (GenKnowSub, arXiv:2505.10939).
        task_adapter_names: the adapters that `create_arrow_model` loaded to choose from.
        gks_adapter_names: the general adapters that it loaded.
        rng_seed: accepted; it has no effect, since nothing is drawn.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None
    rng_seed: int | None = None


@dataclass
class LoraRuntimeConfig:
    """Settings of the run, which are never written to a file.

    Attributes:
        ephemeral_gpu_offload: move the tensors of heavy steps to the GPU for as long as a step takes.
    """

    ephemeral_gpu_offload: bool = False
