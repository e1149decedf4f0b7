"""CUDA C generated from a kernel's equations, for each combination of dtypes.

A thread works on packs. A pack has as many elements as fill 16 bytes of the narrowest array, and is loaded and stored
16 bytes at a time, the most that one instruction moves. Elements before the first whole pack and after the last one are
processed one by one. Whole packs need arrays that reach a multiple of 16 bytes at the same element, as slices of
vectors at equal offsets do; otherwise all elements are processed one by one. Everything is one pass and one launch.

Sharp bits:

- ``--fmad=false``: nvcc would contract ``x - a*d`` to a fused multiply-add, which differs from the host's result in the
  last bit. The loops are memory-bound, so nothing is lost.
- 16-bit arrays are passed as unsigned short and converted by inline PTX or bit operations: CUDA's own half types need
  headers that NVRTC wheels lack. This also makes the code independent of how CuPy represents bfloat16.
- The same array may be given twice: no pointer is declared ``__restrict__``, and a thread loads a whole pack before it
  stores. Arrays that overlap in any other way are not supported.

`source` needs neither CuPy nor a GPU: NVRTC compiles its result anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mpitrain.kernels.compile.body import body
from mpitrain.kernels.compile.equations import Equations
from mpitrain.kernels.compile.storage import Storage, compute_type

OPTIONS: Final = ("--fmad=false",)
CASTS: Final = {"float32": "float", "float64": "double"}

THREADS: Final = 128  # per block
LOADED_AT_ONCE: Final = 32  # bytes a thread requests before it waits: 64 KiB on a full multiprocessor

HALVES: Final = r"""
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
"""

PREAMBLE: Final = (
    HALVES
    + r"""
