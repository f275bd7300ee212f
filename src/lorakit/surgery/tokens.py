"""Planning `trainable_token_indices`: which rows of which embeddings and heads an adapter replaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorakit.config import NearNames, ends_in
from lorakit.specs import adapter_dtype
from lorakit.surgery.describe import is_read_by_parent

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from lorakit.config import LoraConfig
    from lorakit.surgery.describe import Description, Node
    from lorakit.surgery.ties import Ties


@dataclass(frozen=True, slots=True)
class TokenSpec:
    """The rows of one weight that an adapter replaces.

    Attributes:
        path: of the embedding or the head.
        indices: the tokens, in the order of the rows.
        width: the length of a row.
        dtype: of the rows.
        device: where the weight lives.
        tied_to: path of the module whose rows these are too; None for own ones.
    """

    path: str
    indices: tuple[int, ...]
    width: int
    dtype: torch.dtype
    device: torch.device
    tied_to: str | None = None

    @property
    def parameters(self) -> int:
        """How many parameters the rows hold; none where they are another module's."""
        return 0 if self.tied_to else len(self.indices) * self.width

    @property
    def bytes(self) -> int:
        """How many bytes those take."""
        return self.parameters * self.dtype.itemsize


def token_specs(
    description: Description,
    config: LoraConfig,
    ties: Ties | None,
    whole: Collection[str],
    problems: list[str],
    *,
    widen: bool,
    from_file: bool,
) -> tuple[TokenSpec, ...]:
    """A row for each module whose rows are replaced, tied ones last; what does not fit goes to `problems`.

    Args:
        description: of the model.
        config: with `trainable_token_indices`.
        ties: of the model's embedding.
        whole: paths of modules that are trained whole, or are inside such ones.
        problems: is added to.
        widen: keep rows of a half-precision weight in fp32.
        from_file: whether the config describes rows that exist already.
    """
    asked = _asked(description, config, problems)
    tied = _tied(asked, ties, whole, problems, from_file=from_file)
    for path, embedding in tied.items():
        asked.setdefault(embedding, asked.get(path, ()))
    specs = []
    for path, indices in {**asked, **dict.fromkeys(tied, ())}.items():
        source = tied.get(path)
        node = description.nodes.get(path)
        if path in whole or node is None:
            problems.append(
                f"trainable_token_indices: {path!r} is trained whole (modules_to_save); tokens need it as it is"
            )
            continue
        own = asked[source] if source is not None else indices
        problem = _problem(node, own)
        if problem:
            problems.append(f"trainable_token_indices: {path}: {problem}")
            continue
        weight = node.module.weight
        assert isinstance(weight, torch.Tensor)
        dtype = adapter_dtype(weight.dtype, widen=widen)
        specs.append(TokenSpec(path, own, weight.shape[1], dtype, weight.device, source))
    return tuple(sorted(specs, key=lambda spec: spec.tied_to is not None))


def token_notes(specs: Sequence[TokenSpec], description: Description) -> list[str]:
    """Tokens whose rows no gradient reaches: an embedding gives its padding token none."""
    notes = []
    for spec in specs:
        module = description.nodes[spec.path].module
        padding = getattr(module, "padding_idx", None)
        tied = [description.nodes[other.path].module for other in specs if other.tied_to == spec.path]
        if padding in spec.indices and not any(isinstance(other, nn.Linear) for other in tied):
            notes.append(
                f"{spec.path}: the row of token {padding} gets no gradient, since it is the padding token"
            )
    return notes


def _asked(description: Description, config: LoraConfig, problems: list[str]) -> dict[str, tuple[int, ...]]:
    """The tokens by path, as the config names them."""
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    paths = [path for path in (*description.nodes, *description.saved) if path]
    if not isinstance(wanted, dict):
        named = description.embedding("input")
        path = description.path_of(named)
        if path is None:
            saved = [key for key, wrapper in description.saved.items() if wrapper.original_module is named]
            ends = [key for key in paths if ends_in(key, "embed_tokens")]
            path = next(iter([*saved, *ends]), None)
        if path is None:
            problems.append(
                "trainable_token_indices: this model names no input embedding; pass a dict from module names to tokens"
            )
            return {}
        return {path: tuple(wanted)}
    found: dict[str, tuple[int, ...]] = {}
    for name, indices in wanted.items():
        hits = [path for path in paths if ends_in(path, name)]
        if not hits:
            problems.append(f"trainable_token_indices: {name!r} matches no module" + NearNames(paths)(name))
        found.update(dict.fromkeys(hits, tuple(indices)))
    return found


def _tied(
    asked: Mapping[str, tuple[int, ...]],
    ties: Ties | None,
    whole: Collection[str],
    problems: list[str],
    *,
    from_file: bool,
) -> dict[str, str]:
    """The modules that use the rows of the embedding that they are tied to, with its path; first those asked for."""
    if ties is None:
        return {}
    named = [path for path in ties.paths if path in asked]
    if not named:
        return {}
    if len({asked[path] for path in named}) > 1:
        if ties.ensure:
            problems.append(
                f"trainable_token_indices: {named} are tied and ask for different tokens; ask for the same ones, or "
                "set ensure_weight_tying=False to give each its own"
            )
        return {}
    if ties.source not in asked and (from_file or not ties.ensure):
        return {}  # a file of PEFT's: it ties by way of the embedding alone
    mine = [path for path in ties.others if path in asked or path not in whole]
    return dict.fromkeys(sorted(mine, key=lambda path: path not in asked), ties.source)


def _problem(node: Node, indices: tuple[int, ...]) -> str:
    """Why rows of a module cannot be replaced by themselves, or an empty text."""
    module = node.module
    if not isinstance(module, (nn.Embedding, nn.Linear)) or is_read_by_parent(module):
        return f"{type(module).__name__} has no rows of tokens; name an embedding or a linear head"
    codec = node.codec
    if codec is None or codec.on_grid:
        return "its weight is not a plain matrix of floating-point numbers"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "the embedding rescales its rows (max_norm) whenever it is called"
    return _bad_indices(indices, module.weight.shape[0])


def _bad_indices(indices: tuple[int, ...], rows: int) -> str:
    outside = [index for index in indices if index >= rows]
    if outside:
        return f"tokens {outside[:10]} are not among the {rows} rows; resize the embedding first"
    if not indices:
        return "no tokens are named"
    return "a token is named twice" if len(set(indices)) != len(indices) else ""
