"""Import of images that are published as arrays: MNIST and CIFAR in their original files.

    mnist    train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-...; plain or .gz
    cifar    data_batch_1.bin ... test_batch.bin (CIFAR-10), train.bin, test.bin (CIFAR-100), or the same as pickles

The files may lie in a folder or in the archive in which they are published. Pickles are read without executing anything
in them (``plain_pickle``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from gzip import GzipFile
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from zlib import error as ZlibError

import h5py
import numpy as np
from numpy.typing import NDArray

from mpitrain.data import plain_pickle
from mpitrain.data.class_folders import files
from mpitrain.data.data_writer import Decoded, ImageWriter, Imported, check_target, replace_data
from mpitrain.data.hdf5_format import SPLITS, create
from mpitrain.errors import UsageError, reason
from mpitrain.records.contained_file import ContainedFile

MNIST_SETS = {"train": "train", "t10k": "test"}
IDX_IMAGES, IDX_LABELS = 0x0803, 0x0801  # unsigned bytes in three dimensions, in one
MAX_BYTES = 2**30  # of a set, unpacked
CIFAR_SHAPE = (3, 32, 32)
CIFAR_BYTES = 3 * 32 * 32
CIFAR_BINARY = {10: 1, 100: 2}  # labels of a row: the class; the superclass and the class


@dataclass(frozen=True)
class Samples:
    """The images of a set with their labels."""

    images: NDArray[np.uint8]  # (n, C, H, W)
    labels: NDArray[np.int64]  # (n,)


def import_mnist(source: Path, target: Path) -> Imported:
    """Write a data file from the files of MNIST, or of a data set in the same format.

    Args:
        source: A folder or archive with the four files.
        target: The file to write.

    Raises:
        UsageError: A file is missing or damaged.
    """
    check_target(target)
    parts: dict[tuple[str, str], NDArray[np.uint8]] = {}
    for name, stream in files(source, lambda name: _mnist_part(name) is not None):
        part = _mnist_part(name)
        assert part is not None
        if part in parts:
            raise UsageError(f"{source} has {part[0]} {part[1]} twice, the second time in {name}: remove one")
        parts[part] = _read_idx(name, stream, IDX_IMAGES if part[1] == "images" else IDX_LABELS)
    for split in SPLITS:
        for kind in ("images", "labels"):
            if (split, kind) not in parts:
                raise UsageError(f"{source} lacks the {kind} of the {split} set: give the four files of MNIST")
    labels = {split: parts[split, "labels"].astype(np.int64) for split in SPLITS}
    n_classes = int(max(of_split.max(initial=0) for of_split in labels.values())) + 1
    sets = {split: Samples(parts[split, "images"][:, None], labels[split]) for split in SPLITS}
    return _write(source, target, sets, [str(label) for label in range(n_classes)])


def _mnist_part(name: str) -> tuple[str, str] | None:
    """Return the set and the kind of a file of MNIST; None for another file."""
    base = name.rpartition("/")[2].removesuffix(".gz").replace(".", "-")
    for prefix, split in MNIST_SETS.items():
        for kind, dimensions in (("images", 3), ("labels", 1)):
            if base == f"{prefix}-{kind}-idx{dimensions}-ubyte":
                return split, kind
    return None


def _read_idx(name: str, stream: BinaryIO, magic: int) -> NDArray[np.uint8]:
    """Return the array of an idx file.

    Raises:
        UsageError: It is damaged, or not of this kind.
    """
    unpacked: Any = GzipFile(fileobj=stream) if name.endswith(".gz") else stream
    n_dimensions = magic & 0xFF
    try:
        header = np.frombuffer(unpacked.read(4 * (1 + n_dimensions)), ">u4")
        if len(header) != 1 + n_dimensions or header[0] != magic:
            raise UsageError(f"{name} is not an idx file of {n_dimensions} dimensions: download it again")
        shape = tuple(int(length) for length in header[1:])
        size = int(np.prod(shape, dtype=object))
        if not 0 < size <= MAX_BYTES:
            raise UsageError(f"{name} declares {' x '.join(map(str, shape))} bytes, which is no set of small images")
        content = unpacked.read(size + 1)
    except (OSError, EOFError, ZlibError) as error:
        raise UsageError(f"{name} is damaged ({reason(error)}): download it again") from error
    if len(content) != size:
        raise UsageError(f"{name} does not have the {size} bytes that it declares: download it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def import_cifar(source: Path, target: Path) -> Imported:
    """Write a data file from the files of CIFAR-10 or CIFAR-100, in the binary or in the Python version.

    Args:
        source: The archive as it is published, or a folder with its files.
        target: The file to write.

    Raises:
        UsageError: A file is missing, damaged or not of CIFAR.
    """
    check_target(target)
    batches: dict[str, list[Samples]] = {split: [] for split in SPLITS}
    names: list[str] = []
    for name, stream in files(source, lambda name: _cifar_reader(name) is not None):
        read = _cifar_reader(name)
        assert read is not None
        found = read(name, stream)
        if isinstance(found, Samples):
            base = name.rpartition("/")[2]
            batches["test" if base.startswith("test") else "train"].append(found)
        else:
            names = found
    for split, parts in batches.items():
        if not parts:
            raise UsageError(f"{source} has no {split} batch: give the archive of CIFAR-10 or CIFAR-100, or its folder")
    sets = {
        split: Samples(np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts]))
        for split, parts in batches.items()
    }
    n_classes = max(int(found.labels.max()) for found in sets.values()) + 1
    return _write(source, target, sets, names if len(names) >= n_classes else list(map(str, range(n_classes))))


def _cifar_reader(name: str) -> Callable[[str, BinaryIO], Samples | list[str]] | None:
    """Return the function that reads a file of CIFAR: a batch of images, or names of classes; None for another file."""
    base = name.rpartition("/")[2]
    stem = base.removesuffix(".bin")
    is_batch = stem in ("test_batch", "train", "test") or stem.startswith("data_batch_")
    if is_batch:
        return _read_binary if base.endswith(".bin") else _read_pickle
    if base in ("batches.meta.txt", "fine_label_names.txt"):
        return _read_names
    return _read_meta if base in ("batches.meta", "meta") else None


def _read_binary(name: str, stream: BinaryIO) -> Samples:
    content = stream.read()
    n_labels = CIFAR_BINARY[100 if name.rpartition("/")[2] in ("train.bin", "test.bin") else 10]
    row_bytes = n_labels + CIFAR_BYTES
    if not content or len(content) % row_bytes:
        raise UsageError(f"{name} has {len(content)} bytes, not rows of {row_bytes}: download it again")
    rows = np.frombuffer(content, np.uint8).reshape(-1, row_bytes)
    return Samples(rows[:, n_labels:].reshape(-1, *CIFAR_SHAPE), rows[:, n_labels - 1].astype(np.int64))


def _read_names(name: str, stream: BinaryIO) -> list[str]:
    return [line for line in stream.read().decode(errors="replace").splitlines() if line]


def _loaded(name: str, stream: BinaryIO) -> Mapping[str, Any]:
    """Return the dictionary of a pickle.

    Raises:
        UsageError: It contains anything but dictionaries, lists, texts, numbers and arrays of bytes.
    """
    try:
        found = plain_pickle.load(BytesIO(stream.read()))
    except plain_pickle.Refused as error:
        raise UsageError(f"{name} is refused ({error}): download CIFAR again, or take its binary version") from error
    if not isinstance(found, dict):
        raise UsageError(f"{name} is refused (it holds no dictionary): download CIFAR again")
    return {_text(key): value for key, value in found.items()}


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _read_pickle(name: str, stream: BinaryIO) -> Samples:
    found = _loaded(name, stream)
    images, labels = found.get("data"), found.get("fine_labels", found.get("labels"))
    is_valid = (
        isinstance(images, np.ndarray)
        and images.ndim == 2
        and images.shape[1] == CIFAR_BYTES
        and isinstance(labels, list)
        and len(labels) == len(images) > 0
        and all(type(label) is int and 0 <= label < 256 for label in labels)
    )
    if not is_valid:
        raise UsageError(f"{name} is refused (it holds no images with labels): download CIFAR again")
    assert isinstance(images, np.ndarray)
    return Samples(images.reshape(-1, *CIFAR_SHAPE), np.array(labels, np.int64))


def _read_meta(name: str, stream: BinaryIO) -> list[str]:
    found = _loaded(name, stream)
    names = found.get("fine_label_names", found.get("label_names"))
    return [_text(one) for one in names] if isinstance(names, list) else []


def _write(source: Path, target: Path, sets: Mapping[str, Samples], classes: Sequence[str]) -> Imported:
    """Write a data file from two sets of images.

    Raises:
        UsageError: Images and labels do not fit together.
    """
    shape = sets["train"].images.shape[1:]
    for split, found in sets.items():
        if len(found.images) != len(found.labels):
            raise UsageError(
                f"{source}: the {split} set has {len(found.images)} images and {len(found.labels)} labels: download it "
                "again"
            )
        if found.images.shape[1:] != shape:
            raise UsageError(f"{source}: the images of both sets have different sizes: give the files of one data set")
    places = {
        f"{split}/{k}": (int(label), number)
        for number, split in enumerate(SPLITS)
        for k, label in enumerate(sets[split].labels)
    }

    def rows() -> Decoded:
        for split in SPLITS:
            yield from _named(split, sets[split].images)

    def fill(output: ContainedFile) -> None:
        with h5py.File(output, "w") as file:
            create(file, classes=classes, shape=shape, n=[len(sets[split].labels) for split in SPLITS])
            writer = ImageWriter(file, output.check)
            writer.fill(rows(), places)
            writer.close()

    replace_data(target, fill)
    n_train, n_test = (len(sets[split].labels) for split in SPLITS)
    return Imported(target, n_train, n_test, shape, tuple(classes))


def _named(split: str, images: NDArray[np.uint8]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    for k, image in enumerate(images):
        yield f"{split}/{k}", image
