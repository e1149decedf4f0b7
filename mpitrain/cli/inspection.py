"""The ranks and hosts of a launch: what each has, where they differ, and which problems a run will have.

``facts_here`` collects one rank's facts. ``host_table`` and ``verdicts`` are pure functions of the facts of all ranks.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import shutil
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpitrain.collectives.topology.allreduce_cost import Link, choose
from mpitrain.collectives.world.device import gpu_names
from mpitrain.collectives.world.network import bridges_among
from mpitrain.collectives.world.shared_memory import SHARED_MEMORY
from mpitrain.collectives.world.world import World
from mpitrain.report import text
from mpitrain.version import __version__

SHARED_MEMORY_PER_RANK = 256 * 2**20
"""Bytes of /dev/shm for a rank below which even a model of a few million parameters can fail."""

PACKAGES = ("torch", "numpy", "mpi4py", "numba")

NETWORK_CHOICES = ("UCX_NET_DEVICES", "OMPI_MCA_btl_tcp_if_include", "FI_TCP_IFACE", "MPICH_NETWORK_INTERFACE")
"""Variables that tell an MPI which network interface to use."""

LAUNCHERS = {
    "SLURM_STEP_ID": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun (Open MPI)",
    "MPI_LOCALNRANKS": "mpirun (MPICH)",
    "FLUX_JOB_ID": "flux run",
}
"""The launcher by a variable that it sets; mpirun inside a SLURM job starts its daemons with srun."""

DIFFERS = " *"
"""The mark of a cell that differs from the first host's."""

SHOWN_BYTES, SHOWN_NODES = (1e3, 1e5, 1e6, 1e7, 1e8), (64, 1024)
"""Vectors and nodes for which the choice of an all-reduce is shown, beside the nodes of the launch."""

SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class RankFacts:
    """One rank and its host.

    Attributes:
        rank: The rank.
        host: The name of its host.
        cores: The cores that the rank may run on.
        machine_cores: The number of cores of the host.
        shared_memory: The number of free bytes in /dev/shm; None if it does not exist.
        gpus: The names of the GPUs that the rank sees.
        mpi: The MPI library and its version.
        versions: The versions of Python and of packages by name.
        interfaces: The addresses of the network interfaces that are up, by name; without the loopback.
        network: The environment variables that choose a network interface, and their values.
        launcher: The program that started the rank.
    """

    rank: int
    host: str
    cores: tuple[int, ...]
    machine_cores: int
    shared_memory: int | None
    gpus: tuple[str, ...]
    mpi: str
    versions: Mapping[str, str]
    interfaces: Mapping[str, tuple[str, ...]]
    network: Mapping[str, str]
    launcher: str


def facts_here(world: World) -> RankFacts:
    """Return the facts of this rank. Local."""
    versions = {"mpitrain": __version__, "python": platform.python_version()}
    return RankFacts(
        rank=world.rank,
        host=world.hosts[world.rank],
        cores=tuple(sorted(os.sched_getaffinity(0))),
        machine_cores=os.cpu_count() or 1,
        shared_memory=shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else None,
        gpus=tuple(gpu_names()),
        mpi=world.describe()["mpi"],
        versions=versions | {name: importlib.metadata.version(name) for name in PACKAGES},
        interfaces=interfaces(),
        network={name: os.environ[name] for name in NETWORK_CHOICES if name in os.environ},
        launcher=launcher(os.environ),
    )


def launcher(environ: Mapping[str, str]) -> str:
    """Return the launcher that started a process with this environment."""
    found = [name for variable, name in LAUNCHERS.items() if variable in environ]
    mpirun = [name for name in found if name.startswith("mpirun")]
    return (mpirun or found or ["none"])[0]


