"""The main job on a real model, offline: train, save, load, merge and unmerge a LoRA classifier."""
