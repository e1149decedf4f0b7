"""Waking a thread that sleeps in ``poll(2)``: pipes, the files in which MPI waits for sockets, short time slices."""

from __future__ import annotations

import ctypes
import os
import platform
import select
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from mpitrain.kernels.native import service

SLICE_NANOSECONDS = 100_000
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # numbers of the system call


class WakeupPipe:
    """A pipe with which a thread wakes another thread.

    Args:
        blocking: Whether the other thread sleeps in ``wait`` instead of in ``poll(2)`` with other files.
    """

    def __init__(self, *, blocking: bool = False) -> None:
        self.reads, self.writes = os.pipe()
        os.set_blocking(self.reads, blocking)
        os.set_blocking(self.writes, False)

    def wake(self) -> None:
        """Wake the other thread. If it is not asleep, its next sleep ends at once. Local."""
        with suppress(BlockingIOError):  # the pipe is full: the thread will wake
            os.write(self.writes, b"!")

    def wait(self) -> None:
        """Sleep until another thread calls ``wake``. Local."""
        os.read(self.reads, service.DRAIN_BYTES)

    def __del__(self) -> None:
        for end in (self.reads, self.writes):
            os.close(end)


def event_files() -> list[int]:
    """Return the epoll files of this process. MPI may wait for its sockets with one of them. Local; Linux only."""
    found = []
    for path in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):  # the file of the folder itself is closed by now
            if path.readlink().name == "anon_inode:[eventpoll]":
                found.append(int(path.name))
    return found


def poll_structs(files: Sequence[int]) -> np.ndarray:
    """Return a ``struct pollfd`` for each file, with which ``poll(2)`` waits until the file is readable. Local."""
    kind = np.dtype([("fd", np.int32), ("events", np.int16), ("revents", np.int16)])
    return np.array([(file, select.POLLIN, 0) for file in files], kind)


def request_short_slices() -> None:
    """Request short time slices for this thread, so that it runs soon after it wakes. Local.

    Otherwise, a thread that wakes may wait some milliseconds, until the time slice of a computing thread ends. This
    needs Linux 6.12 or later; on other systems, the call has no effect.
    """
    number = SCHED_SETATTR.get(platform.machine())
    if sys.platform == "linux" and number is not None and os.sched_getscheduler(0) == os.SCHED_OTHER:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        # struct sched_attr: its size, the normal policy, no flags; nice, no priority; the slice in nanoseconds.
        attributes = struct.pack("=IIQiIQQQ", 48, 0, 0, nice, 0, SLICE_NANOSECONDS, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, attributes, 0)
