"""The format of data files: layout, opening, and validation.

    train/images   (N, C, H, W) or (N, d), uint8 or float32, in chunks of at most 128 KiB
    train/labels   (N,) int64, each in [0, n_classes)
    test/images    (M, C, H, W)
    test/labels    (M,) int64
    attributes of the file:
      format           "mpitrain-data"
      format_version   1
      classes          names, in the order of the labels; with more than 1000 classes, a dataset of this name instead
      mean, std        (C,) or (d,) float64, of the training images; for uint8 images, of pixel / 255

For regression there are real-valued targets in place of labels and classes:

    train/targets  (N,) or (N, k) floating point, finite
    test/targets   (M,) or (M, k)

For text there are tokens instead; see ``text_format``.

Files are not compressed, because decoded images hardly compress, and a run reads each of them many times.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mpitrain.errors import UsageError, reason
from mpitrain.records.hdf5_guard import ERRORS, RefusedContents, check_contents, check_stored

FORMAT = "mpitrain-data"
FORMAT_VERSION = 1
CHUNK_BYTES = 2**17  # read for a single image; smaller chunks slow down reading all images
SUFFIXES = (".h5", ".hdf5")
SPLITS = ("train", "test")
LABELS, TARGETS = "labels", "targets"
MOST_ATTRIBUTE_NAMES = 1000
"""The most names in an attribute, for which HDF5 has 64 KiB with 16 bytes for each."""

REMEDY = "make one with 'mpitrain data import'"


@dataclass(frozen=True)
class Header:
    """The validated description of a data file."""

    n_train: int
    n_test: int
    shape: tuple[int, ...]  # of one image: (C, H, W) or (d,)
    dtype: np.dtype[Any]  # uint8 or float32
    classes: tuple[str, ...]  # none with real-valued targets
    mean: NDArray[np.float64]  # (shape[0],)
    std: NDArray[np.float64]  # (shape[0],)

    @property
    def n_bytes(self) -> int:
        """The size of all images and labels in memory."""
        return (self.n_train + self.n_test) * (math.prod(self.shape) * self.dtype.itemsize + 8)


def open_data(path: Path) -> h5py.File:
    """Open a data file for reading. No lock is needed, since a data file appears complete and never changes."""
    if not path.exists():
        raise UsageError(f"no data file {path}: check the path (--data), or {REMEDY}")
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a data file: {REMEDY}")
    try:
        return _checked(h5py.File(path, "r", locking=False))
    except RefusedContents as error:
        raise _refused(str(path), error) from error
    except PermissionError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): change its permissions") from error
    except OSError as error:
        if "truncated" in str(error):
            raise UsageError(f"{path} is truncated: copy it again, or {REMEDY}") from error
        if not h5py.is_hdf5(path):
            raise UsageError(f"{path} is not an HDF5 file: {REMEDY}") from error
        raise _damaged(str(path), error) from error
    except ERRORS as error:
        raise _damaged(str(path), error) from error


def _checked(file: h5py.File) -> h5py.File:
    """Return a file whose contents are its own; close another one."""
    try:
        check_contents(file)
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def reading(file: h5py.File) -> Iterator[None]:
    """Convert HDF5's errors about damaged contents inside the block to a `UsageError` of one line."""
    path = str(file.filename)
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except RefusedContents as error:
        raise _refused(path, error) from error
    except ERRORS as error:
        raise _damaged(path, error) from error


def read_header(file: h5py.File) -> Header:
    """Return the validated description of a file. Labels are not read."""
    check_format(file)
    path, kind = file.filename, answers(file)
    classes = _classes(file) if kind == LABELS else ()
    mean, std = (_numbers(file, name) for name in ("mean", "std"))
    images, labels = ({split: _dataset(file, f"{split}/{name}") for split in SPLITS} for name in ("images", kind))

    shape, dtype = images["train"].shape[1:], images["train"].dtype
    if len(shape) not in (1, 3) or dtype not in (np.uint8, np.float32):
        raise UsageError(
            f"{path}: train/images is {images['train'].shape} {dtype}: store (N, C, H, W) or (N, d), uint8 or float32"
        )
    for split in SPLITS:
        n = images[split].shape[0]
        if images[split].shape[1:] != shape or images[split].dtype != dtype:
            raise UsageError(
                f"{path}: test/images is of {images['test'].shape[1:]} {images['test'].dtype}, train/images of {shape} "
                f"{dtype}: make them alike"
            )
        if kind == TARGETS:
            _check_targets(path, split, labels["train"], labels[split], n)
        elif labels[split].shape != (n,) or labels[split].dtype.kind not in "iu":
            raise UsageError(
                f"{path}: {split}/labels is {labels[split].shape} {labels[split].dtype}: store ({n},) int64, one label "
                "for each image"
            )
        if n == 0:
            raise UsageError(f"{path}: the {split} set is empty: store at least one image in {split}/images")
    for found in (*images.values(), *labels.values()):
        check_stored(found)
    if 0 in shape:
        raise UsageError(f"{path}: images of shape {shape} have no pixels: store images of at least one pixel")
    for name, values in (("mean", mean), ("std", std)):
        if values.shape != shape[:1] or not np.isfinite(values).all() or (name == "std" and values.min() <= 0):
            raise UsageError(
                f"{path}: attribute {name} must be {shape[0]} finite numbers, std above 0: store that of train/images"
            )
    return Header(images["train"].shape[0], images["test"].shape[0], shape, dtype, classes, mean, std)


