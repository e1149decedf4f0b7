"""Files of a run: checkpoints and metrics."""

KEEP = 2
"""The number of checkpoints that a run keeps unless told otherwise."""
