"""Damage to every file that a run reads: none of it may be taken for the file."""