def interfaces() -> dict[str, tuple[str, ...]]:
    """Return the addresses of the network interfaces of this host that are up, without the loopback. Local."""
    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            if name == "lo" or not _is_up(name):
                continue
            found[name] = []
            request = struct.pack("256s", name.encode()[:15])
            try:
                reply = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, request)
                found[name].append(socket.inet_ntoa(reply[20:24]))
            except OSError:
                continue  # no IPv4 address
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        digits, _, _, scope, _, name = line.split()
        if name in found and scope != "20":  # 20: link-local, which every interface has
            found[name].append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return {name: tuple(addresses) for name, addresses in found.items() if addresses}


def _is_up(name: str) -> bool:
    try:
        return (Path("/sys/class/net") / name / "operstate").read_text().strip() != "down"
    except OSError:
        return True


def by_host(facts: Sequence[RankFacts]) -> dict[str, list[RankFacts]]:
    """Return the ranks of each host, in the order of the hosts' first ranks."""
    hosts: dict[str, list[RankFacts]] = {}
    for one in facts:
        hosts.setdefault(one.host, []).append(one)
    return hosts


def host_table(facts: Sequence[RankFacts]) -> list[str]:
    """Return the lines of a table with a row for each host. Cells that differ from the first host's are marked."""
    rows = [_row(ranks) for ranks in by_host(facts).values()]
    marked = ("ranks", "cores", "bound to", "GPUs", "MPI", "launcher", "/dev/shm free", "interfaces")
    compared = {name: rows[0][name] for name in marked if name not in ("/dev/shm free", "interfaces")}
    columns: dict[str, list[str]] = {name: [] for name in ("host", *marked)}
    for row in rows:
        for name, cells in columns.items():
            cells.append(row[name] + (DIFFERS if compared.get(name, row[name]) != row[name] else ""))
    return text.table(columns, left=tuple(columns))


def _row(ranks: Sequence[RankFacts]) -> dict[str, str]:
    first = ranks[0]
    bound = {len(one.cores) for one in ranks}
    cores = f"{min(bound)}" if len(bound) == 1 else f"{min(bound)} to {max(bound)}"
    gpus = dict.fromkeys(name for one in ranks for name in one.gpus)
    n_gpus = max(len(one.gpus) for one in ranks)
    return {
        "host": first.host,
        "ranks": str(len(ranks)),
        "cores": str(first.machine_cores),
        "bound to": f"{cores} per rank",
        "/dev/shm free": text.size(first.shared_memory),
        "GPUs": f"{n_gpus} {', '.join(gpus)}" if gpus else "none",
        "MPI": first.mpi,
        "interfaces": ", ".join(f"{name} {' '.join(addresses)}" for name, addresses in first.interfaces.items()),
        "launcher": first.launcher,
    }


def between_nodes(n_nodes: int, measured: Link, used: Link, origin: str) -> dict[str, Any]:
    """Return the constants of the network between nodes, and the all-reduce that a run chooses for some sizes.

    Args:
        n_nodes: The number of nodes.
        measured: The constants as they are now.
        used: The constants that a run uses.
        origin: Where these constants come from.
    """
    return {
        "measured": measured.document(),
        "used by runs": {"origin": origin, **used.document()},
        **{
            f"all-reduce on {n} nodes": {text.size(n_bytes): choose(n_bytes, n, used) for n_bytes in SHOWN_BYTES}
            for n in sorted({n_nodes, *SHOWN_NODES})
        },
    }


