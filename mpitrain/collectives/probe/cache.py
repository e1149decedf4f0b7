"""Results of probing MPI with each kind of memory, stored per host, MPI, GPUs and settings.

No MPI reports reliably what it can do with GPU memory: failures range from wrong bytes to crashes. So ten operations
are tried (``probe.runner``) with host memory, page-locked host memory and device memory, by two ranks on one host.
Managed memory is left out.

``mpirun -n 2 mpitrain info --probe`` measures, and ``world.transport`` reads the result with ``known``. The result is a
JSON file in the folder of the compiled kernels. It is used only with the host, the MPI, the GPUs and the settings with
which it was measured.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpitrain.collectives.probe.launcher import child_environment
from mpitrain.collectives.probe.outcome import MEMORIES, Matrix, Outcome
from mpitrain.collectives.probe.runner import measure
from mpitrain.kernels import cache_root
from mpitrain.log import logger

FORMAT = 1
POLL_SECONDS = 0.05

SETTINGS = ("OMPI_MCA_", "UCX_", "MPIR_CVAR_", "MPICH_", "FI_")
WITHOUT_BEARING = ("OMPI_MCA_mpi_yield_when_idle",)
LIBRARY_PATH = "LD_LIBRARY_PATH"


@dataclass(frozen=True)
class Probe:
    """The result of probing one host.

    Attributes:
        host: The name of the host.
        mpi: The text of MPI_Get_library_version.
        gpus: The names of the GPUs of the two ranks; () without GPUs or without CuPy.
        settings: The environment variables that configure MPI.
        measured: The local time of the measurement, with its offset from UTC.
        outcomes: The outcomes, by operation and memory.
    """

    host: str
    mpi: str
    gpus: tuple[str, ...]
    settings: dict[str, str]
    measured: str
    outcomes: Matrix

    def proved(self, operation: str, memory: str) -> bool:
        """Return whether an operation has succeeded and transferred the right bytes.

        Args:
            operation: One of ``outcome.OPERATIONS``.
            memory: One of ``outcome.MEMORIES``.
        """
        return self.outcomes[operation][memory].verdict == "ok"

    def document(self) -> dict[str, Any]:
        """Return the result as a dictionary of JSON types."""
        return {"format": FORMAT, **asdict(self), "gpus": list(self.gpus)}


def known(gpus: Sequence[str]) -> Probe | None:
    """Return the stored result for this host, MPI, GPUs and settings, or None. Local.

    Args:
        gpus: The names of the visible GPUs.
    """
    path = _path(**_circumstances(gpus))
    return None if path is None else _read(path)


def newest(gpus: Sequence[str]) -> Probe | None:
    """Return the newest stored result for this host and MPI, measured with any GPUs and settings. Local.

    Args:
        gpus: The names of the visible GPUs.
    """
    root = cache_root()
    here = _circumstances(gpus)
    paths = [] if root is None else list((root / "probe").glob(f"{_file_name(here['host'])}-*.json"))
    latest_first = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
    return next((probe for probe in map(_read, latest_first) if probe is not None and probe.mpi == here["mpi"]), None)


def probe_hosts(comm: Any, hosts: Sequence[str], gpus: Sequence[str], *, again: bool = False) -> list[Probe]:
    """Return the results of all hosts. Collective.

    Args:
        comm: The ranks.
        hosts: The host of each rank.
        gpus: The names of the GPUs that this rank sees.
        again: Whether to measure again, instead of reading stored results. One rank of each host measures, while the
            other ranks sleep.

    Returns:
        On rank 0, one result for each host that has a result. On other ranks, an empty list.
    """
    rank, is_alone = comm.Get_rank(), comm.Get_size() == 1
    is_first_of_host = hosts.index(hosts[rank]) == rank
    found = None
    if again and rank == 0:
        logger.info("probing MPI operations on each kind of memory (seconds; minutes with GPUs); the result is stored")
    if again and is_first_of_host:
        found = _measure(gpus)
    elif is_first_of_host:
        found = known(gpus) or (newest(gpus) if is_alone else None)
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(POLL_SECONDS)  # the cores are for the ranks that measure
    results: list[Probe | None] | None = comm.gather(found)
    return [probe for probe in results or [] if probe is not None]


def settings_of(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that configure MPI, without those of launchers. Local."""
    relevant = {
        name: value
        for name, value in sorted(child_environment(environ).items())
        if name.startswith(SETTINGS) and name not in WITHOUT_BEARING
    }
    # Launchers add folders of their own to the path. Of the libraries that it can replace, UCX is the one that MPI's
    # version does not mention.
    folders = filter(None, environ.get(LIBRARY_PATH, "").split(os.pathsep))
    ucx = next((folder for folder in folders if any(Path(folder).glob("libucp.so*"))), None)
    return relevant if ucx is None else {**relevant, LIBRARY_PATH: os.path.realpath(ucx)}


def _measure(gpus: Sequence[str]) -> Probe:
    """Measure a new result, and store it if any operation could be tried."""
    circumstances = _circumstances(gpus)
    reason = None
    if not circumstances["gpus"]:
        reason = "no CuPy: pip install 'mpitrain[gpu]'" if gpus else "no GPU"
    outcomes = measure({memory: None if memory == "host" else reason for memory in MEMORIES})
    probe = Probe(**circumstances, measured=time.strftime("%Y-%m-%dT%H:%M:%S%z"), outcomes=outcomes)
    if any(outcome.verdict != "not tried" for row in outcomes.values() for outcome in row.values()):
        _store(probe)
    return probe


def _store(probe: Probe) -> None:
    """Store a result, unless there is no room."""
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


def _circumstances(gpus: Sequence[str]) -> dict[str, Any]:
    """Return everything a result depends on."""
    from mpi4py import MPI

    return {
        "host": socket.gethostname(),
        "mpi": MPI.Get_library_version().rstrip("\0\n"),
        "gpus": () if importlib.util.find_spec("cupy") is None else tuple(gpus[:2]),
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
    """Return the result in a file; None if the file is absent, incomplete or of another format."""
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
