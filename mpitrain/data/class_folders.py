"""Class folders of files, in a folder or in an archive. An archive is read without unpacking it.

    CLASS/.../FILE                                no split
    train/CLASS/.../FILE, test/CLASS/.../FILE     a split; also training/ and TEST_NAMES, in upper or lower case

Links inside the source folder are followed. A link that leads out of it or back to a folder above is refused. In an
archive, a backslash separates folders as a slash does, a root or a drive is ignored, and ``..`` and repeated names are
refused. An outer folder that contains everything else, such as `cifar10` in `cifar10/train/...`, is ignored.
"""

import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, BinaryIO

from mpitrain.errors import UsageError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError)
MAX_MEMBER_BYTES = 2**28
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation")


@dataclass(frozen=True)
class Place:
    """The class and the set (training or test) that the path of a file names."""

    is_test: bool | None  # None: the source is not split
    label: str


def files(source: Path, is_wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, BinaryIO]]:
    """Yield the paths and streams of the files in a folder or archive, in a fixed order.

    A stream is valid until the next one is requested. A file in an archive is read completely at once, so damage is
    found here. A file in an archive that is larger than ``MAX_MEMBER_BYTES`` is refused.

    Args:
        source: The folder or archive.
        is_wanted: A function that returns whether to read the file with a given path.
    """
    if not source.exists():
        raise UsageError(f"no {source}: give a folder of class folders, or an archive of one ({' '.join(ARCHIVES)})")
    try:
        if source.is_dir():
            yield from _in_folder(source, is_wanted)
        elif source.name.lower().endswith(".zip"):
            yield from _in_zip(source, is_wanted)
        elif source.name.lower().endswith(ARCHIVES):
            yield from _in_tar(source, is_wanted)
        else:
            raise UsageError(f"{source} is neither a folder nor an archive: give one of these ({' '.join(ARCHIVES)})")
    except DAMAGE as error:
        raise UsageError(
            f"{source} cannot be read to its end ({error}): it is damaged or incomplete; download it again"
        ) from error


def is_hidden(name: str) -> bool:
    """Return whether the path of a file leads through a hidden file or folder."""
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def places(names: Sequence[str], test_set: str | None = None) -> list[Place | None]:
    """Return the class and the set of each file, from the paths of all files; None for a file of a further test set.

    Args:
        names: The paths.
        test_set: The folder of the test set, if several folders may be it.

    Raises:
        UsageError: It is not clear which folders contain the training set and the test set.
    """
    paths = [[part for part in name.split("/") if part not in ("", ".")] for name in names]
    while paths and len({path[0] for path in paths}) == 1 and min(map(len, paths)) > 2:
        paths = [path[1:] for path in paths]
    for name, path in zip(names, paths, strict=True):
        if len(path) < 2:
            raise UsageError(f"{name} is in no class folder: move it into one, or remove it")
    tops = {path[0] for path in paths}
    trains, tests = ({top for top in tops if top.casefold() in known} for known in (TRAIN_NAMES, TEST_NAMES))
    if test_set is not None:
        if test_set not in tops - trains:
            raise UsageError(f"there is no folder {test_set} for the test set: there are {', '.join(sorted(tops))}")
        tests.add(test_set)
    others = tops - trains - tests
    if not (trains and tests) and (others or len(tests) < 2) and test_set is None:
        _refuse_unknown_set(paths, trains, others)
        return [Place(None, path[0]) for path in paths]
    if not trains:
        raise UsageError(f"{' and '.join(sorted(tests))} exist, but no train: name the folder of training images train")
    if others:
        raise UsageError(
            f"{min(others)} exists next to {min(trains)} and {min(tests)}: it is no part of the split; move it away"
        )
    if len(trains) > 1:
        raise UsageError(f"both {' and '.join(sorted(trains))} exist: keep one as the training set")
    if len(tests) > 1 and test_set is None:
        raise UsageError(
            f"both {' and '.join(sorted(tests))} exist next to {min(trains)}, but a data file holds one test set: "
            f"choose it, for example with --test-set {min(tests)}; images of the other are left out"
        )
    tests = {test_set or min(tests)}
    for name, path in zip(names, paths, strict=True):
        if len(path) < 3:
            raise UsageError(f"{name} is in no class folder: move it into one, or remove it")
    found = [Place(path[0] in tests, path[1]) if path[0] in tests | trains else None for path in paths]
    labels = [{place.label for place in found if place and place.is_test is test} for test in (True, False)]
    if unknown := labels[0] - labels[1]:
        raise UsageError(
            f"class {min(unknown)} is in {min(tests)} but not in {min(trains)}: a class needs training images"
        )
    return found


def _refuse_unknown_set(paths: Sequence[Sequence[str]], trains: Set[str], others: Set[str]) -> None:
    """Refuse a folder with the classes of the training set whose name does not say that it is the test set."""
    below = {top: {path[1] for path in paths if path[0] == top and len(path) > 2} for top in (*trains, *others)}
    classes = set().union(*(below[top] for top in trains))
    alike = sorted(top for top in others if below[top] & classes)
    if alike:
        raise UsageError(
            f"{alike[0]} has the same class folders as {min(trains)}: if it is the test set, use "
            f"--test-set {alike[0]}, else move it away"
        )


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


def _path_of(member: str, seen: set[str]) -> str:
    """Return the path of a member of an archive, with slashes, relative to the root of the archive.

    Raises:
        UsageError: It leads out of the archive, or another member has the same path.
    """
    parts = [part for part in member.replace("\\", "/").split("/") if part not in ("", ".")]
    parts = parts[1:] if re.fullmatch("[A-Za-z]:", parts[0]) else parts
    if ".." in parts:
        raise UsageError(f"{member} leads out of the archive: pack the folder again without ..")
    path = "/".join(parts)
    if path in seen:
        raise UsageError(f"{path} is in the archive more than once: unpack it and import the folder")
    seen.add(path)
    return path


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
        for name in (*names, *file_names):
            if name.startswith("."):
                continue
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
    seen: set[str] = set()
    with zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            if member.filename.endswith(("/", "\\")):
                continue
            path = _path_of(member.filename, seen)
            if reads(path):
                yield path, _content(archive.open(member), path, member.file_size)


def _in_tar(source: Path, reads: Callable[[str], bool]) -> Iterator[tuple[str, BinaryIO]]:
    seen: set[str] = set()
    with tarfile.open(source) as archive:
        for member in archive:
            if not member.isfile():
                continue
            path = _path_of(member.name, seen)
            stream = archive.extractfile(member) if reads(path) else None
            if stream is not None:
                yield path, _content(stream, path, member.size)
