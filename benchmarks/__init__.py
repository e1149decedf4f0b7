"""Benchmarks, each beside its peers and its limit; ``make bench`` runs them."""
