"""How array elements are stored and in which type they are computed with.

Arithmetic is done in the widest stored type of a call, and never in less than float32. 16-bit elements travel as
``unsigned short`` on every back-end and are converted by bit operations of our own, so that no back-end needs a half
type (Numba has none on the host) and none can round in its own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

Compute = Literal["float32", "float64"]


@dataclass(frozen=True)
class Storage:
    """One element type: its names in NumPy, Numba and C, and the two conversions where it is a 16-bit one."""

    name: str
    short: str  # in file names
    itemsize: int  # bytes
    numba: str
    c: str
    widen: str = ""  # name of the function to float32; empty where none is needed
    narrow: str = ""  # name of the function from float32


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
    """The storage of a dtype: a NumPy (or ml_dtypes) dtype, anything that makes one, or its name.

    Raises:
        ValueError: the kernels do not compute with this dtype.
    """
    # ml_dtypes registers "bfloat16" with NumPy only once somebody has imported it, so the name is looked up first.
    name = dtype if isinstance(dtype, str) and dtype in STORAGES else np.dtype(dtype).name
    if name not in STORAGES or not (isinstance(dtype, str) or np.dtype(dtype).isnative):
        raise ValueError(f"kernels take {', '.join(STORAGES)} in native byte order, not {dtype!r}; convert with astype")
    return STORAGES[name]


def accumulator(dtype: Any) -> np.dtype:
    """What small changes to elements of a dtype are added up in: float32 for 16 bits, which would lose them."""
    return np.dtype(dtype) if np.dtype(dtype).itemsize >= 4 else np.dtype(np.float32)


def storages_of(dtypes: Any, n_arrays: int) -> tuple[Storage, ...]:
    """One storage for each of `n_arrays` arrays, from one dtype for all of them or a sequence of one each."""
    if not isinstance(dtypes, (tuple, list)):
        return (storage_of(dtypes),) * n_arrays
    if len(dtypes) != n_arrays:
        raise ValueError(f"{n_arrays} arrays need one dtype or {n_arrays}, not {len(dtypes)}")
    return tuple(storage_of(dtype) for dtype in dtypes)


def compute_type(storages: Sequence[Storage]) -> Compute:
    """float64 where any array is float64, else float32."""
    return "float64" if any(s.name == "float64" for s in storages) else "float32"


def dtypes_label(storages: Sequence[Storage]) -> str:
    """``f32`` where all arrays are stored alike, else one short name for each: ``f32_bf16``."""
    shorts = [s.short for s in storages]
    return shorts[0] if len(set(shorts)) == 1 else "_".join(shorts)
