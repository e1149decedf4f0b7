"""Import of class folders of image files into a data file.

The source is read twice, because an archive can only be read from end to end. The first pass reads names and image
headers, from which classes, split, size and colours follow; the second pass decodes the images and writes each one
once, a chunk at a time.
"""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from mpitrain.data import digest
from mpitrain.data.class_folders import files, places
from mpitrain.data.hdf5_format import SPLITS, SUFFIXES, create
from mpitrain.data.stratified_split import stratified_split
from mpitrain.errors import UsageError, reason
from mpitrain.log import is_terminal
from mpitrain.records.contained_file import ContainedFile
from mpitrain.records.durable import remedy, sync

SIDEWAYS = (5, 6, 7, 8)
"""Orientations of EXIF that exchange height and width."""

BACKGROUND = "white"
TURNED, ON_WHITE = "turned as EXIF says", f"put on {BACKGROUND} for their transparency"
FIRST, RESIZED = "reduced to the first frame", "resized"
"""What is done to images, for the last line."""

DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # more than 8 bits a channel, which Pillow would clip

T = TypeVar("T")
Decoded = Iterator[tuple[str, NDArray[np.uint8] | None]]  # name; (C, H, W), or None if it cannot be decoded


@dataclass(frozen=True)
class Imported:
    """The outcome of an import."""

    target: Path
    n_train: int
    n_test: int
    shape: tuple[int, int, int]  # (C, H, W)
    classes: tuple[str, ...]
    unreadable: tuple[str, ...]  # images that were left out
    converted: Mapping[str, int]  # how many images were changed, by what was done to them
    n_other_files: int  # files that are no images


@dataclass
class Survey:
    """The findings of the first pass."""

    names: list[str] = field(default_factory=list)  # image files with a readable header, in the order of the source
    unreadable: list[str] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (W, H)
    coloured: bool = False
    converted: Counter[str] = field(default_factory=Counter)
    n_other_files: int = 0

    def conversions(self, width: int, height: int) -> dict[str, int]:
        """Return the number of images that undergo each kind of conversion, if images are stored with this size."""
        n_resized = sum(n for size, n in self.sizes.items() if size != (width, height))
        return {**self.converted, **({RESIZED: n_resized} if n_resized else {})}


@dataclass(frozen=True)
class Assignment:
    """The class and the set of each image file, in the order of the source."""

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    is_test: NDArray[np.bool_]

    def by_name(self, names: list[str]) -> dict[str, tuple[int, int]]:
        """Return (label, split) of each image file; split 1 is the test set."""
        return {name: (int(label), int(test)) for name, label, test in zip(names, self.labels, self.is_test)}


def import_images(
    source: Path,
    target: Path,
    *,
    size: tuple[int, int] | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    skip_unreadable: bool = False,
    progress: bool = True,
) -> Imported:
    """Write a data file from class folders of images.

    The file appears when it is complete, and then replaces an older one.

    Args:
        source: A folder or archive of class folders; see `class_folders.py`.
        target: The file to write.
        size: (H, W) of the stored images; by default the most common size.
        test_fraction: The share of each class to put into the test set, for a source that is not split.
        seed: The seed that selects these images.
        skip_unreadable: Leave out images that cannot be decoded, instead of raising.
        progress: Show a progress bar on standard error, if that is a terminal.
    """
    if target.suffix not in SUFFIXES or not target.parent.is_dir() or target.is_dir():
        raise UsageError(f"cannot write {target}: give the path of an {SUFFIXES[0]} file in a folder that exists")
    survey = _survey(source, progress)
    _report_unreadable(survey.unreadable, skip_unreadable)
    if not survey.names:
        raise UsageError(f"{source} holds no images that Pillow can read: give class folders of image files")
    assigned = _assign(source, survey.names, test_fraction, seed)
    height, width = size or survey.sizes.most_common(1)[0][0][::-1]
    shape = (3 if survey.coloured else 1, height, width)
    by_name = assigned.by_name(survey.names)
    n_test = int(assigned.is_test.sum())

    def fill(output: ContainedFile) -> tuple[_Writer, list[str]]:
        with h5py.File(output, "w") as file:
            create(file, classes=assigned.classes, shape=shape, n=(len(by_name) - n_test, n_test))
            writer = _Writer(file, output.check)
            unreadable = survey.unreadable + writer.fill(_decoded(source, by_name, shape, progress), by_name)
            _report_unreadable(unreadable, skip_unreadable)
            writer.close()
            return writer, unreadable

    writer, unreadable = _replace(target, fill)
    converted = survey.conversions(width, height)
    return Imported(
        target, writer.n[0], writer.n[1], shape, assigned.classes, tuple(unreadable), converted, survey.n_other_files
    )


