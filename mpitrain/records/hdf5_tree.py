"""Nested states in HDF5: dictionaries and lists of arrays, tensors, numbers, strings and None.

Each value is a group whose attribute ``kind`` names its type. Containers hold a group for each item, named by its
position. What is read equals what was written, in type, dtype and bits.
"""

from __future__ import annotations

from typing import Any

import h5py
import ml_dtypes
import numpy as np
import torch

_KIND, _VALUE, _DTYPE = "kind", "value", "dtype"
_KEY, _KEY_IS_NUMBER = "key", "key_is_number"
_SIXTEEN_BIT = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
"""Types that HDF5 lacks; they are stored as uint16."""

_NUMBERS = {"bool": bool, "int": int, "float": float}

# A checkpoint has hundreds of small values. HDF5's own calls write them in a third of the time that h5py's take.
_SCALAR = h5py.h5s.create(h5py.h5s.SCALAR)
_TYPES = {
    kind: (np.dtype(dtype), h5py.h5t.py_create(np.dtype(dtype), logical=True), h5py.h5t.py_create(np.dtype(dtype)))
    for kind, dtype in {str: h5py.string_dtype(), bool: bool, int: np.int64, float: np.float64}.items()
}


def n_array_bytes(value: Any) -> int:
    """Return the size of all arrays and tensors in a state."""
    if isinstance(value, dict):
        return sum(map(n_array_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(n_array_bytes, value))
    return int(value.nbytes) if isinstance(value, (torch.Tensor, np.ndarray)) else 0


def write_tree(group: h5py.Group, value: Any) -> None:
    """Write a state into an empty group.

    Raises:
        TypeError: The state contains an object of a type that cannot be saved.
    """
    _write(group.id, value)


def _write(group: h5py.h5g.GroupID, value: Any) -> None:
    if isinstance(value, dict):
        _set(group, _KIND, "dict")
        for k, (key, item) in enumerate(value.items()):
            child = h5py.h5g.create(group, b"%d" % k)
            _set(child, _KEY, key)
            _set(child, _KEY_IS_NUMBER, isinstance(key, int))
            _write(child, item)
    elif isinstance(value, (list, tuple)):
        _set(group, _KIND, "list" if isinstance(value, list) else "tuple")
        for k, item in enumerate(value):
            _write(h5py.h5g.create(group, b"%d" % k), item)
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        _set(group, _KIND, "tensor" if isinstance(value, torch.Tensor) else "array")
        array = _to_numpy(value)
        _set(group, _DTYPE, str(array.dtype))
        stored = array.view(np.uint16) if str(array.dtype) in _SIXTEEN_BIT else array
        h5py.Group(group).create_dataset(_VALUE, data=stored)
    elif value is None:
        _set(group, _KIND, "none")
    elif isinstance(value, (bool, int, float, str)):
        kind = next(kind for kind in (bool, int, float, str) if isinstance(value, kind))  # np.float64 is a float
        _set(group, _KIND, kind.__name__)
        # Strings are datasets because attributes end at 64 KiB; integers are strings because they may have any length.
        plain = str(value) if kind is int else kind(value)
        dtype, stored, here = _type_of(plain)
        dataset = h5py.h5d.create(group, _VALUE.encode(), stored, _SCALAR)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.array(plain, dtype), mtype=here)
    else:
        raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _set(group: h5py.h5g.GroupID, name: str, value: str | int) -> None:
    """Set an attribute that the group does not have yet."""
    dtype, stored, here = _type_of(value)
    h5py.h5a.create(group, name.encode(), stored, _SCALAR).write(np.array(value, dtype), mtype=here)


def _type_of(value: str | bool | int | float) -> tuple[np.dtype, h5py.h5t.TypeID, h5py.h5t.TypeID]:
    """Return the type of a small value in NumPy, in the file and in memory."""
    return _TYPES[next(kind for kind in _TYPES if isinstance(value, kind))]


def read_tree(group: h5py.Group) -> Any:
    """Return the state that ``write_tree`` wrote into a group."""
    kind = group.attrs[_KIND]
    if kind == "dict":
        return {_key(child): read_tree(child) for child in _children(group)}
    if kind == "list":
        return [read_tree(child) for child in _children(group)]
    if kind == "tuple":
        return tuple(read_tree(child) for child in _children(group))
    if kind == "none":
        return None
    if kind == "array":
        return _read_array(group)
    if kind == "tensor":
        return _read_tensor(group)
    value = group[_VALUE][()]
    return value.decode() if kind == "str" else _NUMBERS[kind](value)


def _children(group: h5py.Group) -> list[h5py.Group]:
    return [group[str(k)] for k in range(len(group))]


def _key(child: h5py.Group) -> int | str:
    key = child.attrs[_KEY]
    return int(key) if child.attrs[_KEY_IS_NUMBER] else str(key)


def _read_stored(group: h5py.Group) -> tuple[np.ndarray, str]:
    """Return an array as stored, and the dtype of the original array."""
    stored = group[_VALUE]
    array = np.empty(stored.shape, stored.dtype)
    if array.size:
        stored.read_direct(array)
    return array, str(group.attrs[_DTYPE])


def _read_array(group: h5py.Group) -> np.ndarray:
    array, dtype = _read_stored(group)
    return array.view(_SIXTEEN_BIT[dtype]) if dtype in _SIXTEEN_BIT else array


def _read_tensor(group: h5py.Group) -> torch.Tensor:
    array, dtype = _read_stored(group)
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype in _SIXTEEN_BIT else tensor


def _to_numpy(value: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value) if value.ndim else value
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:
        return value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()
