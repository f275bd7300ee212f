"""Merging adapters into a checkpoint on disk, tensor by tensor, without any model."""
