"""Methods whose workers wait for each other: all-reduce, local SGD and outer optimizers."""
