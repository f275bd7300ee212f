"""Other weights in the place of a loaded adapter's: the same parameters, so compiled graphs and optimisers stay valid.

A swap checks all that a load checks before it writes anything, and takes back what it wrote if it is interrupted. The
model is not walked while the new adapter targets what the old one did: the cost is that of reading the file.

Rank, alpha, rsLoRA and dropout may differ. A smaller rank leaves zeros in the parameters, whose shape stays; a larger
one gets larger parameters, or on a compiled model the room that `prepare_model_for_compiled_hotswap` made. Layers that
only the old adapter has are set to zero; those that only the new one has are refused. Whole modules, trained biases and
token rows must be the same ones. What is saved afterwards is the new adapter, without the zeros (see `padding`).
"""

from lorakit.hotswap.room import prepare_model_for_compiled_hotswap
from lorakit.hotswap.swap import hotswap_adapter

__all__ = ["hotswap_adapter", "prepare_model_for_compiled_hotswap"]
