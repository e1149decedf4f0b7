"""A check, before an HDF5 file is read, that the file itself contains all of its data.

HDF5 follows links to other files and paths, reads raw data from any file that a data set names, and puts data sets
together from others, with fill values where these are missing. A small file may declare an array of any size. The files
of mpitrain (data, metrics, checkpoints) use none of this, so a file that does is refused.

The check ends on any file: each object may be reached by one path only, so there are no cycles and no repetitions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import h5py

MAX_OBJECTS = 2**20
MAX_DEPTH = 200
MAX_ATTRIBUTES = 2**10  # of one object
MAX_ATTRIBUTE_BYTES = 2**24
MAX_COMPRESSION = 1100  # deflate reaches 1032
MAX_DIMENSIONS = 32
_SLACK_BYTES = 2**16

ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError)
"""What h5py raises about damaged contents, and this module about refused ones."""


class RefusedContents(ValueError):
    """The error for an HDF5 file that refers to other files, or claims contents larger than itself."""


def check_contents(file: h5py.File) -> None:
    """Check all objects in a file.

    Raises:
        RefusedContents: The file contains a link, external or virtual data, or a size that it cannot hold.
    """
    seen: set[int] = set()
    pending: list[tuple[str, h5py.h5g.GroupID, int]] = [("", file.id, 0)]
    _check_attributes("the file", h5py.h5o.open(file.id, b"/"))
    while pending:
        path, group, depth = pending.pop()
        for name, found in _members(path, group):
            address = h5py.h5o.get_info(found).addr
            if address in seen:
                raise RefusedContents(f"{name!r} is another object under a second name")
            seen.add(address)
            if len(seen) > MAX_OBJECTS or depth >= MAX_DEPTH:
                raise RefusedContents("it has too many or too deeply nested objects")
            _check_attributes(repr(name), found)
            if isinstance(found, h5py.h5d.DatasetID):
                _check_dataset(name, found)
            elif isinstance(found, h5py.h5g.GroupID):
                pending.append((f"{name}/", found, depth + 1))
            else:
                raise RefusedContents(f"{name!r} is neither an array nor a group")


def check_stored(dataset: h5py.Dataset) -> None:
    """Check that all elements of an array are stored; HDF5 would replace missing ones by a fill value.

    Raises:
        RefusedContents: Some elements are not stored.
    """
    if not dataset.size:
        return
    if dataset.chunks is None:
        complete = dataset.id.get_storage_size() >= dataset.nbytes
    else:
        n_chunks = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
        complete = dataset.id.get_num_chunks() >= n_chunks
    if not complete:
        raise RefusedContents(f"{dataset.name!r} declares {dataset.shape} elements, of which some are not stored")


def _members(path: str, group: h5py.h5g.GroupID) -> Iterator[tuple[str, h5py.h5g.GroupID | h5py.h5d.DatasetID]]:
    """Yield the full name and the object of each member of a group."""
    if group.get_num_objs() > MAX_OBJECTS:
        raise RefusedContents("it has too many objects")
    for key in group:
        name = path + key.decode(errors="backslashreplace")
        if group.links.get_info(key).type != h5py.h5l.TYPE_HARD:
            raise RefusedContents(f"{name!r} is a link to another place or file")
        yield name, h5py.h5o.open(group, key)


def _check_attributes(name: str, found: h5py.h5g.GroupID | h5py.h5d.DatasetID) -> None:
    n = h5py.h5a.get_num_attrs(found)
    if n > MAX_ATTRIBUTES:
        raise RefusedContents(f"{name} has {n} attributes")
    for k in range(n):
        attribute = h5py.h5a.open(found, index=k)
        if max(attribute.get_storage_size(), math.prod(attribute.shape or ()) * attribute.dtype.itemsize) > (
            MAX_ATTRIBUTE_BYTES
        ):
            raise RefusedContents(f"{name} has an attribute of {attribute.get_storage_size()} bytes")


def _check_dataset(name: str, found: h5py.h5d.DatasetID) -> None:
    declared = found.get_create_plist()
    layout = declared.get_layout()
    if layout == h5py.h5d.VIRTUAL:
        raise RefusedContents(f"{name!r} is a virtual array, put together from others")
    if declared.get_external_count():
        raise RefusedContents(f"{name!r} keeps its elements in another file")
    shape = found.shape or ()
    n_bytes, stored = math.prod(shape) * found.dtype.itemsize, found.get_storage_size()
    if layout == h5py.h5d.CHUNKED:
        stored += math.prod(declared.get_chunk()) * found.dtype.itemsize  # a chunk that is not written yet
        stored *= MAX_COMPRESSION if declared.get_nfilters() else 1
    if n_bytes > stored + _SLACK_BYTES:
        raise RefusedContents(f"{name!r} declares {shape} elements, more than the file can hold")
