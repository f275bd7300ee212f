"""Floor 6: adapters that begin from data. The model is run on it once, and left as it was."""

from lorakit.calibration.corda import preprocess_corda
from lorakit.calibration.eva import get_eva_state_dict
from lorakit.calibration.eva_weights import initialize_lora_eva_weights
from lorakit.calibration.lora_ga import preprocess_loraga

__all__ = ["get_eva_state_dict", "initialize_lora_eva_weights", "preprocess_corda", "preprocess_loraga"]
