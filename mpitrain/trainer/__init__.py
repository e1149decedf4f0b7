"""The training loop behind ``mpitrain train`` and the benchmark harness: ``loop.train(TrainConfig(...), world)``.

Importing this package imports nothing; ``options``, ``config`` and ``plan`` work without torch and MPI.
"""
