"""Adapter files: keys, strict reading, atomic writing, and the hub. Nothing here knows of models."""
