"""What this MPI does with which memory: tried once for each host, MPI and setting, and kept.

No MPI says what it can do with GPU memory, and what its documentation says does not hold everywhere: between a wrong
answer and a crash everything has been seen. So it is tried (``probe.runner``): ten operations, with host memory,
page-locked host memory and device memory, two ranks on one host. Managed memory is left out.

``mpirun -n 2 mpitrain info --probe`` measures; ``known`` is what the transports ask. The result is a JSON file in the
folder of the compiled kernels. It holds for the host, the MPI, the GPUs and the settings that it was measured with, and
no others: whoever asks with other ones finds nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpitrain.collectives.probe.runner import MEMORIES, Matrix, Outcome, child_environment, measure
from mpitrain.collectives.world.device import gpu_names
from mpitrain.kernels import cache_root

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World

FORMAT = 1
POLL_SECONDS = 0.05

SETTINGS = ("OMPI_MCA_", "UCX_", "MPIR_CVAR_", "MPICH_", "FI_")
WITHOUT_BEARING = ("OMPI_MCA_mpi_yield_when_idle",)
LIBRARY_PATH = "LD_LIBRARY_PATH"


@dataclass(frozen=True)
class Probe:
    """A result.

    Attributes:
        host: Where it was measured.
        mpi: What MPI_Get_library_version says.
        gpus: The names of those that the two ranks had, () where there is none or no CuPy.
        settings: Of the environment, as far as they choose how MPI works.
        measured: When; local time, with its offset.
        outcomes: By operation and memory.
    """

    host: str
    mpi: str
    gpus: tuple[str, ...]
    settings: dict[str, str]
    measured: str
    outcomes: Matrix

    def proved(self, operation: str, memory: str) -> bool:
        """Whether an operation worked, and moved the right bytes.

        Args:
            operation: One of ``probing.OPERATIONS``.
            memory: One of ``probing.MEMORIES``.
        """
        return self.outcomes[operation][memory].verdict == "ok"

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"format": FORMAT, **asdict(self), "gpus": list(self.gpus)}


def known() -> Probe | None:
    """What was measured on this host with this MPI, these GPUs and these settings, if anything was. Local.

    It reads a file, and asks MPI for its version and torch for the names of the GPUs.
    """
    path = _path(**_circumstances())
    return None if path is None else _read(path)


def newest() -> Probe | None:
    """What was measured last on this host with this MPI, whatever the settings were. Local."""
    root = cache_root()
    here = _circumstances()
    paths = [] if root is None else list((root / "probe").glob(f"{_file_name(here['host'])}-*.json"))
    latest_first = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
    return next((probe for probe in map(_read, latest_first) if probe is not None and probe.mpi == here["mpi"]), None)


def of_hosts(world: World, *, again: bool = False) -> list[Probe]:
    """The results of all hosts of a world. Collective.

    A rank of each host measures what is not known there if there are several ranks; the others sleep meanwhile.

    Args:
        world: The ranks.
        again: Measure in any case.

    Returns:
        One for each host, on rank 0; an empty list on the others, and where one rank alone finds nothing.
    """
    speaks = world.hosts.index(world.hosts[world.rank]) == world.rank
    found = (known() if world.size > 1 else known() or newest()) if speaks and not again else None
    measures = speaks and found is None and (again or world.size > 1)
    if any(world.comm.allgather(measures)) and world.rank == 0:
        text = "trying what this MPI does with which memory: seconds, with GPUs up to minutes; the result is kept"
        print(f"mpitrain: {text}", file=sys.stderr, flush=True)
    if measures:
        found = _measured()
    request = world.comm.Ibarrier()
    while not request.Test():
        time.sleep(POLL_SECONDS)  # the cores are for the ranks that try
    results: list[Probe | None] | None = world.comm.gather(found)
    return [probe for probe in results or [] if probe is not None]


def settings_of(environ: Mapping[str, str]) -> dict[str, str]:
    """Those settings of an environment that choose how MPI works, whichever launcher was before."""
    relevant = {
        name: value
        for name, value in sorted(child_environment(environ).items())
        if name.startswith(SETTINGS) and name not in WITHOUT_BEARING
    }
    # Launchers add folders of their own to the path. Of the libraries that it can put in front, UCX is the one that
    # MPI's version does not tell.
    folders = filter(None, environ.get(LIBRARY_PATH, "").split(os.pathsep))
    ucx = next((folder for folder in folders if any(Path(folder).glob("libucp.so*"))), None)
    return relevant if ucx is None else {**relevant, LIBRARY_PATH: os.path.realpath(ucx)}


def _measured() -> Probe:
    """A new result, kept if anything could be tried."""
    circumstances = _circumstances()
    reason = None
    if not circumstances["gpus"]:
        reason = "no CuPy: pip install 'mpitrain[gpu]'" if gpu_names() else "no GPU"
    outcomes = measure({memory: None if memory == "host" else reason for memory in MEMORIES})
    probe = Probe(**circumstances, measured=time.strftime("%Y-%m-%dT%H:%M:%S%z"), outcomes=outcomes)
    if any(outcome.verdict != "not tried" for row in outcomes.values() for outcome in row.values()):
        _keep(probe)
    return probe


def _keep(probe: Probe) -> None:
    """Store it for the next time, unless there is no room."""
    path = _path(**{name: getattr(probe, name) for name in ("host", "mpi", "gpus", "settings")})
    if path is None:
        return
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.write_text(json.dumps(probe.document(), indent=1) + "\n")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)


def _circumstances() -> dict[str, Any]:
    """What a result depends on."""
    from mpi4py import MPI

    return {
        "host": socket.gethostname(),
        "mpi": MPI.Get_library_version().rstrip("\0\n"),
        "gpus": () if importlib.util.find_spec("cupy") is None else tuple(gpu_names()[:2]),
        "settings": settings_of(os.environ),
    }


def _path(**circumstances: Any) -> Path | None:
    root = cache_root()
    if root is None:
        return None
    text = json.dumps({"format": FORMAT, **circumstances}, sort_keys=True)
    return root / "probe" / f"{_file_name(circumstances['host'])}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _file_name(host: str) -> str:
    return re.sub(r"[^\w.-]", "_", host)


def _read(path: Path) -> Probe | None:
    """A file that is not there, is not whole or is of another format counts for nothing."""
    try:
        document = json.loads(path.read_text())
        if document.pop("format") != FORMAT:
            return None
        outcomes = {
            operation: {memory: Outcome(**outcome) for memory, outcome in row.items()}
            for operation, row in document.pop("outcomes").items()
        }
        return Probe(**{**document, "gpus": tuple(document["gpus"])}, outcomes=outcomes)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
