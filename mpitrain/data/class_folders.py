"""Class folders of files, in a folder or an archive, which is read without unpacking.

    CLASS/.../FILE                    no split
    train/CLASS/.../FILE, and test/   a split; also training/, and valid/, val/, validation/ or testing/, in any case

Links inside a folder are followed. A link that leads out of it or back to a folder above is refused.
Folders that contain everything else (`cifar10/train/...`) are ignored.
"""

import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, BinaryIO

from mpitrain.errors import UsageError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError)
MAX_MEMBER_BYTES = 2**28
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")


@dataclass(frozen=True)
class Place:
    """The class and the set (training or test) that the path of a file names."""

    is_test: bool | None  # None: the source is not split
    label: str


def files(source: Path, is_wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, BinaryIO]]:
    """Yield the paths and streams of the files in a folder or archive, in a fixed order, without hidden files.

    A stream is valid until the next one is requested. A file in an archive is read completely at once, so damage is
    found here. A file in an archive that is larger than ``MAX_MEMBER_BYTES`` is refused.

    Args:
        source: The folder or archive.
        is_wanted: A function that returns whether to read the file with a given name.
    """

    def reads(name: str) -> bool:
        return is_wanted(name) and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))

    if not source.exists():
        raise UsageError(f"no {source}: give a folder of class folders, or an archive of one ({' '.join(ARCHIVES)})")
    try:
        if source.is_dir():
            yield from _in_folder(source, reads)
        elif source.name.lower().endswith(".zip"):
            yield from _in_zip(source, reads)
        elif source.name.lower().endswith(ARCHIVES):
            yield from _in_tar(source, reads)
        else:
            raise UsageError(f"{source} is neither a folder nor an archive: give one of these ({' '.join(ARCHIVES)})")
    except DAMAGE as error:
        raise UsageError(
            f"{source} cannot be read to its end ({error}): it is damaged or incomplete; download it again"
        ) from error


def places(names: Sequence[str]) -> list[Place]:
    """Return the class and the set that each path names; the paths of all files are needed to tell."""
    paths = [[part for part in name.split("/") if part not in ("", ".")] for name in names]
    while paths and len({path[0] for path in paths}) == 1 and min(map(len, paths)) > 2:
        paths = [path[1:] for path in paths]
    for name, path in zip(names, paths, strict=True):
        if len(path) < 2:
            raise UsageError(f"{name} is in no class folder: move it into one, or remove it")
    tops = {path[0] for path in paths}
    trains, tests = ({top for top in tops if top.casefold() in known} for known in (TRAIN_NAMES, TEST_NAMES))
    others = tops - trains - tests
    if not (trains and tests) and (others or len(tests) < 2):
        return [Place(None, path[0]) for path in paths]
    if not trains:
        raise UsageError(f"{' and '.join(sorted(tests))} exist, but no train: name the folder of training images train")
    if others:
        raise UsageError(
            f"{min(others)} exists next to {min(trains)} and {min(tests)}: it is no part of the split; move it away"
        )
    if len(trains) > 1:
        raise UsageError(f"both {' and '.join(sorted(trains))} exist: keep one as the training set")
    if len(tests) > 1:
        raise UsageError(f"both {' and '.join(sorted(tests))} exist next to {min(trains)}: keep one as the test set")
    for name, path in zip(names, paths, strict=True):
        if len(path) < 3:
            raise UsageError(f"{name} is in no class folder: move it into one, or remove it")
    found = [Place(path[0] in tests, path[1]) for path in paths]
    unknown = {place.label for place in found if place.is_test} - {place.label for place in found if not place.is_test}
    if unknown:
        raise UsageError(
            f"class {min(unknown)} is in {min(tests)} but not in {min(trains)}: a class needs training images"
        )
    return found


def _content(stream: IO[bytes], name: str, declared: int) -> BinaryIO:
    """Return the content of a member of an archive.

    Raises:
        UsageError: It is too large for an image, or says so.
    """
    with stream:
        content = b"" if declared > MAX_MEMBER_BYTES else stream.read(MAX_MEMBER_BYTES + 1)
    if max(declared, len(content)) > MAX_MEMBER_BYTES:
        raise UsageError(f"{name} has more than {MAX_MEMBER_BYTES >> 20} MiB, too much for an image: remove it")
    return BytesIO(content)


def _in_folder(source: Path, reads: Callable[[str], bool]) -> Iterator[tuple[str, BinaryIO]]:
    for path in sorted(_walk(source)):
        if reads(path.relative_to(source).as_posix()):
            with path.open("rb") as stream:
                yield path.relative_to(source).as_posix(), stream


def _walk(source: Path) -> Iterator[Path]:
    """Yield all files of a folder, also behind links.

    Raises:
        UsageError: A link leads out of the folder, to a folder that contains it, or to nothing.
    """
    inside = source.resolve()
    for folder, names, file_names in os.walk(source, followlinks=True):
        names[:] = [name for name in names if not name.startswith(".")]
        file_names = [name for name in file_names if not name.startswith(".")]
        for name in (*names, *file_names):
            path = Path(folder, name)
            if not path.is_symlink():
                continue
            target = Path(os.path.realpath(path))
            if not target.exists():
                raise UsageError(f"{path} is a link to nothing ({target}): repair or remove it")
            if inside not in (target, *target.parents):
                raise UsageError(f"{path} is a link out of the folder, to {target}: import that folder, or copy it")
            if target in (Path(folder).resolve(), *Path(folder).resolve().parents):
                raise UsageError(f"{path} is a link to a folder that contains it ({target}): remove it")
        yield from (path for name in file_names if (path := Path(folder, name)).is_file())


def _in_zip(source: Path, reads: Callable[[str], bool]) -> Iterator[tuple[str, BinaryIO]]:
    with zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            if not member.is_dir() and reads(member.filename):
                yield member.filename, _content(archive.open(member), member.filename, member.file_size)


def _in_tar(source: Path, reads: Callable[[str], bool]) -> Iterator[tuple[str, BinaryIO]]:
    with tarfile.open(source) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.isfile() and reads(member.name) else None
            if stream is not None:
                yield member.name, _content(stream, member.name, member.size)
