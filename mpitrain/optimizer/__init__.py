"""``DistributedOptimizer`` and its parts."""
