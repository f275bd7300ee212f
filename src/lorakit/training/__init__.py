"""Training an adapter from a file of rows to a folder, on transformers' Trainer: `lorakit.train`."""
