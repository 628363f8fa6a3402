"""What a label can be besides a token."""

IGNORE = -100  # the label of a token that is not predicted (PyTorch's convention)
