"""Modules that are loaded when something of them is first asked for, so that an import costs little.

Type checkers see the module, and whoever imports it writes

    if TYPE_CHECKING:
        from lorakit import saving
    else:
        saving = Later("lorakit.saving", globals())

and then `saving.save_adapters(...)`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Later:
    """Stands for a module in the namespace of another one, until something of it is asked for; then it gives way to it.

    Args:
        module: its full name.
        namespace: of the module that imports it, where its last name is to be.
    """

    __slots__ = ("_module", "_namespace")

    def __init__(self, module: str, namespace: dict[str, Any]) -> None:
        self._module, self._namespace = module, namespace

    def __getattr__(self, name: str) -> Any:
        module = import_module(self._module)
        self._namespace[self._module.rpartition(".")[2]] = module
        return getattr(module, name)
