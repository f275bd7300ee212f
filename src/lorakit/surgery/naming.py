"""What the tensors of an adapter are called, in a file and in the model, and their shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lorakit.specs import FILE_NAMES, TOKEN_ROWS
from lorakit.surgery.paths import joined, located, nested

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from torch import nn

    from lorakit.surgery.plan import Plan


class Names(NamedTuple):
    """Where layers and base parameters are, given which wrappers are counted.

    Several parameters of one module are nested, the last of the module outermost. A file knows only of the wrappers
    that its own adapter needs, a state dict of all.

    Attributes:
        modules: paths of the modules that are wrapped as a whole.
        nested: the path of each parameter's wrapper.
        depths: how many wrappers each module has for its parameters.
    """

    modules: Collection[str]
    nested: Mapping[str, str]
    depths: Mapping[str, int]

    @classmethod
    def of(cls, modules: Collection[str], parameters: Mapping[str, nn.Module]) -> Names:
        """From what is wrapped: paths of modules, and parameters by name with the modules that hold them."""
        owners: dict[str, list[str]] = {}
        for name in parameters:
            path, _, attribute = name.rpartition(".")
            owners.setdefault(path, []).append(attribute)
        counts = {path: len(attributes) for path, attributes in owners.items()}
        found = {}
        for path, attributes in owners.items():
            module = parameters[f"{path}.{attributes[0]}"]
            for depth, attribute in enumerate(outermost_first(module, attributes)):
                found[f"{path}.{attribute}"] = nested(located(path, counts), depth)
        return cls(modules, found, counts)

    def layer(self, path: str) -> str:
        """The path of the wrapper of a module or a parameter."""
        return self.nested.get(path) or located(path, self.depths)

    def parameter(self, name: str) -> str:
        """The name of a base parameter."""
        owner = name.rpartition(".")[0]
        return located(name, {**self.depths, owner: 1} if owner in self.modules else self.depths)


def names_in_file(plan: Plan) -> Names:
    """Where things are in the file of a planned adapter."""
    nodes = plan.description.nodes
    parameters = {
        spec.path: nodes[spec.path.rpartition(".")[0]].module
        for spec in plan.specs
        if spec.kind == "parameter"
    }
    modules = {spec.path for spec in plan.specs} | {spec.path for spec in plan.tokens}
    return Names.of(modules - parameters.keys(), parameters)


def outermost_first(module: nn.Module, attributes: Iterable[str]) -> list[str]:
    """The order in which wrappers of a module's parameters are nested."""
    order = {name: number for number, name in enumerate(module._parameters)}
    return sorted(attributes, key=lambda name: -order[name])


def expected_tensors(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Names in a file, and shapes, of every tensor that the planned adapter consists of.

    Those of tied modules are among them: a file holds them twice.
    """
    expected: dict[str, tuple[int, ...]] = {}
    names = names_in_file(plan)
    for spec in plan.specs:
        where, shapes = names.layer(spec.path), spec.shapes
        for part, name in spec.file_names.items():
            expected[joined(where, name)] = shapes[part]
    for path in plan.modules_to_save:
        for key, tensor in whole_module(plan, path).state_dict().items():
            expected[f"{path}.{key}"] = tuple(tensor.shape)
    for token in plan.tokens:
        if token.tied_to is None:
            expected[f"{token.path}.{TOKEN_ROWS}"] = (len(token.indices), token.width)
    for name in (*plan.biases, *plan.base_weights):
        expected[names.parameter(name)] = tuple(plan.base_parameter(name).shape)
    return expected


class SameAs(NamedTuple):
    """What a tensor of a file must equal, since it is the same parameter of the adapter.

    Attributes:
        path: of the module that shows it, or its own name for a bias.
        source: the name of the other tensor.
        shape: of the tensor itself.
        transposed: whether it is that one transposed.
    """

    path: str
    source: str
    shape: tuple[int, ...]
    transposed: bool = False


def tied_names(plan: Plan) -> dict[str, SameAs]:
    """The tensors of a file that others of it determine, so that it need not have them.

    Beside the second halves of what `expected_tensors` says is there twice, these are tensors that PEFT may write
    twice: rows of tied tokens, and a bias or an embedding that several modules share.
    """
    found: dict[str, SameAs] = {}
    names = names_in_file(plan)
    for spec in plan.specs:
        if spec.tied_to is not None:
            here, there = names.layer(spec.path), names.layer(spec.tied_to)
            own, others = spec.file_names, FILE_NAMES["embedding"]
            crossed = spec.kind != "embedding"  # a head holds the weight the other way round
            for part, other in (("A", "B"), ("B", "A")) if crossed else (("A", "A"), ("B", "B")):
                found[f"{here}.{own[part]}"] = SameAs(
                    spec.path, f"{there}.{others[other]}", spec.shapes[part], crossed
                )
    for path, source in plan.saved_ties.items():
        shape = tuple(whole_module(plan, path).weight.shape)  # type: ignore[arg-type]
        found[f"{path}.weight"] = SameAs(path, f"{source}.weight", shape)
    for token in plan.tokens:
        if token.tied_to is not None:
            rows = (len(token.indices), token.width)
            found[f"{token.path}.{TOKEN_ROWS}"] = SameAs(token.path, f"{token.tied_to}.{TOKEN_ROWS}", rows)
    return found | _other_names(plan, names)


def _other_names(plan: Plan, names: Names) -> dict[str, SameAs]:
    """Of parameters of the base that the adapter replaces."""
    mine = {id(plan.base_parameter(name)): name for name in (*plan.biases, *plan.base_weights)}
    found: dict[str, SameAs] = {}
    for node in plan.description.nodes.values() if mine else ():
        for attribute, parameter in node.module.named_parameters(recurse=False):
            name, first = joined(node.path, attribute), mine.get(id(parameter))
            whole = any(name.startswith(f"{path}.") for path in plan.modules_to_save)
            if first is not None and name not in mine.values() and not whole:
                shape = tuple(parameter.shape)
                found[names.parameter(name)] = SameAs(name, names.parameter(first), shape)
    return found


def whole_module(plan: Plan, path: str) -> nn.Module:
    """The base's module that is trained whole at a path."""
    wrapper = plan.description.saved.get(path)
    return plan.description.nodes[path].module if wrapper is None else wrapper.original_module
