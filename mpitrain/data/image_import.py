"""Import of class folders of image files into a data file.

The source is read twice, because an archive can only be read from end to end. The first pass reads names and image
headers, from which classes, split, size and colours follow; the second pass decodes the images and writes each one
once, a chunk at a time.
"""

import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from mpitrain.data.class_folders import files, is_hidden, places
from mpitrain.data.data_writer import Decoded, ImageWriter, Imported, check_target, replace_data
from mpitrain.data.hdf5_format import create
from mpitrain.data.stratified_split import stratified_split
from mpitrain.errors import UsageError
from mpitrain.log import is_terminal
from mpitrain.records.contained_file import ContainedFile

SIDEWAYS = (5, 6, 7, 8)
"""Orientations of EXIF that exchange height and width."""

BACKGROUND = "white"
TURNED, ON_WHITE = "turned as EXIF says", f"put on {BACKGROUND} for their transparency"
FIRST, RESIZED = "reduced to the first frame", "resized"
FROM_CMYK, FROM_16_BITS = "converted from CMYK", "reduced from 16 to 8 bits per channel"
"""What is done to images, for the last line."""

NO_IMAGES, HIDDEN = "files that are no images", "hidden files"
"""What is left out, for the last line."""

DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # more than 8 bits a channel, which Pillow would clip


@dataclass(frozen=True)
class Header:
    """The properties of an image that its header states."""

    size: tuple[int, int]  # (W, H), upright
    mode: str  # Pillow's
    conversions: tuple[str, ...]

    @property
    def is_coloured(self) -> bool:
        """Whether the image has colours."""
        return self.mode not in ("1", "L", "LA")


@dataclass
class Survey:
    """The results of the first pass over the source."""

    headers: dict[str, Header] = field(default_factory=dict)  # of readable images, in the order of the source
    unreadable: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def most_common_size(self) -> tuple[int, int]:
        """Return the most common size (W, H)."""
        return Counter(header.size for header in self.headers.values()).most_common(1)[0][0]

    def conversions(self, width: int, height: int) -> dict[str, int]:
        """Return the number of images that undergo each kind of conversion, if images are stored with this size."""
        headers = self.headers.values()
        found = Counter(what for header in headers for what in header.conversions)
        found[RESIZED] = sum(header.size != (width, height) for header in headers)
        return {what: n for what, n in found.items() if n}


@dataclass(frozen=True)
class Assignment:
    """The class and the set of each image file, in the order of the source."""

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    is_test: NDArray[np.bool_]

    def by_name(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Return (label, split) of each image file; split 1 is the test set."""
        return {name: (int(label), int(test)) for name, label, test in zip(names, self.labels, self.is_test)}


def import_images(
    source: Path,
    target: Path,
    *,
    size: tuple[int, int] | None = None,
    test_fraction: float = 0.1,
    test_set: str | None = None,
    seed: int = 0,
    skip_unreadable: bool = False,
    progress: bool = True,
) -> Imported:
    """Write a data file from class folders of images. When it is complete, it replaces an older file.

    Args:
        source: A folder or archive of class folders; see `class_folders.py`.
        target: The file to write.
        size: (H, W) of the stored images; by default the most common size.
        test_fraction: The share of each class to put into the test set, if the source is not split.
        test_set: The folder of the test set, if the source has several test sets, or one with an unusual name.
        seed: The seed that selects the test images, if the source is not split.
        skip_unreadable: Whether to leave out images that cannot be decoded, instead of raising an error.
        progress: Whether to show a progress bar on standard error, if that is a terminal.
    """
    check_target(target)
    survey = _survey(source, progress)
    _report_unreadable(survey.unreadable, skip_unreadable)
    if not survey.headers:
        raise UsageError(f"{source} holds no images that Pillow can read: give class folders of image files")
    assigned = _assign(source, survey, test_set, test_fraction, seed)
    height, width = size or survey.most_common_size()[::-1]
    shape = (3 if any(header.is_coloured for header in survey.headers.values()) else 1, height, width)
    by_name = assigned.by_name(survey.headers)
    n_test = int(assigned.is_test.sum())

    def fill(output: ContainedFile) -> tuple[ImageWriter, list[str]]:
        with h5py.File(output, "w") as file:
            create(file, classes=assigned.classes, shape=shape, n=(len(by_name) - n_test, n_test))
            writer = ImageWriter(file, output.check)
            unreadable = survey.unreadable + writer.fill(_decoded(source, by_name, shape, progress), by_name)
            _report_unreadable(unreadable, skip_unreadable)
            writer.close()
            return writer, unreadable

    writer, unreadable = replace_data(target, fill)
    converted = survey.conversions(width, height)
    return Imported(
        target, writer.n[0], writer.n[1], shape, assigned.classes, tuple(unreadable), converted, survey.left_out
    )


def _assign(source: Path, survey: Survey, test_set: str | None, test_fraction: float, seed: int) -> Assignment:
    """Return the class and the set of each file: the source's own split, or a stratified one.

    Images of further test sets are removed from the survey, and counted there.
    """
    everything = dict(zip(survey.headers, places(list(survey.headers), test_set), strict=True))
    for name in [name for name, place in everything.items() if place is None]:
        survey.left_out["images of other test sets"] += 1
        del survey.headers[name]
    names, found = list(survey.headers), [place for place in everything.values() if place is not None]
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


def _survey(source: Path, progress: bool) -> Survey:
    """Read the headers of all images."""
    survey = Survey()
    Image.preinit()  # so that common formats are tried first
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}

    def may_be_image(name: str) -> bool:
        reason = HIDDEN if is_hidden(name) else "" if Path(name).suffix.lower() in {*suffixes, ""} else NO_IMAGES
        survey.left_out.update([reason] if reason else [])
        return not reason

    found = files(source, may_be_image)
    for name, stream in _bar(found, "reading headers", progress):
        try:
            header = _header(stream)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            if Path(name).suffix:
                survey.unreadable.append(name)
            else:  # a file without a suffix is an image only if its content says so
                survey.left_out[NO_IMAGES] += 1
            continue
        if header.mode in DEEP_MODES:
            raise UsageError(f"{name} has more than 8 bits per channel ({header.mode}): convert it to 8 bits")
        survey.headers[name] = header
    return survey


def _header(stream: BinaryIO) -> Header:
    """Read the header of an image.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: It is no image, or damaged.
    """
    with Image.open(stream) as image:
        size, mode = image.size, image.mode
        is_deep = any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))  # Pillow keeps the upper byte
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        applies = {
            TURNED: orientation in range(2, 9),
            ON_WHITE: image.has_transparency_data,
            FIRST: getattr(image, "n_frames", 1) > 1,
            FROM_CMYK: mode == "CMYK",
            FROM_16_BITS: is_deep,
        }
    upright = size[::-1] if orientation in SIDEWAYS else size
    return Header(upright, mode, tuple(what for what, is_done in applies.items() if is_done))


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
