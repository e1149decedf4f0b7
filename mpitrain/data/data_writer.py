"""Writing of data files: images from front to back, with their mean and standard deviation."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from mpitrain.data import digest
from mpitrain.data.hdf5_format import SPLITS, SUFFIXES
from mpitrain.errors import UsageError, reason
from mpitrain.records.contained_file import ContainedFile
from mpitrain.records.durable import remedy, sync

T = TypeVar("T")
Decoded = Iterator[tuple[str, NDArray[np.uint8] | None]]  # name; (C, H, W), or None if it cannot be decoded


@dataclass(frozen=True)
class Imported:
    """The outcome of an import of images."""

    target: Path
    n_train: int
    n_test: int
    shape: tuple[int, ...]  # (C, H, W)
    classes: tuple[str, ...]
    unreadable: tuple[str, ...] = ()  # images that were left out
    converted: Mapping[str, int] = field(default_factory=dict)  # how many images were changed, by what was done to them
    left_out: Mapping[str, int] = field(default_factory=dict)  # how many other files were left out, by what they are

    def summary(self) -> str:
        """Return a line about the file."""
        remarks = [f"{n} {what}" for what, n in self.converted.items()]
        remarks += [f"{len(self.unreadable)} unreadable left out"] if self.unreadable else []
        remarks += [f"{n} {what} left out" for what, n in self.left_out.items()]
        shape = "x".join(map(str, self.shape))
        counts = f"{self.n_train} training and {self.n_test} test images of {shape}, {len(self.classes)} classes"
        return ", ".join([f"{self.target}: {counts}", *remarks])


def check_target(target: Path) -> None:
    """Raise `UsageError` unless ``target`` can be the path of a data file."""
    if target.suffix not in SUFFIXES or not target.parent.is_dir() or target.is_dir():
        raise UsageError(f"cannot write {target}: give the path of an {SUFFIXES[0]} file in a folder that exists")


def replace_data(target: Path, fill: Callable[[ContainedFile], T]) -> T:
    """Write a data file with its digest in place of the one at ``target``; return what ``fill`` returns.

    Raises:
        UsageError: The disk refuses; ``target`` is as it was, and nothing else is left.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with ContainedFile(temporary) as output:
            result = fill(output)
            digest.add(output)
            output.sync()
        os.replace(temporary, target)
        sync(target.parent)
        return result
    except OSError as error:
        raise UsageError(f"cannot write {target} ({reason(error)}): {remedy(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class ImageWriter:
    """Fills a data file from front to back, a chunk at a time, and measures the training images meanwhile.

    Args:
        file: The data file.
        check: Raises an error of the disk after a chunk.
    """

    def __init__(self, file: h5py.File, check: Callable[[], None]) -> None:
        self.file, self._check = file, check
        self.n = [0, 0]  # images written to each split
        chunks = [file[split]["images"].chunks for split in SPLITS]
        self._images = [np.empty(chunk, np.uint8) for chunk in chunks]
        self._labels = [np.empty(chunk[0], np.int64) for chunk in chunks]
        self._waiting = [0, 0]
        self._histogram = np.zeros((chunks[0][1], 256), np.int64)  # (C, 256) of the training images

    def fill(self, images: Decoded, places: dict[str, tuple[int, int]]) -> list[str]:
        """Write all images with their (label, split), and return the names of those that are None."""
        unreadable = []
        for name, image in images:
            if image is None:
                unreadable.append(name)
                continue
            label, split = places[name]
            place = self._waiting[split]
            self._images[split][place], self._labels[split][place] = image, label
            self._waiting[split] += 1
            if self._waiting[split] == len(self._labels[split]):
                self._flush(split)
        return unreadable

    def close(self) -> None:
        """Write the last chunk, drop the rows of skipped images, and store the mean and standard deviation."""
        for split, name in enumerate(SPLITS):
            self._flush(split)
            if not self.n[split]:
                raise UsageError(f"no {name} image could be decoded: repair the images")
            for array in self.file[name].values():
                array.resize(self.n[split], axis=0)
        pixel = np.arange(256) / 255
        share = self._histogram / self._histogram.sum(axis=1, keepdims=True)
        mean = share @ pixel
        std = np.sqrt(np.maximum(share @ pixel**2 - mean**2, 0))
        self.file.attrs["mean"] = mean
        self.file.attrs["std"] = np.where(std > 0, std, 1.0)  # a constant channel is not scaled

    def _flush(self, split: int) -> None:
        n, waiting = self.n[split], self._waiting[split]
        images = self._images[split][:waiting]
        group = self.file[SPLITS[split]]
        group["images"][n : n + waiting] = images
        group["labels"][n : n + waiting] = self._labels[split][:waiting]
        if split == 0:
            for channel, counts in enumerate(self._histogram):
                counts += np.bincount(images[:, channel].ravel(), minlength=256)
        self.n[split], self._waiting[split] = n + waiting, 0
        self._check()
