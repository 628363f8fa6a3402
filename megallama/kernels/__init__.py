"""The Python face of csrc/: each op beside its plain-PyTorch reference."""
