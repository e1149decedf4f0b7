"""The training loop behind ``mpitrain train`` and the benchmark harness: ``loop.train(TrainConfig(...), world)``.

Importing this package imports nothing: ``config`` is there without torch and MPI.
"""
