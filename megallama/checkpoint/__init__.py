"""Checkpoints: a directory of safetensors files and a manifest that is written last."""
