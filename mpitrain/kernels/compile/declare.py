"""`Kernel`: arithmetic declared once, as its paper writes it, and run where the arrays live.

See docs/architecture.md, "Kernels". The equations become a NumPy evaluation (`reference`), a Numba loop (`host`) and a
CUDA kernel (`cuda`); none contracts or reassociates, so all three give the same bits, NaN payloads excepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn, cast

import numpy as np

from mpitrain.kernels.compile import cuda, cuda_source, host, reference
from mpitrain.kernels.compile.equations import parse
from mpitrain.kernels.compile.storage import STORAGES, Storage, storage_of, storages_of
from mpitrain.kernels.gpu import is_device

# numpy.ndarray.flags.num: C contiguous, aligned; and writeable for what is assigned. One look instead of three.
READABLE: Final = 0x0001 | 0x0100
WRITEABLE: Final = READABLE | 0x0400
_UINT16: Final = np.dtype(np.uint16)


class Kernel:
    """One fused pass over a few vectors of the same length.

    Args:
        name: a Python name; the compiled functions bear it.
        equations: assignments, one a line, of ``+ - * /``, numbers, arrays, scalars and temporaries. Arrays that are
            assigned are changed in place; other assigned names live in registers.
        arrays: names of the arrays, separated by spaces, in the order in which a call takes them.
        scalars: names of the scalars, likewise.
        guard: an assigned name that is replaced by zero where it is infinite or NaN; a call counts how often.
        source: where the equations come from.
        doc: one line that says what the kernel is for.

    Raises:
        ValueError: what is wrong with the declaration.

    Example:
        >>> scale = Kernel("scale", "x = a * x", arrays="x", scalars="a", source="BLAS scal")
        >>> scale(np.ones(3), a=2.0)
        0
    """

    def __init__(
        self,
        name: str,
        equations: str,
        *,
        arrays: str,
        scalars: str = "",
        guard: str | None = None,
        source: str,
        doc: str = "",
    ) -> None:
        if not name.isidentifier():
            raise ValueError(f"{name!r} is not a name that a function can have")
        try:
            self.equations = parse(equations, arrays, scalars, guard)
        except ValueError as error:
            raise ValueError(f"kernel {name}: {error}") from None
        self.name = name
        self.source = source
        self.doc = doc
        self._n_arrays = len(self.equations.arrays)
        self._n_operands = self._n_arrays + len(self.equations.scalars)
        self._flags = tuple(WRITEABLE if a in self.equations.stored else READABLE for a in self.equations.arrays)
        self._entries: dict[tuple[np.dtype, ...], tuple[Callable[..., int], bool]] = {}
        text = "\n    ".join(line.strip() for line in equations.strip().splitlines())
        self.__doc__ = (
            f"{doc or name}\n\n    {text}\n\nSource: {source}.\n"
            f"Moves {self.bytes_per_element('float32')} bytes per float32 element: "
            f"{len(self.equations.loaded)} read, {len(self.equations.stored)} written."
        )

    def prepare(self, like: Any) -> None:
        """Compile for arrays of the dtype of ``like`` (n,), so that the first call is no slower than the others."""
        if is_device(like):
            cuda.prepare(self.name, self.equations, like)
            return
        self(*[like[:0].copy() for _ in self.equations.arrays], *[0.0 for _ in self.equations.scalars])

    def __call__(self, *operands: Any, **scalars: float) -> int:
        """Runs the kernel in place on NumPy arrays, or on CuPy arrays of one GPU, on CuPy's current stream.

        Args:
            *operands: the arrays in declared order: 1-D, contiguous, of one length; float16, bfloat16, float32 or
                float64, also mixed. Then the scalars, or some of them, in declared order.
            **scalars: the other scalars by name.

        Returns:
            The number of elements that the guard replaced, 0 without a guard. On a GPU the kernel has only been
            started, and a guarded one returns a `NonfiniteCount`: it adds up like an int without waiting, and waits
            for the GPU when its value is needed (``int()``, truth value, comparison).

        Raises:
            ValueError: the operands do not fit the declaration.
        """
        if scalars:
            operands = self._bind(operands, scalars)
        elif len(operands) != self._n_operands:
            self._bind(operands, scalars)
        # What follows runs at every exchange: it costs about a microsecond, and the explanations are elsewhere.
        arrays = operands[: self._n_arrays]
        shape = getattr(arrays[0], "shape", None)
        for array, flags in zip(arrays, self._flags, strict=True):
            if type(array) is not np.ndarray or array.flags.num & flags != flags or array.shape != shape:
                return self._elsewhere(arrays, operands[self._n_arrays :])
        if len(shape) != 1:  # type: ignore[arg-type]
            self._refuse(arrays)
        entry = self._entries.get(tuple([array.dtype for array in arrays]))
        function, has_halves = entry or self._compile(arrays)
        if has_halves:
            operands = (*as_bits(arrays), *operands[self._n_arrays :])
        return function(*operands)

    def reference(self, *operands: Any, **scalars: float) -> int:
        """The same as a call, evaluated by NumPy, an operator at a time: the oracle of the compiled back-ends."""
        operands = self._bind(operands, scalars)
        return reference.evaluate(self.equations, operands[: self._n_arrays], operands[self._n_arrays :])

    def bytes_per_element(self, dtype: Any) -> int:
        """Bytes that one element moves: each array once if its old value is read and once if it is written.

        Args:
            dtype: of all arrays, or a tuple with one for each.
        """
        equations = self.equations
        itemsize = dict(zip(equations.arrays, storages_of(dtype, self._n_arrays), strict=True))
        return sum(itemsize[name].itemsize for name in equations.loaded + equations.stored)

    def host_source(self, dtypes: Any) -> str:
        """The Python source that Numba compiles, for one dtype or a tuple with one for each array."""
        return host.source(self.name, self.equations, storages_of(dtypes, self._n_arrays))

    def cuda_source(self, dtypes: Any) -> str:
        """The CUDA C that CuPy compiles, self-contained, for one dtype or a tuple with one for each array."""
        return cuda_source.source(self.name, self.equations, storages_of(dtypes, self._n_arrays))

    def __repr__(self) -> str:
        return f"Kernel {self.name}({', '.join(self.equations.arrays)}; {', '.join(self.equations.scalars)})"

    def _bind(self, operands: Sequence[Any], scalars: dict[str, float]) -> tuple[Any, ...]:
        """The operands with the scalars given by name put in their places."""
        n_given = len(operands)
        if n_given >= self._n_arrays and n_given + len(scalars) == self._n_operands:
            try:
                return (*operands, *[scalars[name] for name in self.equations.scalars[n_given - self._n_arrays :]])
            except KeyError:
                pass
        given = f"{n_given} by position" + (f" and {', '.join(scalars)}" if scalars else "")
        raise ValueError(f"{self!r} takes {self._n_arrays} arrays, then these scalars; it was given {given}")

    def _compile(self, arrays: Sequence[np.ndarray]) -> tuple[Callable[..., int], bool]:
        storages: list[Storage] = []
        for name, array in zip(self.equations.arrays, arrays, strict=True):
            try:
                storages.append(storage_of(array.dtype))
            except ValueError as error:
                raise ValueError(f"{self.name}: {name}: {error}") from None
        entry = (
            host.compiled(self.name, self.equations, storages),
            any(storage.itemsize == 2 for storage in storages),
        )
        self._entries[tuple([array.dtype for array in arrays])] = entry
        return entry

    def _elsewhere(self, arrays: Sequence[Any], scalars: Sequence[float]) -> int:
        """Arrays that are not plain, valid NumPy arrays: subclasses such as memmap, CuPy's, and mistakes."""
        if is_device(arrays[0]):
            # A NonfiniteCount is no int, but supports what callers do with one.
            return cast(int, cuda.run(self.name, self.equations, arrays, scalars))
        if not all(isinstance(array, np.ndarray) for array in arrays) or all(type(a) is np.ndarray for a in arrays):
            self._refuse(arrays)
        return self(*[np.asarray(array) for array in arrays], *scalars)

    def _refuse(self, arrays: Sequence[Any]) -> NoReturn:
        shape = getattr(arrays[0], "shape", None)
        for name, array, flags in zip(self.equations.arrays, arrays, self._flags, strict=True):
            start = f"{self.name}: {name}"
            if not isinstance(array, np.ndarray):
                raise ValueError(f"{start} is a {type(array).__name__}; pass NumPy arrays only or CuPy arrays only")
            if array.ndim != 1:
                raise ValueError(f"{start} has shape {array.shape}; pass a vector, array.reshape(-1) makes one")
            if array.shape != shape:
                raise ValueError(f"{start} has {array.size} elements, the first array {shape}; lengths must agree")
            if array.dtype.name not in STORAGES:
                storage_of(array.dtype)
            if array.flags.num & flags & READABLE != READABLE:
                raise ValueError(f"{start} is strided or unaligned; pass a contiguous array (numpy.ascontiguousarray)")
            if array.flags.num & flags != flags:
                raise ValueError(f"{start} is read-only, and the kernel assigns to it")
        raise AssertionError(f"{self.name}: refused for no reason")


def as_bits(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [array.view(_UINT16) if array.itemsize == 2 else array for array in arrays]
