"""The CUDA back-end: generated CUDA C in a CuPy RawKernel for each kernel and combination of dtypes.

A thread works on packs: as many elements as fill 16 bytes of the narrowest array, loaded and stored 16 bytes at a time,
the most that one instruction moves. The elements in front of the first whole pack and behind the last one are done one
by one. So is all of a call whose arrays do not reach a multiple of 16 bytes at the same element: slices of vectors at
equal offsets do. Everything is one pass and one launch.

Sharp bits:

- ``--fmad=false``: nvcc would contract ``x - a*d`` to one fused multiply-add, whose result differs from the host's in
  the last bit. The loops are bound by memory, so nothing is lost.
- 16-bit arrays are taken as unsigned short and converted by inline PTX or bit operations, because CUDA's own half types
  need headers that NVRTC wheels lack, and so that what CuPy makes of bfloat16 does not matter.
- The same array may be given twice: no pointer is declared ``__restrict__``, and a thread loads all of a pack before it
  stores. Arrays that overlap in another way are not supported.
- A guarded kernel waits for nothing: what it returns is a `Rejected`, which waits when it is read.

No other module of the kernels but `gpu` imports cupy, and only for arrays that are not NumPy's. `source` needs neither
CuPy nor a GPU: NVRTC compiles it anywhere.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

import numpy as np

from mpitrain.kernels.compile.body import body
from mpitrain.kernels.compile.equations import Equations
from mpitrain.kernels.compile.storage import Storage, compute_type, storage_of
from mpitrain.kernels.gpu import Gpu, current

OPTIONS: Final = ("--fmad=false",)
CASTS: Final = {"float32": "float", "float64": "double"}

THREADS: Final = 128  # of a block
BLOCKS_PER_MULTIPROCESSOR: Final = 64  # four times what the multiprocessors of the A100 and H200 hold at once
LOADED_AT_ONCE: Final = 32  # bytes a thread asks for before it waits: 64 KiB on a full multiprocessor
N_COUNTERS: Final = 64

Launch = Callable[[Sequence[Any], Sequence[float], int, Any], None]
"""``launch(arrays, scalars, size, counter)``; the (1,) uint64 counter is None for a kernel without a guard."""

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
    """Elements of a pack: 16 bytes of the narrowest array, a multiple of that of the others."""
    return 16 // min(storage.itemsize for storage in storages)


def packs_at_once(equations: Equations, storages: Sequence[Storage]) -> int:
    """Packs that a thread loads before it stores one: 2 where one of them would not keep the memory busy."""
    stored_as = dict(zip(equations.arrays, storages, strict=True))
    loaded = pack_length(storages) * sum(stored_as[array].itemsize for array in equations.loaded)
    return 2 if 0 < loaded < LOADED_AT_ONCE else 1


def source(name: str, equations: Equations, storages: Sequence[Storage]) -> str:
    """A self-contained ``extern "C" __global__`` function around the very same loop body.

    Names that come from the equations end in ``_at`` or ``_in`` outside the function of one element, so that they
    cannot meet those of the kernel.
    """
    parameters = [
        f"{'' if array in equations.stored else 'const '}{storage.c}* {array}_at"
        for array, storage in zip(equations.arrays, storages, strict=True)
    ]
    parameters += [f"{CASTS[compute_type(storages)]} {scalar}_in" for scalar in equations.scalars]
    texts = [text(name, equations, storages, ", ".join(parameters)) for text in (_element, _packs, _kernel)]
    return PREAMBLE + "".join(texts)


def _element(name: str, equations: Equations, storages: Sequence[Storage], parameters: str) -> str:
    """Computes element ``i``; returns how many the guard has replaced, 0 or 1."""
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
    """Computes N packs, `stride` apart, and loads all of them before it stores the first."""
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
    """Goes through the packs, a grid at a time, and then through what lies in front of them and behind."""
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


@functools.cache
def launcher(name: str, equations: Equations, storages: tuple[Storage, ...]) -> Launch:
    """What launches the kernel on CuPy's current stream; CuPy compiles it at the first launch and caches it on disk."""
    import cupy

    kernel = cupy.RawKernel(source(name, equations, storages), name, options=OPTIONS, backend="nvrtc")
    device_in_use = cupy.cuda.runtime.getDevice
    real = np.float32 if compute_type(storages) == "float32" else np.float64
    elements_per_block = THREADS * pack_length(storages) * packs_at_once(equations, storages)
    block = (THREADS,)

    @functools.cache
    def most_blocks(device: int) -> int:
        return BLOCKS_PER_MULTIPROCESSOR * int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])

    def launch(arrays: Sequence[Any], scalars: Sequence[float], size: int, counter: Any) -> None:
        # RawKernel takes what it is given: the bytes of each argument must be those of the parameter's type.
        arguments = (*arrays, *map(real, scalars), *(() if counter is None else (counter,)), np.int64(size))
        device = arrays[0].data.device_id
        if counter is not None and counter.data.device_id != device:
            raise ValueError(f"{name}: the arrays are on GPU {device}, and this process counts on another; it uses one")
        grid = (min(max(-(-size // elements_per_block), 1), most_blocks(device)),)
        if device == device_in_use():
            kernel(grid, block, arguments)
            return
        # A kernel must not run where its arrays are not.
        with cupy.cuda.Device(device):
            kernel(grid, block, arguments)
            if counter is not None:
                # The mark that `run` makes is of the device in use.
                cupy.cuda.get_current_stream().synchronize()

    return launch


def run(name: str, equations: Equations, arrays: Sequence[Any], scalars: Sequence[float]) -> int | NonfiniteCount:
    """Runs the kernel on device arrays, on the current stream; see `Kernel.__call__`."""
    # Also where there is nothing to do: an empty call before the first one that counts is one that compiles.
    return _begin(_launch_for(name, equations, arrays), equations, arrays, scalars, arrays[0].size)


def prepare(name: str, equations: Equations, like: Any) -> None:
    """Compiles the kernel for device arrays of the dtype of ``like`` (n,), by a launch that has nothing to do."""
    arrays = [like[:0]] * len(equations.arrays)
    _begin(_launch_for(name, equations, arrays), equations, arrays, [0.0] * len(equations.scalars), 0)


def _begin(
    launch: Launch, equations: Equations, arrays: Sequence[Any], scalars: Sequence[float], size: int
) -> int | NonfiniteCount:
    if equations.guard is None:
        launch(arrays, scalars, size, None)
        return 0
    counters = _counters_of_thread()
    launch(arrays, scalars, size, counters.next())
    return counters.launched()


# The launches by the dtypes of the arrays: to hash equations and storages takes longer than all the rest. The equations
# are kept, so that their id stays theirs. The launcher is part of the key because tests replace it.
_launches: dict[tuple[Any, ...], tuple[Launch, Equations]] = {}


def _launch_for(name: str, equations: Equations, arrays: Sequence[Any]) -> Launch:
    shape, kind = arrays[0].shape, type(arrays[0])
    if len(shape) != 1 or not _is_of_cupy(kind):
        _refuse(name, equations, arrays)
    for array in arrays:
        of_cupy = type(array) is kind or _is_of_cupy(type(array))
        if not of_cupy or array.shape != shape or not array.flags.c_contiguous:
            _refuse(name, equations, arrays)
    key = (launcher, id(equations), *[array.dtype for array in arrays])
    found = _launches.get(key)
    if found is None:
        storages = _storages(name, equations, arrays)
        found = _launches[key] = (launcher(name, equations, storages), equations)
    return found[0]


def _storages(name: str, equations: Equations, arrays: Sequence[Any]) -> tuple[Storage, ...]:
    storages: list[Storage] = []
    for label, array in zip(equations.arrays, arrays, strict=True):
        try:
            storages.append(storage_of(array.dtype))
        except ValueError as error:
            raise ValueError(f"{name}: {label}: {error}") from None
    return tuple(storages)


def _is_of_cupy(kind: type) -> bool:
    # Torch's tensors speak the interface too, those of the host among them.
    return hasattr(kind, "__cuda_array_interface__") and hasattr(kind, "flags")


def _refuse(name: str, equations: Equations, arrays: Sequence[Any]) -> NoReturn:
    for label, array in zip(equations.arrays, arrays, strict=True):
        if not _is_of_cupy(type(array)):
            raise ValueError(
                f"{name}: {label} is a {type(array).__name__}; pass NumPy arrays only or CuPy arrays only "
                "(cupy.from_dlpack shares the memory of a tensor)"
            )
        if array.ndim != 1 or array.shape != arrays[0].shape or not array.flags.c_contiguous:
            raise ValueError(
                f"{name}: {label} has shape {array.shape}; arrays must be 1-D, contiguous and of one length"
            )
    raise AssertionError(f"{name}: refused for no reason")


class NonfiniteCount:
    """How many elements guards have replaced: an int that is known when the GPU has come so far.

    Sums of it with ints and with its like wait for nothing. ``int(n_nonfinite)``, its truth, a comparison and printing
    wait on the host, until this thread's guarded launches so far are done (those of the thread that made the launches,
    where it is another); afterwards the number is known and nothing is waited for.
    """

    __slots__ = ("_known", "_launches")

    def __init__(self, known: int, launches: tuple[_Launched, ...]) -> None:
        if len(launches) > N_COUNTERS:
            # As many launches are not counted yet, at most, of each thread: sums do not grow without end.
            counted = [launch.n_nonfinite for launch in launches]
            known += sum(n for n in counted if n is not None)
            launches = tuple([launch for launch, n in zip(launches, counted, strict=True) if n is None])
        self._known, self._launches = known, launches

    def __int__(self) -> int:
        return self._known + sum(launch.counted() for launch in self._launches)

    __index__ = __int__

    def __bool__(self) -> bool:
        return int(self) != 0

    def __add__(self, other: object) -> NonfiniteCount:
        if isinstance(other, NonfiniteCount):
            return NonfiniteCount(self._known + other._known, self._launches + other._launches)
        if isinstance(other, int | np.integer):
            return NonfiniteCount(self._known + int(other), self._launches)
        return NotImplemented

    __radd__ = __add__

    def __eq__(self, other: object) -> bool:
        return int(self) == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return str(int(self))


class _Launched:
    """A launch of a guarded kernel."""

    __slots__ = ("counters", "index", "mark", "n_nonfinite")

    def __init__(self, counters: _Counters, index: int, mark: Any) -> None:
        self.counters, self.index, self.mark = counters, index, mark
        self.n_nonfinite: int | None = None

    def counted(self) -> int:
        if self.n_nonfinite is None:
            self.counters.count(self.counters.uncounted())
        assert self.n_nonfinite is not None
        return self.n_nonfinite


class _Counters:
    """Counters in device memory, for the launches of one thread.

    They are never reset: a launch has a counter to itself until it is counted, and its number is by how much the
    counter has grown. So nothing is begun on the stream but the kernel, streams may be changed between launches, and
    a counter is copied to the host behind its kernel. When none is left, the older half is waited for.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._there, self._here = gpu.zeros(N_COUNTERS, np.uint64), gpu.page_locked(N_COUNTERS, np.uint64)
        self._each = [self._there[k : k + 1] for k in range(N_COUNTERS)]
        self._totals = [0] * N_COUNTERS
        self._free = deque(range(N_COUNTERS))  # the thread takes from the left, whoever counts appends
        self._uncounted: list[_Launched] = []
        self._lock = threading.Lock()

    def next(self) -> Any:
        """(1,) the counter of the next launch."""
        if not self._free:
            self.count(self.uncounted()[: N_COUNTERS // 2])
        return self._each[self._free[0]]

    def launched(self) -> NonfiniteCount:
        """What the launch with that counter will have rejected."""
        index = self._free.popleft()
        self.gpu.copy(self._here[index : index + 1], self._each[index])
        launch = _Launched(self, index, self.gpu.mark())
        with self._lock:
            self._uncounted.append(launch)
        return NonfiniteCount(0, (launch,))

    def uncounted(self) -> list[_Launched]:
        with self._lock:
            return list(self._uncounted)

    def count(self, launches: Sequence[_Launched]) -> None:
        """Wait for launches, and count what they have rejected."""
        for launch in launches:
            self.gpu.wait_for(launch.mark)
        with self._lock:
            launches = [
                launch for launch in launches if launch.n_nonfinite is None
            ]  # another thread may have been here
            for launch in launches:
                before, total = self._totals[launch.index], int(self._here[launch.index])
                self._totals[launch.index], launch.n_nonfinite = total, total - before
                self._free.append(launch.index)
            self._uncounted = [launch for launch in self._uncounted if launch.n_nonfinite is None]


_of_thread = threading.local()


def _counters_of_thread() -> _Counters:
    gpu = current()
    counters: _Counters | None = getattr(_of_thread, "counters", None)
    if counters is None or counters.gpu is not gpu:
        counters = _of_thread.counters = _Counters(gpu)
    return counters
