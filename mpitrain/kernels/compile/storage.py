"""The types in which array elements are stored and computed.

Arithmetic uses the widest stored type of a call, and at least float32. All back-ends pass 16-bit elements as
``unsigned short`` and convert them with the package's own operations. So no back-end needs a half type (Numba has none
on the host), and all round alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

Compute = Literal["float32", "float64"]


@dataclass(frozen=True)
class Storage:
    """An element type: its names in NumPy, Numba and C, and its conversions if it has 16 bits."""

    name: str
    short: str  # in file names
    itemsize: int  # bytes
    numba: str
    c: str
    widen: str = ""  # function that converts to float32; empty if none is needed
    narrow: str = ""  # function that converts from float32


STORAGES: Final = {
    s.name: s
    for s in (
        Storage("float16", "f16", 2, "uint16", "unsigned short", "half_to_float", "float_to_half"),
        Storage("bfloat16", "bf16", 2, "uint16", "unsigned short", "bfloat_to_float", "float_to_bfloat"),
        Storage("float32", "f32", 4, "float32", "float"),
        Storage("float64", "f64", 8, "float64", "double"),
    )
}


def storage_of(dtype: Any) -> Storage:
    """Return the storage of a dtype, given as its name or as anything that NumPy converts to a dtype.

    Raises:
        ValueError: The kernels do not support this dtype.
    """
    # NumPy knows "bfloat16" only after ml_dtypes has been imported, so names are looked up first.
    name = dtype if isinstance(dtype, str) and dtype in STORAGES else np.dtype(dtype).name
    if name not in STORAGES or not (isinstance(dtype, str) or np.dtype(dtype).isnative):
        raise ValueError(f"kernels take {', '.join(STORAGES)} in native byte order, not {dtype!r}; convert with astype")
    return STORAGES[name]


def accumulator(dtype: Any) -> np.dtype:
    """Return the dtype in which to sum small changes: float32 for 16-bit dtypes, else the dtype itself."""
    return np.dtype(dtype) if np.dtype(dtype).itemsize >= 4 else np.dtype(np.float32)


def storages_of(dtypes: Any, n_arrays: int) -> tuple[Storage, ...]:
    """Return the storage of each of `n_arrays` arrays, given a dtype for all or a sequence of dtypes."""
    if not isinstance(dtypes, (tuple, list)):
        return (storage_of(dtypes),) * n_arrays
    if len(dtypes) != n_arrays:
        raise ValueError(f"{n_arrays} arrays need one dtype or {n_arrays}, not {len(dtypes)}")
    return tuple(storage_of(dtype) for dtype in dtypes)


def compute_type(storages: Sequence[Storage]) -> Compute:
    """Return float64 if any array is float64, else float32."""
    return "float64" if any(s.name == "float64" for s in storages) else "float32"


def dtypes_label(storages: Sequence[Storage]) -> str:
    """Return a short name for the dtypes of arrays: such as ``f32`` if they are equal, else ``f32_bf16``."""
    shorts = [s.short for s in storages]
    return shorts[0] if len(set(shorts)) == 1 else "_".join(shorts)
