"""The CUDA back-end: a CuPy ElementwiseKernel for each kernel and combination of dtypes.

Sharp bits:

- ``--fmad=false``: nvcc would contract ``x - a*d`` to one fused multiply-add, whose result differs from the host's in
  the last bit. The loops are bound by memory, so nothing is lost.
- 16-bit arrays are passed as unsigned short and converted by inline PTX or bit operations, because CUDA's own half
  types need headers that NVRTC wheels lack, and so that what CuPy makes of bfloat16 does not matter.
- A guarded kernel counts with an atomic in the rare branch. Reading the count waits for the stream, about ten
  microseconds; a kernel without a guard waits for nothing.

This is the only module of the package that imports cupy, and it does so when the first array arrives that is not
NumPy's. `source` needs neither CuPy nor a GPU: NVRTC compiles it anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final

from .body import body
from .equations import Equations
from .storage import STORAGES, Storage, compute_type

OPTIONS: Final = ("--fmad=false",)
CASTS: Final = {"float32": "float", "float64": "double"}

PREAMBLE: Final = r"""
__device__ __forceinline__ float half_to_float(unsigned short half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}
__device__ __forceinline__ unsigned short float_to_half(float value) {
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
__device__ __forceinline__ float bfloat_to_float(unsigned short bfloat) {
    return __uint_as_float((unsigned int)bfloat << 16);
}
__device__ __forceinline__ unsigned short float_to_bfloat(float value) {
    // By bits: the cvt instruction needs compute capability 8.0.
    const unsigned int bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (unsigned short)(((bits >> 16) & 0x8000u) | 0x7fc0u);
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
"""


def operation(equations: Equations, storages: Sequence[Storage]) -> str:
    """The loop body as a block of CUDA C for element `i`; its scope is its own, so names cannot meet the kernel's."""
    compute = compute_type(storages)
    c_type = CASTS[compute]
    lines = [f"const {c_type} {name} = {name}_in;" for name in equations.scalars]
    for line in body(equations, storages, compute, CASTS):
        lines.append(f"{c_type + ' ' if line.declares else ''}{line.target} = {line.text};")
        if line.guarded:
            d = line.target
            lines.append(f"if ({d} - {d} != 0) {{ {d} = 0; atomicAdd(&rejected_at[0], 1ull); }}")
    return "\n".join(["{", *(f"    {line}" for line in lines), "}"])


def source(name: str, equations: Equations, storages: Sequence[Storage]) -> str:
    """A self-contained ``extern "C" __global__`` function around the very same loop body."""
    compute = CASTS[compute_type(storages)]
    parameters = [
        f"{'' if array in equations.stored else 'const '}{storage.c}* {array}_at"
        for array, storage in zip(equations.arrays, storages, strict=True)
    ]
    parameters += [f"{compute} {name}_in" for name in equations.scalars]
    if equations.guard is not None:
        parameters.append("unsigned long long* rejected_at")
    loop = (
        "for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size_;\n"
        "         i += (long long)gridDim.x * blockDim.x)"
    )
    return (
        f'{PREAMBLE}\nextern "C" __global__ void {name}({", ".join(parameters)}, long long size_) {{\n'
        f"    {loop}\n{operation(equations, storages)}\n}}\n"
    )


def parameters(equations: Equations, storages: Sequence[Storage]) -> tuple[str, str]:
    """The ElementwiseKernel's input and output parameters; arrays are raw, so that the body may say ``x_at[i]``."""
    compute = compute_type(storages)
    numpy_type = {
        array: "uint16" if storage.itemsize == 2 else storage.name
        for array, storage in zip(equations.arrays, storages, strict=True)
    }
    inputs = [f"raw {numpy_type[array]} {array}_at" for array in equations.arrays if array not in equations.stored]
    inputs += [f"{compute} {name}_in" for name in equations.scalars]
    outputs = [f"raw {numpy_type[array]} {array}_at" for array in equations.stored]
    if equations.guard is not None:
        outputs.append("raw uint64 rejected_at")
    return ", ".join(inputs), ", ".join(outputs)


@functools.cache
def elementwise(name: str, equations: Equations, storages: tuple[Storage, ...]) -> Any:
    """The kernel as a cupy.ElementwiseKernel; CuPy compiles it at its first call and caches it on disk."""
    import cupy

    inputs, outputs = parameters(equations, storages)
    return cupy.ElementwiseKernel(
        inputs,
        outputs,
        operation(equations, storages),
        name=name,
        preamble=PREAMBLE,
        no_return=True,
        options=OPTIONS,
    )


def run(name: str, equations: Equations, arrays: Sequence[Any], scalars: Sequence[float]) -> int:
    """Runs the kernel on CuPy arrays, on the current stream; see `Kernel.__call__`."""
    import cupy

    _check(name, equations, arrays, cupy.ndarray)
    storages = tuple(STORAGES[a.dtype.name] for a in arrays)
    given = {
        array: a.view(cupy.uint16) if storage.itemsize == 2 else a
        for array, a, storage in zip(equations.arrays, arrays, storages, strict=True)
    }
    inputs = [given[array] for array in equations.arrays if array not in equations.stored]
    outputs = [given[array] for array in equations.stored]
    size = arrays[0].size
    if size == 0:
        return 0
    # The arrays' device and not the current one: a kernel must not run where its arrays are not.
    with arrays[0].device:
        rejected = None if equations.guard is None else cupy.zeros(1, cupy.uint64)
        if rejected is not None:
            outputs.append(rejected)
        elementwise(name, equations, storages)(*inputs, *map(float, scalars), *outputs, size=size)
        return 0 if rejected is None else int(rejected.get()[0])


def _check(name: str, equations: Equations, arrays: Sequence[Any], ndarray: Any) -> None:
    first = arrays[0]
    for label, a in zip(equations.arrays, arrays, strict=True):
        if not isinstance(a, ndarray):
            raise ValueError(f"{name}: {label} is a {type(a).__name__}; pass NumPy arrays only or CuPy arrays only")
        if a.ndim != 1 or a.shape != first.shape or not a.flags.c_contiguous:
            raise ValueError(f"{name}: {label} has shape {a.shape}; arrays must be 1-D, contiguous and of one length")
        if a.dtype.name not in STORAGES:
            raise ValueError(f"{name}: {label} is {a.dtype}; kernels take {', '.join(STORAGES)}")
