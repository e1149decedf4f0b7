"""Many workers in one process, under a schedule or a virtual clock."""
