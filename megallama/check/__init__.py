"""The dry run: the training step of every distinct rank of a job, without GPUs and without peers."""
