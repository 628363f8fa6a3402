"""The dry run: every distinct rank of a job takes a training step, without GPUs or peers."""
