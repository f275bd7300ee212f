"""Adapter files of other tools: one module a format, all through one neutral form (`neutral`)."""
