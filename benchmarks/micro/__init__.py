"""Benchmarks of kernels, collectives, one-sided operations and start-up."""
