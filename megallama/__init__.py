"""megallama: pretrains LLaMA models with a hand-written backward pass."""

__version__ = "0.1.0"
