"""Probes of MPI: each operation with each kind of memory, tried in child processes."""