__device__ __forceinline__ float bfloat_to_float(unsigned short bfloat) {
    return __uint_as_float((unsigned int)bfloat << 16);
}
__device__ __forceinline__ unsigned short float_to_bfloat(float value) {
    // By bits: the cvt instruction needs compute capability 8.0.
    const unsigned int bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (unsigned short)(((bits >> 16) & 0x8000u) | 0x7fc0u);
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
__device__ __forceinline__ unsigned long long address(const void* pointer) {
    return (unsigned long long)pointer;
}
template <typename T, int LENGTH>
struct Pack {
    static const int WORDS = LENGTH * sizeof(T) / 16;
    union {
        uint4 words[WORDS];
        T elements[LENGTH];
    };
    __device__ __forceinline__ void load(const T* first, long long pack) {
        #pragma unroll
        for (int word = 0; word < WORDS; ++word) words[word] = ((const uint4*)first)[pack * WORDS + word];
    }
    __device__ __forceinline__ void store(T* first, long long pack) const {
        #pragma unroll
        for (int word = 0; word < WORDS; ++word) ((uint4*)first)[pack * WORDS + word] = words[word];
    }
};
"""
)


def pack_length(storages: Sequence[Storage]) -> int:
    """Return the number of elements in a pack: 16 bytes of the array with the smallest elements."""
    return 16 // min(storage.itemsize for storage in storages)


def packs_at_once(equations: Equations, storages: Sequence[Storage]) -> int:
    """Return the number of packs that a thread loads before it stores: 2 if one does not use the bandwidth, else 1."""
    stored_as = dict(zip(equations.arrays, storages, strict=True))
    loaded = pack_length(storages) * sum(stored_as[array].itemsize for array in equations.loaded)
    return 2 if 0 < loaded < LOADED_AT_ONCE else 1


def source(name: str, equations: Equations, storages: Sequence[Storage]) -> str:
    """Return CUDA C: a self-contained ``extern "C" __global__`` function around the equations.

    A device function computes the equations for one element; it uses their names as they are. Everywhere else these
    names have a suffix, such as ``_at`` for arrays and ``_in`` for scalars, and cannot collide with generated names.
    """
    parameters = [
        f"{'' if array in equations.stored else 'const '}{storage.c}* {array}_at"
        for array, storage in zip(equations.arrays, storages, strict=True)
    ]
    parameters += [f"{CASTS[compute_type(storages)]} {scalar}_in" for scalar in equations.scalars]
    texts = [text(name, equations, storages, ", ".join(parameters)) for text in (_element, _packs, _kernel)]
    return PREAMBLE + "".join(texts)


def _element(name: str, equations: Equations, storages: Sequence[Storage], parameters: str) -> str:
    """Return the device function that computes element ``i`` and returns how many values the guard replaced, 0 or 1."""
    real = CASTS[compute_type(storages)]
    lines = [f"const {real} {scalar} = {scalar}_in;" for scalar in equations.scalars]
    for line in body(equations, storages, compute_type(storages), CASTS):
        lines.append(f"{real + ' ' if line.declares else ''}{line.target} = {line.text};")
        if line.guarded:
            d = line.target
            lines.append(f"if ({d} - {d} != 0) {{ {d} = 0; n_nonfinite = 1; }}")
    return f"""
__device__ __forceinline__ unsigned int {name}_element({parameters}, long long i) {{
    unsigned int n_nonfinite = 0;
    {_lines(lines, 4)}
    return n_nonfinite;
}}
"""


def _packs(name: str, equations: Equations, storages: Sequence[Storage], parameters: str) -> str:
    """Return the device function that computes N packs, `stride` apart, and loads all before it stores the first."""
    length = pack_length(storages)
    packs = [f"Pack<{s.c}, {length}> {a}_pack[N];" for a, s in zip(equations.arrays, storages, strict=True)]
    loads = [f"{a}_pack[n].load({a}_at, pack + n * stride);" for a in equations.loaded]
    stores = [f"{a}_pack[n].store({a}_at, pack + n * stride);" for a in equations.stored]
    element = f"{name}_element({_arguments(equations, '{}_pack[n].elements')}, i)"
    return f"""
template <int N>
__device__ __forceinline__ unsigned int {name}_packs({parameters}, long long pack, long long stride) {{
    {_lines(packs, 4)}
    unsigned int n_nonfinite = 0;
    #pragma unroll
    for (int n = 0; n < N; ++n) {{
        {_lines(loads, 8)}
    }}
    #pragma unroll
    for (int n = 0; n < N; ++n) {{
        #pragma unroll
        for (int i = 0; i < {length}; ++i) n_nonfinite += {element};
    }}
    #pragma unroll
    for (int n = 0; n < N; ++n) {{
        {_lines(stores, 8)}
    }}
    return n_nonfinite;
}}
"""


def _kernel(name: str, equations: Equations, storages: Sequence[Storage], parameters: str) -> str:
    """Return the kernel: a grid-stride loop over the packs, then one over the elements before and after them."""
    length = pack_length(storages)
    narrowest = min(zip(equations.arrays, storages, strict=True), key=lambda pair: pair[1].itemsize)[0]
    heads_end = " | ".join(f"address({a}_at + head)" for a in equations.arrays)
    behind_head = _arguments(equations, "{}_at + head")
    loops = [
        f"for (; pack + {n - 1} * threads < packs; pack += {n} * threads) "
        f"n_nonfinite += {name}_packs<{n}>({behind_head}, pack, threads);"
        for n in range(packs_at_once(equations, storages), 0, -1)
    ]
    guarded = equations.guard is not None
    counted = ["if (n_nonfinite != 0) atomicAdd(n_nonfinite_at, (unsigned long long)n_nonfinite);"] if guarded else []
    parameters += ", unsigned long long* n_nonfinite_at" if guarded else ""
    return f"""
extern "C" __global__ void __launch_bounds__({THREADS}) {name}({parameters}, long long size) {{
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long threads = (long long)gridDim.x * blockDim.x;
    const long long head = (0 - address({narrowest}_at)) % 16 / sizeof(*{narrowest}_at);
    const bool aligned = ({heads_end}) % 16 == 0;
    const long long packs = aligned && head < size ? (size - head) / {length} : 0;
    unsigned int n_nonfinite = 0;
    long long pack = thread;
    {_lines(loops, 4)}
    for (long long rest = thread; rest < size - packs * {length}; rest += threads)
        n_nonfinite += {name}_element({_arguments(equations, "{}_at")}, rest < head ? rest : rest + packs * {length});
    {_lines(counted, 4)}
}}
"""


def _arguments(equations: Equations, of_array: str) -> str:
    return ", ".join(
        [of_array.format(array) for array in equations.arrays] + [f"{scalar}_in" for scalar in equations.scalars]
    )


def _lines(lines: Sequence[str], n_spaces: int) -> str:
    return f"\n{' ' * n_spaces}".join(lines)
