"""Benchmarks between two hosts, emulated by network namespaces."""
