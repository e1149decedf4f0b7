"""From the declaration of a kernel to NumPy, Numba and CUDA.

`declare` has the class `Kernel`, `equations` parses a declaration, and `body` generates the loop body that `host`
(Numba) and `cuda_source` (CUDA C) share. `cuda` launches kernels on a GPU, `reference` evaluates them in NumPy.
"""
