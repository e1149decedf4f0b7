"""Graphs of ranks, mixing matrices and partitions: pure functions of integers."""
