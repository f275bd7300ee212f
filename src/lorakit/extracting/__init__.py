"""A full fine-tune as an adapter: what two checkpoints differ in, weight by weight, in factors."""
