"""The training loop behind ``mpitrain train`` and the benchmark harness: ``loop.train(TrainConfig(...), world)``.

Importing this package imports nothing else. The modules ``options``, ``config`` and ``plan`` work without torch and
MPI.
"""
