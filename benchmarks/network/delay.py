"""A link between two network namespaces that delays and loses frames, for kernels without netem.

    delay.py MILLISECONDS FRACTION PID PID READY

Each namespace, given by a process that lives in it, gets a TAP device eth0; what one sends the other receives after
the delay, in order, but for a FRACTION of all frames, which are lost. The file READY is made when both devices are
there. Runs until it is killed.

It shares the cores with what is measured, so it must cost little: the devices hand over up to 64 KiB of a TCP stream as
one frame, before a network card would have cut it, as they do between virtual machines. The header in front of each
frame that says so (virtio_net_hdr) is passed on with it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x400454CA, 0x2, 0x1000, 0x4000
TUNSETOFFLOAD, TUN_F_CSUM, TUN_F_TSO4 = 0x400454D0, 0x1, 0x2
LONGEST_FRAME = 66_000


def open_tap(pid: int) -> int:
    """Create the device eth0 in the network namespace of ``pid``."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    for space, inside in ((there, True), (home, False)):
        if libc.setns(space, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(space)
        if inside:
            tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
            fcntl.ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    return tap


def forward(taps: tuple[int, int], delay_seconds: float, lost_fraction: float) -> None:
    """Forward frames forever."""
    under_way: deque[tuple[float, int, bytes]] = deque()  # in the order of arrival: the delay is the same for all
    other = {taps[0]: taps[1], taps[1]: taps[0]}
    while True:
        timeout = max(under_way[0][0] - time.monotonic(), 0) if under_way else None
        for tap in select.select(taps, [], [], timeout)[0]:  # epoll would round up to milliseconds
            frame = os.read(tap, LONGEST_FRAME)
            if not lost_fraction or random.random() >= lost_fraction:
                under_way.append((time.monotonic() + delay_seconds, other[tap], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, tap, frame = under_way.popleft()
            with suppress(OSError):  # nobody listens on a device that is not up yet
                os.write(tap, frame)


def main() -> None:
    """Run the link. It never returns."""
    milliseconds, fraction, *pids, ready = sys.argv[1:]
    taps = open_tap(int(pids[0])), open_tap(int(pids[1]))
    Path(ready).touch()
    forward(taps, float(milliseconds) / 1e3, float(fraction))


if __name__ == "__main__":
    main()
