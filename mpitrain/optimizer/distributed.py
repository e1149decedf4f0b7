"""``DistributedOptimizer``: any torch optimizer, distributed by a method.

It is a torch optimizer itself, with the parameter groups and the state of the one it wraps, so that learning-rate
schedulers, accumulation and parameter groups work as they do without it. It adds a method ``clip_grad_norm_``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpitrain.algorithms.base.iterate_average import Average
from mpitrain.algorithms.base.method import Method
from mpitrain.collectives.world.device import share_cores
from mpitrain.collectives.world.launch import init
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError
from mpitrain.kernels.native.wire import FLOAT32
from mpitrain.optimizer import checks
from mpitrain.optimizer.agreement import check_equal
from mpitrain.optimizer.amp import Scaling
from mpitrain.optimizer.evaluation import Evaluation
from mpitrain.optimizer.join import Join
from mpitrain.optimizer.layout import FlatLayout
from mpitrain.optimizer.linked import LinkedOptimizer
from mpitrain.optimizer.local_replica import LocalReplica, ReplicaOptions
from mpitrain.optimizer.replica_group import check_replica_size
from mpitrain.optimizer.state import OptimizerState, Owner, describe
from mpitrain.optimizer.step import LocalUpdate, Loss, ParamGroups, Stepper
from mpitrain.optimizer.survivors import prepare_for_deaths

_open: weakref.WeakSet[DistributedOptimizer] = weakref.WeakSet()
"""Optimizers that are not closed."""


@dataclass(frozen=True)
class _Parts:
    """The components of an open optimizer."""

    layout: FlatLayout
    replica: LocalReplica
    update: LocalUpdate
    stepper: Stepper
    evaluation: Evaluation
    state: OptimizerState


class DistributedOptimizer(LinkedOptimizer):
    """A torch optimizer whose steps exchange parameters or gradients with other ranks. Collective to create.

    All ranks create it at the same point of the program. They start with the parameters and buffers of rank 0. The
    trainable parameters of ``base`` are moved into one flat vector, and only they are exchanged. Buffers, such as
    BatchNorm statistics, stay local to each rank. Before you evaluate an averaged model, re-estimate these statistics
    with ``mpitrain.reestimate_batchnorm``, inside ``consensus()``. The consensus is the parameter vector that the
    method evaluates, for example a center or the average of all ranks' parameters.

    If the method declares ``needs_gradient``, a missing gradient counts as zero: weight decay and momentum still change
    the parameter. Plain torch would leave it unchanged. To keep a parameter constant, call ``requires_grad_(False)``.
    For methods that make the local update themselves, put the parameter into a group with learning rate 0 instead.

    The constructor sets the number of torch's threads to this rank's share of the cores of the node. It does not do so
    if ``OMP_NUM_THREADS`` or ``torch.set_num_threads`` has set the number.

    By default, each rank has its own parameters, and a script may change them directly. With
    ``AllReduceSGD(node_shared=True)`` and a plain ``torch.optim.SGD`` on the host, the ranks of a node share one copy
    of the parameters. A script must then not change them directly; the next step would raise an error. Each rank keeps
    the momentum of one part of the vector, and ``state`` does not contain it.

    Args:
        base: A torch optimizer over parameters of ``model``. ``LBFGS`` and ``SparseAdam`` are not supported. Methods
            that make the local update themselves (``EAMSGD``) need a plain ``torch.optim.SGD`` without momentum; they
            use its learning rates and weight decays. Sparse gradients are converted to dense ones. A scheduler may be
            created on ``base`` or on this optimizer.
        model: The model, already on ``world.device``. Do not move or convert it afterwards.
        method: The method, for example ``mpitrain.EASGD(period=10)``.
        world: The ranks, as returned by ``mpitrain.init()``. By default, the constructor calls ``mpitrain.init()``.
        seed: The seed of the method's random choices, for example of peers; the same on all ranks.
        average: A running average of the iterates, such as ``mpitrain.Average("polyak")``. It becomes the consensus.
        replica_size: The number k of neighbouring ranks that form one worker. They average their gradients. With a
            mini-batch of b samples per rank, the worker has a mini-batch of k*b samples.
        wire: The format of float32 vectors that are sent between nodes. ``"float32"`` sends them unchanged.
            ``"bfloat16"`` and ``"float16"`` use 2 bytes per element. ``"int8"`` uses 1 byte for changes of a center and
            2 bytes for everything else. A center stays float32 in memory. The rounding error of a change of the center
            is added to the next change; a checkpoint does not contain this error. The rounding error of a sum of
            gradients is lost. Mailboxes (gossip) and background all-reduces (``dasgd``) are sent unchanged.
        fitness: A function that returns the loss of the model on held-out data, for methods that rank workers by it
            (``neuroevolution``). It is called without gradients, and must set train or eval mode itself.
        on_failure: For synchronous methods, whether the other ranks ``"stop"`` or ``"continue"`` when a rank dies; see
            docs/reliability.md. Continuing needs Open MPI 5 and ``mpirun --with-ft ulfm``.

    Attributes:
        world: All ranks.
        method: The method.
        group: The ranks that form one worker with this rank; None if each rank is a worker.
        statistics: Counters of this rank's exchanges, including those inside its group.
        exchange_seconds: The time spent in ``step`` outside the local update, including waiting.

    Example:
        >>> optimizer = DistributedOptimizer(base, model, mpitrain.EASGD(period=10))  # doctest: +SKIP
        >>> optimizer.zero_grad(); criterion(model(x), y).backward(); optimizer.step()  # doctest: +SKIP

    Raises:
        UsageError: An argument has the wrong type. The parameters are not of one floating-point type. The base
            optimizer does not fit the method. The models of the ranks differ. The number of ranks is not a multiple of
            ``replica_size``. ``wire`` cannot be used between these nodes.
    """

    _step_supports_amp_scaling = True  # a GradScaler calls ``step`` on all ranks, see ``amp``

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
        on_failure: str = "stop",
    ) -> None:
        checks.check_kinds(base, model, method)
        self.method = method
        self.world = world or init()
        share_cores(self.world.cores)
        checks.check_base(base, model, method)
        checks.check_unshared(base, (place.parameter for other in _open for place in other._open_parts.layout.places))
        equal = {"seed": seed, "average": average, "replica_size": replica_size, "wire": wire}
        equal |= {"fitness": "absent" if fitness is None else "given", "on_failure": on_failure}
        check_equal(base, model, method, self.world, equal)
        check_replica_size(replica_size, self.world)
        prepare_for_deaths(on_failure, method, self.world, replica_size=replica_size, has_average=average is not None)
        layout = FlatLayout(base.param_groups)
        checks.check_memory(base, model)
        super().__init__(base)
        frozen, known = checks.FrozenParameters(base, model), checks.KnownParameters(model)
        checks.check_device((place.parameter for place in layout.places), self.world)
        options = ReplicaOptions(seed, average, replica_size, wire, fitness, on_failure)
        replica = LocalReplica.make(base, model, method, layout=layout, world=self.world, options=options)
        update = LocalUpdate(base, replica)
        owner = Owner(method.name, self.world.rank, self.world.size, replica_size, replica.node_shared)
        self._parts: _Parts | None = _Parts(
            layout,
            replica,
            update,
            Stepper(method, replica, update, ParamGroups(base, method, replica), frozen, known),
            Evaluation(base, model, method, replica, known),
            OptimizerState(owner, describe(layout, model), base, update, replica, method),
        )
        self.group: World | None = replica.group.world
        self.statistics: Statistics = replica.comm.statistics
        self._exchange_clock = replica.boundary.clock
        _open.add(self)

    @property
    def _open_parts(self) -> _Parts:
        if self._parts is None:
            raise UsageError("this optimizer is closed: train, evaluate and save before close() or the end of `with`")
        return self._parts

    @property
    def n_parameters(self) -> int:
        """The number of trainable parameters."""
        return self._open_parts.layout.n_parameters

    @property
    def exchange_seconds(self) -> float:
        """The time spent in ``step`` outside the local update, including waiting."""
        return self._exchange_clock.seconds

    @exchange_seconds.setter
    def exchange_seconds(self, seconds: float) -> None:
        self._exchange_clock.seconds = seconds

    @property
    def exchange_cpu_seconds(self) -> float:
        """The CPU time of ``exchange_seconds``, of the calling thread."""
        return self._exchange_clock.cpu_seconds

    @property
    def members(self) -> list[int]:
        """The ranks that take part in the steps; without those after whose death a synchronous method continues."""
        return list(self._open_parts.replica.members)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to None, as torch does, or to zero. Local."""
        self._open_parts.stepper.zero_gradients(set_to_none=set_to_none)

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Clip the norm of the gradient that ``step`` uses. Collective if the method averages gradients.

        Call it on all ranks between ``backward`` and ``step``. If there is a ``GradScaler``, call ``scaler.unscale_``
        first.

        If the method averages gradients, or combines them in another way (``robust``, ``safeguard``), this call
        combines them and clips the result, and ``step`` uses this result. Otherwise each rank clips its own gradient. A
        group of ranks (``replica_size``) counts as one rank whose gradient is the mean over the group.

        As in torch, the gradient is multiplied by max_norm/(norm + 1e-6) if this factor is less than 1. With
        ``node_shared``, the multiplication takes place in ``step``, and ``parameter.grad`` does not change.

        Args:
            max_norm: The largest norm.
            norm_type: The order of the norm, above 0; infinity stands for the largest absolute value.
            error_if_nonfinite: Whether to raise an error if the norm is not finite.

        Returns:
            The norm before clipping, as a scalar tensor. It is NaN if the ranks will skip the step because a gradient
            is not finite. If the method averages gradients, it is the same on all ranks.

        Raises:
            UsageError: ``max_norm`` is negative or NaN, or ``norm_type`` is not above 0.
            RuntimeError: The norm is not finite, and ``error_if_nonfinite`` is set.
        """
        return self._open_parts.stepper.clip_gradients(float(max_norm), float(norm_type), error_if_nonfinite)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, loss: Loss | None = None, *, closure: Callable[[], torch.Tensor] | None = None
    ) -> Any:
        """Exchange and update. Collective for synchronous methods, else Local (or Collective over a replica group).

        Args:
            loss: The loss of this mini-batch. Only methods that rank workers by their loss need it. A closure that
                computes the loss is called first, as in torch.
            closure: The same closure, under the name that torch uses.

        Returns:
            ``loss``, or the value that the closure returned.
        """
        parts = self._open_parts
        if parts.evaluation.is_shown:
            raise UsageError(
                "step() inside `with optimizer.consensus()`: the model holds what the method evaluates there; "
                "train outside the block"
            )
        scaling = Scaling.of(self) if hasattr(self, "found_inf") else None
        return parts.stepper.step(loss if closure is None else closure, scaling)

    def join(self) -> Join:
        """Let ranks make unequal numbers of steps inside a ``with`` block; see ``optimizer.join``. Collective."""
        return Join(self.method, self._open_parts.replica, self._open_parts.stepper)

    def consensus(self) -> AbstractContextManager[None]:
        """Load the consensus (center, average, leader) into the model inside a ``with`` block. Local.

        A rank may enter the block at any time, while the others keep training. The consensus is exact only while no
        rank makes a step, for example between two barriers. At the end of the block, the model has its own parameters
        and buffers again.

        A tensor that you take from the model inside the block (by ``state_dict``) keeps the consensus after the block.
        A tensor that you took before the block (by ``parameter.detach()`` or ``parameter.data``) shows this rank's own
        parameters, also inside the block.
        """
        return self._open_parts.evaluation.consensus()

    def consensus_state_dict(self, module: torch.nn.Module | None = None) -> dict[str, Any]:
        """Return the ``state_dict`` of the model with the consensus as its parameters. Local.

        The tensors are copies, so they can be kept, changed or saved. The buffers are those of this rank. Inside
        ``consensus()`` they include the statistics that ``reestimate_batchnorm`` has estimated.

        Args:
            module: A submodule of the model, or a module that contains the model, such as a compiled one; by default
                the model itself.

        Raises:
            UsageError: ``module`` has parameters that the model does not have.
        """
        return self._open_parts.evaluation.state_dict(module)

    def consensus_vector(self) -> np.ndarray:
        """Return the consensus as a vector (n,), which the next call overwrites. Local."""
        return self._open_parts.evaluation.consensus_vector()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of this rank's worker, by the names in ``method.metrics``. Local.

        In a replica group, only the first rank has the values; the others return NaN.
        """
        return self._open_parts.replica.worker.metrics()

    def spread(self, vector: np.ndarray) -> tuple[float, float]:
        """Return the root mean square distance of the workers from a vector (n,), and the elastic energy. Local.

        The elastic energy is rho/2 times the sum of the squared distances; 0 without an elastic coefficient rho. The
        call reads the current parameters of at most 32 live workers, evenly spread over the ranks.

        Raises:
            UsageError: This rank is not the first of its replica group, so it cannot reach the other workers.
        """
        return self._open_parts.evaluation.spread(vector)

    def wait(self) -> None:
        """Wait for this rank's background exchanges. Local."""
        if self._parts is not None:
            self._parts.stepper.wait()

    def finalize(self) -> None:
        """Make the last exchange of a run. Collective for synchronous methods, else Local.

        Many methods change the consensus only once per period. After this call, the consensus contains the steps of all
        ranks, including those of an unfinished period. Call it once on all ranks, at the end, between two barriers.
        Another call without steps in between does nothing. Do not call it if you only save the state to continue later.
        """
        self._open_parts.stepper.finalize()

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the state: parameters, base optimizer and method. Local.

        Each rank saves and loads its own part. For an asynchronous method, first call ``wait`` and then a barrier on
        all ranks; otherwise the parts belong to different moments.
        """
        return self._open_parts.state.save()

    def load_state_dict(self, state_dict: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Continue from this rank's part of a state, or from a list of all parts. Collective.

        A list that is loaded before the first step may be from a different number of ranks; see docs/reliability.md.

        Raises:
            UsageError: The state belongs to another rank, model or method, or was saved with other settings.
        """
        parts = self._open_parts
        parts.state.load(state_dict)
        parts.stepper.accept_parameters()

    def close(self) -> None:
        """Leave the consensus in the model, and free the shared memory. Collective; safe to call again.

        Afterwards, the model of every rank holds the consensus in ordinary memory, without gradients. Buffers do not
        change, nor do tensors that were taken from the model before. NumPy views of such tensors become invalid.
        """
        parts = self._parts
        if parts is None:
            return
        if parts.evaluation.is_shown:
            raise UsageError("close() inside `with optimizer.consensus()`: leave that block first")
        _open.discard(self)
        parts.update.stop()
        parts.replica.close(parts.evaluation.final_consensus())
        self._parts = None  # it would keep the memory of a GPU
