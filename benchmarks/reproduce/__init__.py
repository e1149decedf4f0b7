"""Published results, reproduced in simulated worlds."""
