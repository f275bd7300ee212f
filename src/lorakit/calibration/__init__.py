"""Floor 6: adapters that begin from data. The model is run on it once, and left as it was."""

from lorakit.calibration.eva import get_eva_state_dict
from lorakit.calibration.eva_weights import initialize_lora_eva_weights

__all__ = ["get_eva_state_dict", "initialize_lora_eva_weights"]