def _replace(target: Path, fill: Callable[[ContainedFile], T]) -> T:
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


def _assign(source: Path, names: list[str], test_fraction: float, seed: int) -> Assignment:
    """Return the class and the set of each file: the source's own split, or a stratified one."""
    found = places(names)
    classes = tuple(sorted({place.label for place in found}))
    labels = np.searchsorted(np.array(classes), [place.label for place in found]).astype(np.int64)
    if found[0].is_test is None:
        by_name = np.argsort(np.array(names))  # so that the split does not depend on the order of the source
        is_test = np.empty(len(found), np.bool_)
        is_test[by_name] = stratified_split(labels[by_name], test_fraction, seed)
    else:
        is_test = np.array([place.is_test for place in found])
    if not is_test.any():
        raise UsageError(f"{source} has one image per class, so none is left for testing: add images, or a test folder")
    return Assignment(classes, labels, is_test)


class _Writer:
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


def _survey(source: Path, progress: bool) -> Survey:
    """Read the headers of all images."""
    survey = Survey()
    Image.preinit()  # so that common formats are tried first
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}

    def may_be_image(name: str) -> bool:
        is_image = Path(name).suffix.lower() in {*suffixes, ""}
        survey.n_other_files += not is_image
        return is_image

    found = files(source, may_be_image)
    for name, stream in _bar(found, "reading headers", progress):
        try:
            with Image.open(stream) as image:
                size, mode = image.size, image.mode
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
                has_alpha, n_frames = image.has_transparency_data, getattr(image, "n_frames", 1)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            if Path(name).suffix:
                survey.unreadable.append(name)
            else:  # a file without a suffix is an image only if its content says so
                survey.n_other_files += 1
            continue
        if mode in DEEP_MODES:
            raise UsageError(f"{name} has more than 8 bits per channel ({mode}): convert it to 8 bits")
        survey.names.append(name)
        survey.sizes[size[::-1] if orientation in SIDEWAYS else size] += 1
        survey.converted.update(
            what
            for what, applies in ((TURNED, orientation in range(2, 9)), (ON_WHITE, has_alpha), (FIRST, n_frames > 1))
            if applies
        )
        survey.coloured |= mode not in ("1", "L", "LA")
    return survey


def _decoded(source: Path, wanted: Collection[str], shape: tuple[int, int, int], progress: bool) -> Decoded:
    """Yield the wanted images in the order of the source."""
    found = files(source, lambda name: name in wanted)
    for name, stream in _bar(found, "decoding", progress, len(wanted)):
        yield name, _decode(stream, shape)


def _decode(stream: BinaryIO, shape: tuple[int, int, int]) -> NDArray[np.uint8] | None:
    """Return an image in the given shape (C, H, W), or None if it cannot be decoded."""
    channels, height, width = shape
    try:
        with Image.open(stream) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image.convert("RGBA"))
            image = image.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.moveaxis(np.asarray(image).reshape(height, width, channels), -1, 0)


def _bar(
    items: Iterator[tuple[str, BinaryIO]], what: str, progress: bool, total: int | None = None
) -> Iterator[tuple[str, BinaryIO]]:
    return iter(tqdm(items, desc=what, total=total, unit=" images", disable=not (progress and is_terminal(sys.stderr))))


def _report_unreadable(names: list[str], skip: bool) -> None:
    if names and not skip:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UsageError(f"{names[0]}{more} cannot be decoded: repair it, or leave it out with --skip-unreadable")
