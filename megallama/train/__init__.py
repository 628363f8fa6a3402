"""The training job: what is built, one step, the loop around it, and what it reports."""
