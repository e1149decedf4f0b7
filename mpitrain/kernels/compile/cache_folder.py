"""Folders of cached code that only this user can have written.

Cached kernels are executed. A folder is trusted if it belongs to this user, if neither its group nor others may write
to it, and if nobody else can replace it: each folder above belongs to this user or to root, and is writable for no
other, except for a sticky folder such as /tmp. New folders are private.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mpitrain.errors import printable
from mpitrain.log import logger

_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


@functools.cache
def roots() -> tuple[Path, ...]:
    """Return the trusted folders in which files can be created. A full folder counts, since it may contain kernels."""
    found = []
    for candidate in _candidates():
        try:
            make_private(candidate)
            if problem := objection(candidate):
                logger.warning("compiled kernels are not cached in %s: %s", candidate, problem)
                continue
            with tempfile.TemporaryFile(dir=candidate):
                found.append(candidate)
        except OSError:
            continue
    return tuple(found)


def objection(folder: Path) -> str | None:
    """Return the reason why code in an existing folder must not be executed; None if it may."""
    place = Path(os.path.realpath(folder))
    for path in (place, *place.parents):
        found = path.stat()
        if found.st_uid != os.getuid() and (path == place or found.st_uid != 0):
            return printable(f"{path} belongs to another user ({found.st_uid})")
        is_sticky_parent = path != place and found.st_mode & stat.S_ISVTX
        if found.st_mode & _WRITABLE and not is_sticky_parent:
            return printable(f"{path} can be written by others (chmod go-w makes it private)")
    return None


def make_private(folder: Path) -> None:
    """Create a folder and its missing parents, accessible for this user only."""
    if not folder.parent.exists():
        make_private(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def drop_foreign(folder: Path) -> None:
    """Remove everything that another user may have written from a sub-folder of a trusted folder.

    Raises:
        OSError: The folder itself is not private.
    """
    for path in [folder, *folder.rglob("*")]:
        try:
            found = path.lstat()
        except FileNotFoundError:  # a temporary file of another process
            continue
        if found.st_uid == os.getuid() and not found.st_mode & _WRITABLE and not stat.S_ISLNK(found.st_mode):
            continue
        if path == folder:
            raise PermissionError(f"{folder} can be written by others")
        if stat.S_ISDIR(found.st_mode):
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def protect(folder: Path) -> None:
    """Make the files in a folder private. The libraries that write them apply only the user's umask."""
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process has just replaced it
            path.chmod(0o700 if path.is_dir() else 0o600)


def _candidates() -> Iterator[Path]:
    """Yield $MPITRAIN_CACHE_DIR, $XDG_CACHE_HOME/mpitrain, ~/.cache/mpitrain and a temporary folder of this user."""
    if named := os.environ.get("MPITRAIN_CACHE_DIR"):
        yield Path(named)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        yield Path(xdg) / "mpitrain"
    home = os.path.expanduser("~")  # Path.home() raises where a container's user has none
    if os.path.isabs(home):
        yield Path(home) / ".cache" / "mpitrain"
    temporary = Path(tempfile.gettempdir()) / f"mpitrain-{os.getuid()}"
    if not temporary.is_symlink():
        yield temporary
