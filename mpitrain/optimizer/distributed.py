"""``DistributedOptimizer``: any torch optimizer, made distributed by a method.

It is a torch optimizer itself: it has the same parameter groups and state as the one it wraps, so that learning-rate
schedulers, gradient clipping, accumulation and parameter groups work as they do without it.
"""

from __future__ import annotations

import copy
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import numpy as np
import torch

from mpitrain.algorithms.base.iterate_average import Average
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.peers import alive_ranks
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.algorithms.base.worker import Worker
from mpitrain.collectives.mpi import MPICommunicator
from mpitrain.collectives.world.device import share_cores
from mpitrain.collectives.world.launch import init
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError
from mpitrain.kernels import gpu
from mpitrain.kernels.native.wire import FLOAT32
from mpitrain.optimizer.checks import DirectStepGuard, check_alike, check_base, check_kinds
from mpitrain.optimizer.flat import FlatParameters, for_each_state_tensor, keeping_buffers
from mpitrain.optimizer.fused_sgd import FusedSGD, is_plain_sgd
from mpitrain.optimizer.replica_group import ReplicaGroup, check_replica_size

MOST_MEASURED = 32
"""Workers whose distance from the consensus is measured: looking at all of a thousand would take minutes."""

TOO_LATE_FOR_GROUPS = "add the parameter group to the base optimizer, before the DistributedOptimizer is made"

_open: weakref.WeakSet[DistributedOptimizer] = weakref.WeakSet()
"""Those that are made and not closed."""

Loss = torch.Tensor | float | Callable[[], torch.Tensor]


