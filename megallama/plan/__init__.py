"""What a run will need and how long it will take, from its config and a description of the machine.

Imports `config` and `spec` alone: no torch.
"""
