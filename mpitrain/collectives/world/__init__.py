"""The ranks of a run: start-up, nodes, devices, fault tolerance and progress."""