def check_format(file: h5py.File) -> None:
    """Raise `UsageError` unless a file is a data file of this version."""
    kind, version = _text(_attribute(file, "format")), _attribute(file, "format_version")
    if kind != FORMAT or not np.array_equal(version, FORMAT_VERSION):
        raise UsageError(
            f"{file.filename} is {kind} version {version}, not {FORMAT} version {FORMAT_VERSION}: {REMEDY}"
        )


def answers(file: h5py.File) -> str:
    """Return which kind of answers a data file contains: ``labels`` of classes, or real-valued ``targets``."""
    return TARGETS if f"{SPLITS[0]}/{TARGETS}" in file else LABELS


def _classes(file: h5py.File) -> tuple[str, ...]:
    names = _dataset(file, "classes")[:] if "classes" in file else _attribute(file, "classes")
    return tuple(_text(name) for name in np.atleast_1d(names))


def _check_targets(path: str, split: str, train: h5py.Dataset, targets: h5py.Dataset, n: int) -> None:
    """Raise `UsageError` unless the targets of a split are n rows of as many numbers as those of the training set."""
    if (
        len(targets.shape) > 2
        or targets.shape != (n, *train.shape[1:])
        or targets.dtype.kind != "f"
        or not targets.size
    ):
        raise UsageError(
            f"{path}: {split}/targets is {targets.shape} {targets.dtype}: store ({n},) or ({n}, k) float32, one row "
            "for each image and k as in train/targets"
        )


def check_labels(path: str, split: str, labels: NDArray[np.int64], n_classes: int) -> None:
    """Raise `UsageError` for the first label that is not a class; the message names its row."""
    if labels.min() >= 0 and labels.max() < n_classes:
        return
    row = int(np.flatnonzero((labels < 0) | (labels >= n_classes))[0])
    raise UsageError(
        f"{path}: {split}/labels[{row}] is {labels[row]}, but there are {n_classes} classes (0 to {n_classes - 1}): "
        "correct the label, or the attribute 'classes'"
    )


def check_finite(path: str, name: str, first: int, images: NDArray[Any]) -> None:
    """Raise `UsageError` for the first image with a NaN or an infinity; the message names its row and pixel.

    Args:
        path: The file.
        name: The dataset, such as ``train/images``.
        first: The row of the first image.
        images: (n, ...) consecutive images.
    """
    if images.dtype.kind != "f" or np.isfinite(images).all():
        return
    row, *pixel = (int(i) for i in np.argwhere(~np.isfinite(images))[0])
    value = images[(row, *pixel)]
    where = ", ".join(map(str, pixel))
    raise UsageError(f"{path}: {name}[{first + row}] is {value} at {where}: remove the image, or replace the value")


def create(
    file: h5py.File,
    *,
    classes: Sequence[str] = (),
    shape: tuple[int, ...],
    n: Iterable[int],
    dtype: str = "uint8",
    n_targets: int = 0,
) -> None:
    """Create the datasets of a data file for n = (training, test) images.

    The caller fills in the images, the labels, and the attributes ``mean`` and ``std``. If ``n_targets`` is not 0,
    there are targets of ``n_targets`` numbers in place of labels.
    """
    file.attrs["format"] = FORMAT
    file.attrs["format_version"] = FORMAT_VERSION
    names = [name.encode(errors="surrogateescape").decode(errors="backslashreplace") for name in classes]
    texts = np.array(names, dtype=h5py.string_dtype())
    if len(names) > MOST_ATTRIBUTE_NAMES:
        file["classes"] = texts
    elif names:
        file.attrs["classes"] = texts
    chunk = max(1, min(256, CHUNK_BYTES // (math.prod(shape) * np.dtype(dtype).itemsize)))
    for split, n_split in zip(SPLITS, n, strict=True):
        group = file.create_group(split)
        rows = max(1, min(chunk, n_split))
        group.create_dataset("images", (n_split, *shape), dtype, chunks=(rows, *shape), maxshape=(None, *shape))
        rows = max(1, min(n_split, 2**14))
        if n_targets:
            group.create_dataset(TARGETS, (n_split, n_targets), "float32", chunks=(rows, n_targets))
        else:
            group.create_dataset(LABELS, (n_split,), "int64", chunks=(rows,), maxshape=(None,))


def _refused(path: str, error: RefusedContents) -> UsageError:
    return UsageError(f"{path} is refused: {error}; store all of every array in the file itself, or {REMEDY}")


def _damaged(path: str, error: Exception) -> UsageError:
    return UsageError(f"{path} is a damaged HDF5 file ({reason(error)}): copy it again, or {REMEDY}")


def _attribute(file: h5py.File, name: str) -> Any:
    try:
        return file.attrs[name]
    except KeyError:
        raise UsageError(f"{file.filename} has no attribute '{name}' and is no mpitrain data file: {REMEDY}") from None


def _numbers(file: h5py.File, name: str) -> NDArray[np.float64]:
    """Return an attribute as a vector, or [NaN] if it is not numeric."""
    value = _attribute(file, name)
    try:
        return np.atleast_1d(np.asarray(value, np.float64))
    except (TypeError, ValueError):
        return np.array([np.nan])


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    found = file.get(name)
    if isinstance(found, h5py.Dataset) and found.ndim:
        return found
    there: list[str] = []
    file.visit(there.append)
    raise UsageError(f"{file.filename} has no array '{name}' (it has {', '.join(there) or 'nothing'}): {REMEDY}")


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
