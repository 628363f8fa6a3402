"""LLaMA put together: the passes of a whole micro-batch, and the initial weights."""
