"""The optimizer: AdamW on wide masters, the global gradient norm, the learning-rate schedule."""
