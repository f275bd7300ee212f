"""Floor 3: how the factors of a new adapter begin. Plain functions in a registry."""

from lorakit.init.context import InitContext, InitResult, Misfit
from lorakit.init.registry import INITIALISERS, initialise

__all__ = ["INITIALISERS", "InitContext", "InitResult", "Misfit", "initialise"]
