"""What training an adapter will take, told from a model's config before anything is loaded."""
