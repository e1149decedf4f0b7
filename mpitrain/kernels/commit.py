"""Commits to a parameter server and pulls from it: DOWNPOUR and its descendants.

x is the worker's parameters, o (origin) the parameters it last pulled, c the center. A commit is a displacement d. It
is guarded: non-finite elements are dropped, and the pull that follows gives the worker finite parameters again. A
commit and the pull after it are one pass under one lock, so that the pull sees the commit.
"""

from __future__ import annotations

from typing import Final

from mpitrain.kernels.compile.declare import Kernel

_DOWNPOUR: Final = "Dean et al. 2012, as run by Zhang et al. 2015, arXiv 1412.6651, section 4"
_ADAG: Final = "Hermans 2017, CERN-THESIS-2017-103, ADAG"

commit_and_pull: Final = Kernel(
    "commit_and_pull",
    """
    d = a * (x - o)
    c = c + d
    x = c
    o = c
    """,
    arrays="x o c",
    scalars="a",
    guard="d",
    source=f"{_DOWNPOUR} (a = 1); Hermans 2017, arXiv 1710.02368 (a = 1/lambda)",
    doc="Commit a times the worker's displacement, then pull.",
)

commit_only: Final = Kernel(
    "commit_only",
    """
    d = x - o
    c = c + d
    o = x
    """,
    arrays="x o c",
    guard="d",
    source=f"{_DOWNPOUR}, n_push",
    doc="Commit the worker's displacement without pulling; the next displacement starts from x.",
)

pull_only: Final = Kernel(
    "pull_only",
    """
    d = x - o
    x = c
    o = c - d
    """,
    arrays="x o c",
    guard="d",
    source=f"{_DOWNPOUR}, n_fetch",
    doc="Pull the center and set o so that the uncommitted displacement remains x - o.",
)

commit_averaged: Final = Kernel(
    "commit_averaged",
    """
    d = x - o
    c = c + d
    x = c
    o = c
    z = (1 - a) * z + a * c
    """,
    arrays="x o c z",
    scalars="a",
    guard="d",
    source="Zhang et al. 2015, arXiv 1412.6651, section 5: ADOWNPOUR (a = 1/(t+1)) and MVADOWNPOUR",
    doc="Commit, pull, and update the running average z of the center.",
)

commit_gathered: Final = Kernel(
    "commit_gathered",
    """
    d = a * v
    c = c + d
    x = c
    v = 0
    """,
    arrays="x v c",
    scalars="a",
    guard="d",
    source=f"{_DOWNPOUR}: the accumulated gradients; Hermans 2017, arXiv 1710.02368",
    doc="Commit a times the steps gathered in v, pull, and reset v.",
)

gather_step: Final = Kernel(
    "gather_step",
    "v = v - eta * (g + decay * x)",
    arrays="v g x",
    scalars="eta decay",
    source=_DOWNPOUR,
    doc="Add a step of plain SGD to v and leave x unchanged.",
)

master_momentum: Final = Kernel(
    "master_momentum",
    """
    d = eta * (g + decay * x)
    v = delta * v - d
    c = c + v
    x = c + delta * v
    """,
    arrays="x g c v",
    scalars="eta delta decay",
    guard="d",
    source="Zhang et al. 2015, arXiv 1412.6651, section 5: MDOWNPOUR, in the look-ahead form of Nesterov momentum",
    doc="Take a momentum step of the center, and give the worker the next look-ahead point x.",
)

adag_commit: Final = Kernel(
    "adag_commit",
    """
    e = c - o
    d = a * (x - o) / (k * e * e + 1)
    c = c + d
    x = c
    o = c
    """,
    arrays="x o c",
    scalars="a k",
    guard="d",
    source=f"{_ADAG}, scaled at the center",
    doc="Commit, damped by how far (e) the center has moved since the pull, then pull; k = 1/gamma.",
)

adag_scale: Final = Kernel(
    "adag_scale",
    """
    e = c - o
    d = a * (x - o) / (k * e * e + 1)
    x = d
    o = c
    """,
    arrays="x o c",
    scalars="a k",
    guard="d",
    source=f"{_ADAG}, scaled at the worker",
    doc="Pull c to o and put the damped displacement in x, for adag_push to commit.",
)

adag_push: Final = Kernel(
    "adag_push",
    """
    d = x
    c = c + d
    o = o + d
    x = o
    """,
    arrays="x o c",
    guard="d",
    source=f"{_ADAG}, scaled at the worker",
    doc="Commit the displacement that adag_scale put in x, and continue from the pulled o plus it.",
)

KERNELS: Final = (
    *(commit_and_pull, commit_only, pull_only, commit_averaged, commit_gathered, gather_step, master_momentum),
    *(adag_commit, adag_scale, adag_push),
)
