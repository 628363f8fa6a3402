"""A run as a SLURM job: its batch script, the nodes that it gets, and what follows from its end.

The script (job.sh) holds every call to SLURM; these modules decide, from files in the run
directory, and call nothing of SLURM's: they may run in a container that does not have it.
"""
