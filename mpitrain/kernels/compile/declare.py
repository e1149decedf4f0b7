"""`Kernel`: arithmetic declared once, as its paper writes it, and run where its arrays are.

See docs/architecture.md, "Kernels". The equations become a NumPy evaluation (`reference`), a Numba loop (`host`) and a
CUDA kernel (`cuda`). None of them contracts or reassociates, so all three give the same bits, except in NaN payloads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import numpy as np

from mpitrain.kernels.compile import cuda, cuda_source, host, reference
from mpitrain.kernels.compile.entry import READABLE, entry, flags_of
from mpitrain.kernels.compile.equations import parse
from mpitrain.kernels.compile.storage import storage_of, storages_of
from mpitrain.kernels.gpu import is_device

_UINT16: Final = np.dtype(np.uint16)


class Kernel:
    """One fused pass over a few vectors of the same length.

    Args:
        name: The name of the kernel and of its compiled functions, a Python identifier.
        equations: Assignments, one per line, with ``+ - * /``, numbers, arrays, scalars and temporaries. An assigned
            array is changed in place. Any other assigned name is a temporary, which stays in a register.
        arrays: The names of the arrays, separated by spaces, in the order of a call's arguments.
        scalars: The names of the scalars, in the same form.
        guard: An assigned name whose infinite and NaN elements are replaced by zero. A call returns the number of these
            elements.
        source: The paper, equation or algorithm of the equations.
        doc: A description in one line that starts with a verb.

    Raises:
        ValueError: The declaration is invalid; the message names the mistake.

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
            raise ValueError(f"{name!r} is not a Python identifier")
        try:
            self.equations = parse(equations, arrays, scalars, guard)
        except ValueError as error:
            raise ValueError(f"kernel {name}: {error}") from None
        self.name = name
        self.source = source
        self.doc = doc
        self._n_arrays = len(self.equations.arrays)
        self._n_operands = self._n_arrays + len(self.equations.scalars)
        self._functions: dict[tuple[np.dtype, ...], Callable[..., int]] = {}
        self._entry = entry(self.equations, self._functions, self._otherwise)
        text = "\n    ".join(line.strip() for line in equations.strip().splitlines())
        guarded = f"Guard: {guard} is replaced by 0 where it is not finite, and counted.\n" if guard else ""
        self.__doc__ = (
            f"{doc or name}\n\n    {text}\n\n"
            f"Arrays: {', '.join(self.equations.arrays)}; each (n,) float16, bfloat16, float32 or float64.\n"
            f"Scalars: {', '.join(self.equations.scalars) or 'none'}.\n{guarded}Source: {source}.\n"
            f"Moves {self.bytes_per_element('float32')} bytes per float32 element: "
            f"{len(self.equations.loaded)} read, {len(self.equations.stored)} written."
        )

    def prepare(self, like: Any) -> None:
        """Compile for arrays of the dtype of ``like`` (n,), so that the first call is as fast as later ones."""
        if is_device(like):
            cuda.prepare(self.name, self.equations, like)
            return
        self(*[like[:0].copy() for _ in self.equations.arrays], *[0.0 for _ in self.equations.scalars])

    def __call__(self, *operands: Any, **scalars: float) -> int:
        """Run the kernel in place on NumPy arrays, or on CuPy arrays of one GPU, on CuPy's current stream.

        Args:
            *operands: The arrays in declared order, each (n,) and contiguous, of float16, bfloat16, float32 or
                float64, which may be mixed. Then the scalars, or the first of them, in declared order.
            **scalars: The remaining scalars by name.

        Returns:
            The number of elements that the guard replaced, 0 without a guard. On a GPU the kernel has only been
            started, and a guarded one returns a `NonfiniteCount`: it adds up like an int without waiting, and waits
            for the GPU when its value is needed (``int()``, truth value, comparison).

        Raises:
            ValueError: The operands do not fit the declaration.
        """
        if scalars:
            operands = self._bind(operands, scalars)
        elif len(operands) != self._n_operands:
            self._bind(operands, scalars)
        return self._entry(*operands)

    def reference(self, *operands: Any, **scalars: float) -> int:
        """Evaluate the kernel with NumPy, one operator at a time. Tests compare the compiled back-ends with it."""
        operands = self._bind(operands, scalars)
        return reference.evaluate(self.equations, operands[: self._n_arrays], operands[self._n_arrays :])

    def check(self, arrays: Sequence[Any]) -> None:
        """Check NumPy arrays for a call.

        Raises:
            ValueError: An array does not fit the declaration or the first array; the message names it.
        """
        shape = getattr(arrays[0], "shape", None)
        for name, array in zip(self.equations.arrays, arrays, strict=True):
            start, flags = f"{self.name}: {name}", flags_of(self.equations, name)
            if not isinstance(array, np.ndarray):
                raise ValueError(f"{start} is a {type(array).__name__}; pass NumPy arrays only or CuPy arrays only")
            if array.ndim != 1:
                raise ValueError(f"{start} has shape {array.shape}; pass a vector (array.reshape(-1))")
            if array.shape != shape:
                raise ValueError(f"{start} has {array.size} elements, the first array {shape}; lengths must agree")
            try:
                storage_of(array.dtype)
            except ValueError as error:
                raise ValueError(f"{start}: {error}") from None
            if array.flags.num & READABLE != READABLE:
                raise ValueError(f"{start} is strided or unaligned; pass a contiguous array (numpy.ascontiguousarray)")
            if array.flags.num & flags != flags:
                raise ValueError(f"{start} is read-only, and the kernel assigns to it")

    def bytes_per_element(self, dtype: Any) -> int:
        """Return the bytes moved per element. An array counts once if it is read, and once more if it is written.

        Args:
            dtype: One dtype for all arrays, or a tuple with one for each.
        """
        equations = self.equations
        itemsize = dict(zip(equations.arrays, storages_of(dtype, self._n_arrays), strict=True))
        return sum(itemsize[name].itemsize for name in equations.loaded + equations.stored)

    def host_source(self, dtypes: Any) -> str:
        """Return the Python source that Numba compiles, for one dtype or a tuple with one for each array."""
        return host.source(self.name, self.equations, storages_of(dtypes, self._n_arrays))

    def cuda_source(self, dtypes: Any) -> str:
        """Return the self-contained CUDA C that CuPy compiles, for one dtype or a tuple with one for each array."""
        return cuda_source.source(self.name, self.equations, storages_of(dtypes, self._n_arrays))

    def __repr__(self) -> str:
        return f"Kernel {self.name}({', '.join(self.equations.arrays)}; {', '.join(self.equations.scalars)})"

    def _bind(self, operands: Sequence[Any], scalars: dict[str, float]) -> tuple[Any, ...]:
        """Return the operands with the scalars given by name inserted in declared order."""
        n_given = len(operands)
        if n_given >= self._n_arrays and n_given + len(scalars) == self._n_operands:
            try:
                return (*operands, *[scalars[name] for name in self.equations.scalars[n_given - self._n_arrays :]])
            except KeyError:
                pass
        given = f"{n_given} by position" + (f" and {', '.join(scalars)}" if scalars else "")
        raise ValueError(f"{self!r} takes {self._n_arrays} arrays, then these scalars; it was given {given}")

    def _otherwise(self, arrays: Sequence[Any], scalars: Sequence[float]) -> int:
        """Run on CuPy arrays or NumPy subclasses such as memmap, or compile for new dtypes; raise for all others."""
        if is_device(arrays[0]):
            # A NonfiniteCount is no int, but supports what callers do with one.
            return cast(int, cuda.run(self.name, self.equations, arrays, scalars))
        self.check(arrays)
        arrays = [np.asarray(array) for array in arrays]
        dtypes = tuple([array.dtype for array in arrays])
        if dtypes not in self._functions:
            self._functions[dtypes] = self._compile(dtypes)
        return self._entry(*arrays, *scalars)

    def _compile(self, dtypes: Sequence[np.dtype]) -> Callable[..., int]:
        """Return the compiled function for the arrays' dtypes."""
        storages = storages_of(tuple(dtypes), self._n_arrays)
        function = host.compiled(self.name, self.equations, storages)
        if all(storage.itemsize != 2 for storage in storages):
            return function
        n = self._n_arrays
        return lambda *operands: function(*as_bits(operands[:n]), *operands[n:])


def as_bits(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the arrays, with 16-bit arrays viewed as uint16, for compiled host kernels."""
    return [array.view(_UINT16) if array.itemsize == 2 else array for array in arrays]