class DistributedOptimizer(torch.optim.Optimizer):
    """Wraps a torch optimizer. Collective: every rank makes one, at the same point.

    All ranks begin with rank 0's parameters and buffers. The trainable parameters that ``base`` holds are moved into
    one flat vector, and only they are exchanged; buffers (BatchNorm statistics) stay each rank's own: re-estimate them
    with ``mpitrain.reestimate_batchnorm``, inside of ``consensus()``, before an averaged model is evaluated.

    Where the method works with the gradient itself (``needs_gradient``), a parameter without one is updated as if it
    were zero, which torch would leave out: weight decay and momentum act on it. Give what shall rest a parameter group
    with learning rate 0.

    torch computes with this rank's share of the node's cores from then on, unless OMP_NUM_THREADS or
    ``torch.set_num_threads`` says how many.

    Under ``AllReduceSGD`` around a plain ``torch.optim.SGD`` the ranks of a node hold one copy of the parameters
    between them, and each the momentum of its part: it is not in ``state``. Whoever changes parameters by hand changes
    them for all, and does so between two barriers.

    Args:
        base: Any torch optimizer over parameters of ``model``. Methods that make the update themselves (EAMSGD) want a
            plain ``torch.optim.SGD`` without momentum, and take learning rates and weight decays from it.
        model: The model, already on ``world.device``. Do not move or convert it afterwards.
        method: For example ``mpitrain.EASGD(period=10)``.
        world: Of ``mpitrain.init()``, which is called when it is not given.
        seed: Of the random choices a method makes (whom to gossip with); the same on all ranks.
        average: A running average that is evaluated instead of what the method evaluates, such as
            ``mpitrain.Average("polyak")``.
        replica_size: Ranks that are one worker between them, k: neighbours by rank, with the mean of their gradients.
            A group with mini-batches of b is one worker with a mini-batch of k*b.
        wire: How float32 vectors cross nodes: ``"float32"``, as they are; ``"bfloat16"``, ``"float16"`` (2 bytes an
            element) or ``"int8"`` (1 byte for the changes of a center, 2 for all else). A center stays float32 in
            memory. What its changes lose on the wire is sent with the next ones (error feedback), but a checkpoint does
            not hold what is yet to be sent. What a sum of gradients loses is lost. Mailboxes (gossip) and all-reduces
            in the background (``dasgd``) travel as they are.
        fitness: The loss of the model, as it is when called, on data held out from training; for methods that rank
            workers by it (neuroevolution). It is called without gradients; set the model's mode in it.

    Attributes:
        statistics: What this rank has exchanged so far, inside its group too.
        exchange_seconds: Time spent in ``step`` outside the local update, waiting included.

    Example:
        >>> optimizer = DistributedOptimizer(base, model, mpitrain.EASGD(period=10))  # doctest: +SKIP
        >>> optimizer.zero_grad(); criterion(model(x), y).backward(); optimizer.step()  # doctest: +SKIP

    Raises:
        UsageError: Arguments of another kind; parameters that are no floats or of several types; a base optimizer that
            does not fit the method; models that differ between ranks; a number of ranks that cannot be divided into
            groups; a wire format where vectors cross nodes without messages.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        model: torch.nn.Module,
        method: Method,
        *,
        world: World | None = None,
        seed: int = 0,
        average: Average | None = None,
        replica_size: int = 1,
        wire: str = FLOAT32,
        fitness: Callable[[], float] | None = None,
    ) -> None:
        check_kinds(base, model, method)
        self.world = world or init()
        share_cores(self.world.cores)
        check_replica_size(replica_size, self.world)
        self.method = method
        self._base, self._model = base, model
        check_base(base, model, method)
        self._refuse_shared_parameters()
        self._flat = FlatParameters(base.param_groups)
        check_alike(base, model, method, self.world)
        super().__init__(base.param_groups, dict(base.defaults))
        self._share_with_base()
        self._frozen = [p for group in base.param_groups for p in group["params"] if not p.requires_grad]
        for parameter in self._frozen:
            parameter.grad = None  # base.step() would go on with one that is left from before
        wanted = torch.device(self.world.device)
        if self.world.gpu is not None and any(place.parameter.device != wanted for place in self._flat.places):
            raise UsageError(
                f"the model is on {self._flat.device} and this rank on {wanted}: call model.to(world.device) first"
            )
        self._gpu = self.world.gpu if replica_size == 1 and not method.on_host else None
        self._comm = MPICommunicator(self.world, on_host=self._gpu is None, wire=wire)
        self.statistics: Statistics = self._comm.statistics
        for_each_state_tensor(model, self._comm.broadcast)
        self._replica_size = replica_size
        fuses = self._gpu is None and not method.owns_update and is_plain_sgd(base) and self._flat.may_be_fused
        self._node_shared = fuses and method.node_shared and replica_size == 1
        self._group = ReplicaGroup(
            self._comm, replica_size, self._flat.n, self._flat.dtype, node_shared=self._node_shared
        )
        self._x = self._group.x.local
        self._flat.attach(self._x, self._group.g.local)
        self._local = FusedSGD(base, self._flat, self._x) if fuses and not self._node_shared else None
        self._needs_gradient = method.needs_gradient or self._flat.staged or replica_size > 1
        self._worker: Worker | None = None  # of a group, its first rank has it
        with self._exchanging():
            self._make_worker(method, seed, average, fitness)
        if method.takes_gradients_early and replica_size == 1 and not self._flat.staged:
            self._flat.when_ready(self._gradient_ready, self._gradient_complete)
        self._scratch: Any = None
        self._shows_consensus = False
        self._has_reported = False
        self.exchange_seconds = 0.0
        self._step_guard = DirectStepGuard(base)
        _open.add(self)

    def _refuse_shared_parameters(self) -> None:
        mine = {id(p) for group in self._base.param_groups for p in group["params"]}
        if any(id(place.parameter) in mine for other in _open for place in other._flat.places):
            raise UsageError(
                "a DistributedOptimizer has these parameters already: close() it before another one is made, "
                "and make that from the torch optimizer"
            )

    def _check_open(self) -> None:
        if self._comm is None:
            raise UsageError("this optimizer is closed: train, evaluate and save before close() or the end of `with`")

    def _gradient_ready(self, layer: int) -> None:
        assert self._worker is not None
        if self._worker.gradient_ready(layer):
            with self._exchanging():
                self._worker.begin_ready()

    def _gradient_complete(self) -> None:
        assert self._worker is not None
        began = time.perf_counter()
        with self._exchanging():
            self._worker.gradient_complete()
        self.exchange_seconds += time.perf_counter() - began

    def _make_worker(
        self, method: Method, seed: int, average: Average | None, fitness: Callable[[], float] | None
    ) -> None:
        """Collective."""
        self._comm.barrier()
        if self._group.workers is not None:
            held_out = None if fitness is None else self._fitness_of(fitness)
            replica = Replica(
                self._group.workers,
                self._group.x,
                self._group.g,
                seed,
                self._flat.layers,
                held_out,
                node_shared=self._node_shared,
            )
            self._worker = method.worker(replica)
            if average is not None:
                self._worker = average.wrap(self._worker, replica)
            self._group.serve_consensus(self._worker.consensus)

    def _exchanging(self) -> AbstractContextManager[None]:
        """What the worker does on a GPU belongs in here."""
        return nullcontext() if self._gpu is None else self._gpu.exchanging(self._flat.compute_stream)

    @property
    def group(self) -> World | None:
        """The ranks that are one worker with this one, which make every step together; None where each is one."""
        return self._group.world

    @property
    def n_parameters(self) -> int:
        """Trainable parameters."""
        self._check_open()
        return self._flat.n_parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer is made: the flat vector has its size.

        Raises:
            UsageError: With what to do instead.
        """
        if hasattr(self, "_worker"):
            raise UsageError(TOO_LATE_FOR_GROUPS)
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, as torch does, or set them to zero."""
        self._check_open()
        if set_to_none:
            self._flat.release_gradients()
        else:
            self._flat.zero_gradients()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, loss: Loss | None = None, *, closure: Callable[[], torch.Tensor] | None = None
    ) -> Any:
        """Exchange and update. Collective for synchronous methods, Local for the others (or Collective over a group).

        Args:
            loss: Of this mini-batch; needed only by methods that rank workers by it. A closure that computes it again
                is called first, as with any torch optimizer.
            closure: The same, by the name that torch gives it.

        Returns:
            ``loss``, or what the closure returned.
        """
        self._check_open()
        if self._shows_consensus:
            raise UsageError(
                "step() inside `with optimizer.consensus()`: the model holds what the method evaluates there; "
                "train outside of the block"
            )
        if closure is not None:
            loss = closure
        if callable(loss):
            with torch.enable_grad():
                loss = loss()
        if self.method.needs_loss and loss is None:
            raise UsageError(f"{self.method.name} ranks workers by their loss: call optimizer.step(loss)")
        if self._needs_gradient:
            self._flat.collect_gradients()
        self._flat.check_attached()
        self._check_frozen()
        group_slices = self._group_slices()
        began, self._update_seconds = time.perf_counter(), 0.0
        self._flat.to_host()
        mean_loss = self._group.average(float(loss) if self.method.needs_loss and loss is not None else None)
        if self._worker is not None:
            with self._group.busy, self._exchanging():
                owns_update = self.method.owns_update or self._node_shared
                if self._worker.step(group_slices, None if owns_update else self._local_update, mean_loss):
                    self._forget_what_is_not_finite()
                    self._report_nonfinite()
        self._group.share()
        self._flat.to_device()
        self.exchange_seconds += time.perf_counter() - began - self._update_seconds
        return loss

    def _fitness_of(self, fitness: Callable[[], float]) -> Callable[[np.ndarray], float]:
        """The fitness of parameters (n,), from that of what the model holds."""

        def of(vector: np.ndarray) -> float:
            with self._flat.swapped_parameters(vector):
                return float(fitness())

        return of

    def _check_frozen(self) -> None:
        """Raise when a parameter that has no place in the vector is to be trained: nobody would exchange it."""
        for parameter in self._frozen:
            if parameter.requires_grad:
                names = (name for name, known in self._model.named_parameters() if known is parameter)
                raise UsageError(
                    f"the parameter {next(names, '')} requires a gradient and did not when the DistributedOptimizer "
                    "was made, so that it is not exchanged: make it trainable before, in a parameter group of its own "
                    "whose learning rate is 0 as long as it shall rest"
                )

    def _group_slices(self) -> list[ParamGroupSlice]:
        """The parameter groups, as they are now."""
        if len(self.param_groups) != len(self._flat.group_slices):
            raise UsageError(TOO_LATE_FOR_GROUPS)
        if self._node_shared and not is_plain_sgd(self._base):
            raise UsageError(
                "the base optimizer has got hooks, a scheduler of its own, dampening or maximize: "
                "give it those before the DistributedOptimizer is made, and the scheduler the DistributedOptimizer"
            )
        return [
            ParamGroupSlice(
                part,
                float(group["lr"]),
                float(group.get("weight_decay", 0.0)),
                float(group.get("momentum", 0.0)),
                bool(group.get("nesterov", False)),
            )
            for part, group in zip(self._flat.group_slices, self.param_groups, strict=True)
        ]

    def _local_update(self) -> None:
        began = time.perf_counter()
        self._flat.to_device()
        if self._local is not None and is_plain_sgd(self._base):
            self._local.step()
        elif self._gpu is not None:
            with self._gpu.computing(self._flat.compute_stream), self._step_guard.suspended():
                self._base.step()
        else:
            with self._step_guard.suspended():
                self._base.step()
        self._flat.to_host()
        self._update_seconds = time.perf_counter() - began

    def _forget_what_is_not_finite(self) -> None:
        """Of what the base optimizer remembers: one bad gradient in its momentum would spoil all steps to come."""
        stream = self._flat.compute_stream
        with nullcontext() if self._gpu is None else self._gpu.computing(stream):
            for remembered in self._base.state.values():
                for value in remembered.values():
                    if isinstance(value, torch.Tensor) and value.is_floating_point():
                        value.nan_to_num_(0.0, 0.0, 0.0)

    def _report_nonfinite(self) -> None:
        """Once: from then on ``statistics.n_nonfinite`` says it."""
        if not self._has_reported:
            self._has_reported = True
            print(
                f"mpitrain: rank {self.world.rank}: {int(self.statistics.n_nonfinite)} values were not finite and were "
                "kept out of what is exchanged; where its own are not, it goes on from what the method evaluates",
                file=sys.stderr,
                flush=True,
            )

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """The model holds what the method evaluates (center, average, leader) inside; its own parameters outside.

        What is done to its buffers inside (``reestimate_batchnorm``) is undone at the end.

        Local: one rank alone may enter, at any time, while the others train on. Exact between two barriers.
        """
        self._check_open()
        if self._shows_consensus:
            raise UsageError("consensus() inside consensus(): the model holds what the method evaluates already")
        with keeping_buffers(self._model), self._flat.swapped_parameters(self._consensus()):
            self._shows_consensus = True
            try:
                yield
            finally:
                self._shows_consensus = False

    def consensus_vector(self) -> np.ndarray:
        """(n,) what the method evaluates, as ``consensus`` would show it; overwritten by the next call. Local."""
        self._check_open()
        with self._exchanging():
            return gpu.to_host(self._consensus())

    def _consensus(self) -> Any:
        """The same where the worker's vectors are."""
        if self._scratch is None:
            self._scratch = np.zeros_like(self._x)
        if self._worker is None:
            self._group.ask(self._scratch)
        else:
            with self._group.busy, self._exchanging():
                self._worker.consensus(self._scratch)
        return self._scratch

    def metrics(self) -> dict[str, float]:
        """What the method tells of this worker, by the names in ``method.metrics``. Local.

        A rank that is not the first of its group has no numbers of its own: NaN.
        """
        self._check_open()
        return dict.fromkeys(self.method.metrics, math.nan) if self._worker is None else self._worker.metrics()

    def spread(self, vector: np.ndarray) -> tuple[float, float]:
        """How far the workers' parameters are from a vector (n,): root mean square distance, and elastic energy. Local.

        The workers that live are looked at as they are now, at most 32 of them, evenly over the ranks.

        Raises:
            UsageError: On a rank that is not the first of its group: it cannot reach the other workers.
        """
        self._check_open()
        if self._worker is None:
            raise UsageError("ask the first rank of a replica group for the spread of the workers")
        comm = self._worker.comm
        peers = alive_ranks(comm)
        peers = peers[:: -(-len(peers) // MOST_MEASURED)]
        squares: list[float] = []
        with self._exchanging():
            for peer in peers:
                comm.read(self._worker.x, peer, lambda x: squares.append(_square_distance(gpu.to_host(x), vector)))
        mean = float(np.mean(squares))
        learning_rate = max(group_slice.learning_rate for group_slice in self._group_slices())
        rho = self.method.elastic_coefficient(comm.size, learning_rate)
        return math.sqrt(mean), rho / 2 * len(alive_ranks(comm)) * mean

    def wait(self) -> None:
        """Nothing of this rank's is under way any more at what all share (an exchange in the background). Local."""
        if self._worker is not None:
            with self._group.busy, self._exchanging():
                self._worker.wait()

    def finalize(self) -> None:
        """Hand over what no exchange has taken: the steps a parameter server has not got yet. Local, once, at the end.

        Between two barriers, so that what is evaluated then has the steps of all. Collective over a group.
        """
        self._check_open()
        self._flat.to_host()
        if self._worker is not None:
            with self._group.busy, self._exchanging():
                self._worker.finalize()
        self._group.share()
        self._flat.to_device()

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the whole state: parameters, the base optimizer's state, the method's. Local.

        It is this rank's own: each rank saves one and loads its own again. For asynchronous methods call ``wait`` and
        then a barrier before it on all ranks, or the parts are of different moments.
        """
        self._check_open()
        with self._exchanging():
            parameters = _copy(self._x)
        return {
            "algorithm": self.method.name,
            "rank": self.world.rank,
            "ranks": self.world.size,
            "replica_size": self._replica_size,
            "node_shared": self._node_shared,
            "parameters": parameters,
            "base": copy.deepcopy(self._base.state_dict()),  # torch hands out its own tensors
            "method": self._method_state(),
        }

    def _method_state(self) -> dict[str, Any]:
        """A copy of what the worker has; nothing on a rank that is not the first of its group."""
        if self._worker is None:
            return {}
        with self._group.busy, self._exchanging():
            return {name: _copy(value) if hasattr(value, "copy") else value for name, value in self._worker.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from this rank's part of a state. Collective.

        Raises:
            UsageError: When the state is of another rank or another number of ranks, of another model, another method,
                or settings with which it keeps other things.
        """
        self._check_open()
        self._check_whose(state_dict)
        if state_dict["algorithm"] != self.method.name:
            raise UsageError(
                f"the state is one of {state_dict['algorithm']}, and this optimizer runs {self.method.name}"
            )
        replica_size = state_dict["replica_size"]
        if replica_size != self._replica_size:
            raise UsageError(f"the state is one of replica_size {replica_size}, and this is {self._replica_size}")
        parameters = state_dict["parameters"]
        if parameters.shape != self._x.shape:
            raise UsageError(
                f"the state holds {parameters.size} parameters and the model has {self._x.size}: "
                "it was saved from another model"
            )
        if state_dict.get("node_shared", self._node_shared) != self._node_shared:
            here, there = ("with the method", "in the base optimizer")[:: 1 if self._node_shared else -1]
            raise UsageError(
                f"the state keeps the momentum {there}, and this optimizer {here}: "
                "use the method's settings, the kind of base optimizer and the device that it was saved with"
            )
        with self._exchanging():
            self._comm.barrier()  # parameters that the node shares must not change under somebody who still reads them
        self._base.load_state_dict(copy.deepcopy(state_dict["base"]))  # torch would go on in the tensors it is given
        self._share_with_base()
        if self._local is not None:
            self._local.adopt_state()
        self._comm.drop_residuals()
        with self._exchanging():
            gpu.assign(self._x, parameters)
            self._flat.to_device()
            self._comm.barrier()
            if self._worker is not None:
                with self._group.busy:
                    self._load_worker(self._worker, state_dict["method"])
            self._comm.barrier()

    def _check_whose(self, state: dict[str, Any]) -> None:
        if "algorithm" not in state:
            raise UsageError(
                "this is not a state of a DistributedOptimizer: load that of a torch optimizer into the base "
                "optimizer, before the DistributedOptimizer is made"
            )
        rank, size = state.get("rank", self.world.rank), state.get("ranks", self.world.size)
        if size != self.world.size:
            raise UsageError(f"the state is one of {size} ranks, and here are {self.world.size}: go on with as many")
        if rank != self.world.rank:
            raise UsageError(
                f"the state is that of rank {rank}, and this is rank {self.world.rank}: each rank saves a file of its "
                "own and loads that (to begin as the twin of another, set state['rank'] to the own rank)"
            )

    def _load_worker(self, worker: Worker, state: dict[str, Any]) -> None:
        """Collective."""
        try:
            worker.load(state)
        except KeyError as missing:
            raise UsageError(
                f"the state has no {missing}: it was saved with other settings of {self.method.name}, "
                "or without the average"
            ) from missing

    def close(self) -> None:
        """Give the shared memory back; the model keeps its parameters. Collective; once is enough."""
        if self._comm is not None and self._flat is not None:
            if self._shows_consensus:
                raise UsageError("close() inside `with optimizer.consensus()`: leave that block first")
            _open.discard(self)
            self._step_guard.stop()
            with self._exchanging():
                self._flat.detach()
                self._comm.barrier_of_survivors()
                self._group.close()
                self._comm.free()
            # What is left would keep the memory of a GPU.
            self._flat = self._comm = self._x = self._scratch = self._worker = None  # type: ignore[assignment]
            self._model, self._frozen = None, []  # type: ignore[assignment]

    def __enter__(self) -> DistributedOptimizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:  # with an exception on one rank only, the others would never come
            self.close()

    def _share_with_base(self) -> None:
        """One list of groups and one state for both, so that a scheduler that changes one changes the other."""
        self.param_groups = self._base.param_groups
        self.state = self._base.state
        self.defaults = self._base.defaults


def _copy(array: Any) -> np.ndarray:
    """A copy in host memory."""
    copied: np.ndarray = array.get() if gpu.is_device(array) else array.copy()
    return copied


def _square_distance(a: np.ndarray, b: np.ndarray, block: int = 1 << 16) -> float:
    """||a - b||^2 in float64, block by block."""
    total = 0.0
    for start in range(0, a.size, block):
        difference = a[start : start + block].astype(np.float64) - b[start : start + block]
        total += float(difference @ difference)
    return total
