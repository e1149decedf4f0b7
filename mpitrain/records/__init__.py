"""Files of a run: checkpoints and metrics."""
