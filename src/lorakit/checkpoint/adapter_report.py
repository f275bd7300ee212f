"""What `lorakit.inspect_adapter` finds in an adapter's files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class InspectedLayer:
    """The factors on one weight.

    Attributes:
        path: in the file.
        kind: "linear", "embedding", "convolution", "grouped convolution" or "experts".
        shape: (out, in) of the weight, or of one of the experts.
        blocks: how many pairs of factors: one for each group or expert.
        rank: of the factors.
        scaling: on B A.
        dtype: of A, such as "float32".
        parameters: of A, B and a bias of B.
        norm: the Frobenius norm of the delta; None where a factor is not finite.
        effective_rank: the exponential of the entropy of the singular values as shares of their sum (Roy and Vetterli,
            2007); 0 of a zero delta.
        energy_rank: the fewest ranks that hold 99 % of the squared norm; 0 of a zero delta.
        spectrum: the singular values of the delta, the largest first; of groups and experts the root of the sum of squares
            over them. Empty where a factor is not finite.
        dead: whether the delta is zero, so that the factors do nothing.
        nan, inf: how many numbers of the factors are so.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    blocks: int
    rank: int
    scaling: float
    dtype: str
    parameters: int
    norm: float | None
    effective_rank: float | None
    energy_rank: int | None
    spectrum: tuple[float, ...]
    dead: bool
    nan: int
    inf: int


@dataclass(frozen=True)
class InspectedTensor:
    """A tensor that is no factor.

    Attributes:
        name: inside the model.
        kind: what it is, as in `InspectedKind`.
        shape, dtype: its.
        norm: its Frobenius norm; None where it is not finite.
        nan, inf: how many of its numbers are so.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    norm: float | None
    nan: int
    inf: int


@dataclass(frozen=True)
class InspectedKind:
    """All tensors of one kind.

    Attributes:
        kind: "factors", "biases of B", "token rows", "biases", "modules saved whole", "weights of the base" (which PEFT
            writes of adapted embeddings), or the name of a variant.
        tensors, parameters, bytes: how many.
    """

    kind: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class AdapterReport:
    """What `inspect_adapter` found.

    Attributes:
        path: the folder.
        base, revision, task_type, peft_version: what the config says of where the adapter comes from.
        variant: what it is more than plain LoRA, by name; None for plain LoRA.
        config: all its fields.
        metadata: the texts in the header of the weights, without the copy of the config.
        files: size of each file in the folder, in bytes.
        digest: "fits", "does not fit" (the file was damaged or changed) or "none".
        config_state: "as saved"; "the copy in the weights" where `adapter_config.json` is missing or stale; "edited: ..."
            with the fields that were changed after the save; "no copy in the weights" of other writers.
        parameters, bytes: of all tensors.
        dtypes: parameters by dtype.
        kinds: tensors by kind.
        norm: the Frobenius norm of all finite deltas together.
        layers: a row for each weight with factors.
        others: a row for each tensor that is no factor.
        dead: paths of layers whose delta is zero.
        non_finite: paths of layers and names of tensors that hold NaN or infinity.
        problems: what stands in the way of loading it, or of reading a part of it.
        notes: what a user may want to know.
    """

    path: str
    base: str | None
    revision: str | None
    task_type: str | None
    peft_version: str | None
    variant: str | None
    config: dict[str, Any]
    metadata: dict[str, str]
    files: dict[str, int]
    digest: str
    config_state: str
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    kinds: tuple[InspectedKind, ...]
    norm: float
    layers: tuple[InspectedLayer, ...]
    others: tuple[InspectedTensor, ...]
    dead: tuple[str, ...]
    non_finite: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
