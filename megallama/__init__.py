"""megallama: pretrains LLaMA models with 3D parallelism and a hand-written backward pass."""

__version__ = "0.1.0"
