"""Loading of data files: the ranks of a node read a part each, unless the file is too large for memory."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mpitrain.data import digest
from mpitrain.data.dataset import ArrayDataset, Dataset, Normalisation
from mpitrain.data.hdf5_format import (
    LABELS,
    SPLITS,
    TARGETS,
    Header,
    check_finite,
    check_labels,
    open_data,
    read_header,
    reading,
)
from mpitrain.data.node_agreement import World, agree, all_ok
from mpitrain.data.storage import MAX_READ_BYTES, STORAGES, FileImages, Images, Limits, MemoryImages, choose, share_of
from mpitrain.data.text import load_text_file
from mpitrain.data.text_format import TextHeader, holds_text, read_text_header
from mpitrain.errors import UsageError

ANSWERS: dict[str, np.dtype[Any]] = {LABELS: np.dtype(np.int64), TARGETS: np.dtype(np.float32)}
"""The type of labels and of targets in memory."""

LABEL_BYTES = 2**28
"""Labels of this size are read on every node, even if the images are not."""


def load_hdf5(
    path: Path, *, world: World, sampling: str, limits: Limits, verify: bool = False, context: int
) -> Dataset:
    """Return the data set of a data file. Collective over the node.

    `storage.py` determines where the images are stored. With `verify`, the first rank of the node first compares the
    whole file with its digest.

    Args:
        path: The file.
        world: The ranks of the node.
        sampling: The way in which samples will be drawn.
        limits: The memory that the data may occupy.
        verify: Whether to compare the file with its digest.
        context: The number of tokens of a sample, if the file contains text.
    """
    if verify:
        all_ok(world, lambda: digest.verify(path) if world.local_rank == 0 else None)
    file, header, file_digest = all_ok(world, lambda: _open(path))
    if isinstance(header, TextHeader):
        return load_text_file(file, header, context=context, world=world, limits=limits, file_digest=file_digest)
    return _load_images(path, file, header, file_digest, world=world, sampling=sampling, limits=limits)


def _load_images(
    path: Path,
    file: h5py.File,
    header: Header,
    file_digest: str | None,
    *,
    world: World,
    sampling: str,
    limits: Limits,
) -> ArrayDataset:
    """Return the data set of a file with images. Collective over the node."""
    preferred = choose(header.n_bytes, sampling=sampling, size=world.size, local_size=world.local_size, limits=limits)
    storage = STORAGES[agree(world, STORAGES.index(preferred))]
    n_labels = header.n_train + header.n_test
    if storage != "shared" and 8 * n_labels * world.local_size > max(limits.private_bytes, LABEL_BYTES):
        raise UsageError(f"{path}: its {n_labels} labels do not fit into the memory of this node: use more memory")

    images: dict[str, Images] = {}
    labels: dict[str, NDArray[Any]] = {}
    answer = LABELS if header.classes else TARGETS
    for split in SPLITS:
        if storage == "shared":
            images[split] = MemoryImages(_read_shared(file[f"{split}/images"], world))
            labels[split] = _read_shared(file[f"{split}/{answer}"], world, ANSWERS[answer])
        else:
            images[split] = FileImages(file[f"{split}/images"], staging=storage == "private" and split == "train")
            labels[split] = all_ok(world, partial(_read_labels, file, f"{split}/{answer}"))
        if header.classes:
            check_labels(str(path), split, labels[split], len(header.classes))
        else:
            check_finite(str(path), f"{split}/{answer}", 0, labels[split])
            labels[split] = labels[split].reshape(len(labels[split]), -1)
    if storage == "shared":
        file.close()

    scale = 255.0 if header.dtype == np.uint8 else 1.0
    return ArrayDataset(
        name=path.stem,
        classes=header.classes,
        shape=header.shape,
        normalisation=Normalisation(scale, tuple(header.mean.tolist()), tuple(header.std.tolist())),
        storage=storage,
        train_images=images["train"],
        train_labels=labels["train"],
        test_images=images["test"],
        test_labels=labels["test"],
        photographs=header.dtype == np.uint8,
        file=None if storage == "shared" else file,
        file_digest=file_digest,
    )


def _open(path: Path) -> tuple[h5py.File, Header | TextHeader, str | None]:
    """Return an open data file, its description and the digest of its import. Local."""
    file = open_data(path)
    try:
        with reading(file):
            header = read_text_header(file) if holds_text(file) else read_header(file)
            return file, header, digest.stored(path)
    except BaseException:
        file.close()
        raise


def _read_labels(file: h5py.File, name: str) -> NDArray[Any]:
    with reading(file):
        labels: NDArray[Any] = file[name][:].astype(ANSWERS[name.partition("/")[2]])
        return labels


def _read_shared(source: h5py.Dataset, world: World, dtype: np.dtype[Any] | None = None) -> NDArray[Any]:
    """Return the whole array in shared memory, of which each rank reads its part. Collective over the node."""
    array = world.shared_array(source.shape, dtype or source.dtype)
    row_bytes = math.prod(source.shape[1:]) * source.dtype.itemsize
    chunk = source.chunks[0] if source.chunks else 1
    slab = max(1, MAX_READ_BYTES // (row_bytes * chunk)) * chunk
    start, stop = share_of(len(source), world.local_rank, world.local_size, chunk)

    def read() -> None:
        for low in range(start, stop, slab):
            rows = slice(low, min(low + slab, stop))
            with reading(source.file):
                source.read_direct(array, rows, rows)
            check_finite(source.file.filename, source.name.lstrip("/"), low, array[rows])

    all_ok(world, read)
    return array
