"""What disks and machines do to a run: power loss, refusals, damage."""
