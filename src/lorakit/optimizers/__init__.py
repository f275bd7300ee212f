"""Floor 6: optimizers that know which tensors of an adapter they train."""

from lorakit.optimizers.lorafa import LoraFAOptimizer, create_lorafa_optimizer
from lorakit.optimizers.loraplus import create_loraplus_optimizer

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer", "create_loraplus_optimizer"]
