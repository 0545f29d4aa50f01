"""Models: the decoder stack, how checkpoints become one, tokenizers, and the catalog of names."""