def verdicts(facts: Sequence[RankFacts], *, threads: str) -> list[str]:
    """Return a line for each problem that will affect a run, with a remedy.

    Args:
        facts: The facts of all ranks.
        threads: The thread level of MPI: multiple, serialized or single.
    """
    hosts = by_host(facts)
    lines = []
    if len(hosts) > 1 and threads != "multiple":
        lines.append(
            f"MPI provides only the thread level {threads!r}: no thread answers the other nodes while a rank computes, "
            "and asynchronous exchanges wait for it; use an MPI with MPI_THREAD_MULTIPLE (Open MPI 5, MPICH)"
        )
    for host, ranks in hosts.items():
        lines += _core_verdicts(host, ranks)
        free, needed = ranks[0].shared_memory, SHARED_MEMORY_PER_RANK * len(ranks)
        if free is None or free < needed:
            has = "does not exist" if free is None else f"has {text.size(free)} free"
            lines.append(
                f"{host}: /dev/shm {has}; {len(ranks)} ranks should have {text.size(needed)} for vectors that they "
                "share: remove stale files, or start the container with --shm-size=8g (Docker), -B /dev/shm (Apptainer)"
            )
        if ranks[0].gpus and len(ranks[0].gpus) < len(ranks):
            lines.append(
                f"{host}: {len(ranks)} ranks see {len(ranks[0].gpus)} GPUs, and share them: start a rank per GPU, and "
                "let every rank see all GPUs of its node (srun --gpu-bind=none)"
            )
    return [*lines, *_version_verdicts(facts), *_network_verdicts(hosts)]


def _core_verdicts(host: str, ranks: Sequence[RankFacts]) -> list[str]:
    usable = {core for one in ranks for core in one.cores}
    if len(ranks) <= len(usable):
        return []
    if len(usable) < min(len(ranks), ranks[0].machine_cores):
        of_machine = f"{len(usable)} of {ranks[0].machine_cores} cores"
        cure = "mpirun --bind-to none, or srun --cpu-bind=cores --cpus-per-task=1"
        return [f"{host}: {len(ranks)} ranks are bound to {of_machine} and take turns: {cure}"]
    cure = "start no more ranks than cores, or set OMPI_MCA_mpi_yield_when_idle=1"
    return [f"{host}: {len(ranks)} ranks take turns on {len(usable)} cores: {cure}"]


def _version_verdicts(facts: Sequence[RankFacts]) -> list[str]:
    """Compare with rank 0."""
    lines = []
    kinds = {"MPI": [one.mpi for one in facts]}
    kinds |= {name: [one.versions.get(name, "none") for one in facts] for name in facts[0].versions}
    for name, values in kinds.items():
        other = next((one for one, value in zip(facts, values, strict=True) if value != values[0]), None)
        if other is not None:
            value = other.mpi if name == "MPI" else other.versions.get(name, "none")
            lines.append(
                f"{name} differs: {values[0]} on {facts[0].host}, {value} on {other.host} (rank {other.rank}): "
                "install the same versions in the environment of every node"
            )
    return lines


def _network_verdicts(hosts: Mapping[str, Sequence[RankFacts]]) -> list[str]:
    if len(hosts) < 2:
        return []
    firsts = [ranks[0] for ranks in hosts.values()]
    if any(one.network for one in firsts):
        return []
    owners: dict[str, set[str]] = {}
    names: dict[str, set[str]] = {}
    for one in firsts:
        for name, addresses in one.interfaces.items():
            for address in addresses:
                owners.setdefault(address, set()).add(one.host)
                names.setdefault(address, set()).add(name)
    bridges = set(bridges_among(name for one in firsts for name in one.interfaces))  # init() keeps them from MPI
    twice = sorted({name for address, who in owners.items() if len(who) > 1 for name in names[address]} - bridges)
    usable = sorted({name for one in firsts for name in one.interfaces} - set(twice) - bridges)
    lines = []
    if twice:
        lines.append(
            f"{', '.join(twice)}: the same address on several hosts, so it connects none of them, but MPI may try it: "
            f"set NETWORK={usable[0] if usable else 'INTERFACE'} for jobs/*.sbatch, or see jobs/env.sh"
        )
    if len(usable) > 1:
        lines.append(
            f"several interfaces connect the hosts ({', '.join(usable)}), and MPI chooses among them: name the "
            "fastest, as NETWORK in jobs/*.sbatch, or see jobs/env.sh"
        )
    return lines


def document(facts: Sequence[RankFacts]) -> list[dict[str, Any]]:
    """Return the facts of all ranks as JSON types."""
    return [
        {**vars(one), "cores": list(one.cores), "gpus": list(one.gpus), "interfaces": dict(one.interfaces)}
        for one in facts
    ]
