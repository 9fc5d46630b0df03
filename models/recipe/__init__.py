"""The recipe of the default model: what it learns from, and how that is laid out for training."""
