"""What follows from a configuration by arithmetic. Nothing here imports torch."""
