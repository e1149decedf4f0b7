"""``DistributedOptimizer``: any torch optimizer, distributed by a method.

It is a torch optimizer itself, with the parameter groups and the state of the one it wraps, so that learning-rate
schedulers, accumulation and parameter groups work as they do without it; ``clip_grad_norm_`` is a method of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
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
from mpitrain.optimizer.agreement import check_equal
from mpitrain.optimizer.amp import Scaling
from mpitrain.optimizer.checks import (
    FrozenParameters,
    check_base,
    check_device,
    check_kinds,
    check_memory,
    check_unshared,
)
from mpitrain.optimizer.evaluation import Evaluation
from mpitrain.optimizer.layout import FlatLayout
from mpitrain.optimizer.linked import LinkedOptimizer
from mpitrain.optimizer.local_replica import LocalReplica, ReplicaOptions
from mpitrain.optimizer.replica_group import check_replica_size
from mpitrain.optimizer.state import OptimizerState, Owner, describe
from mpitrain.optimizer.step import LocalUpdate, Loss, ParamGroups, Stepper

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
    """A torch optimizer whose steps exchange parameters or gradients with other ranks. Collective to make.

    Every rank makes one, at the same point of the program. All ranks begin with rank 0's parameters and buffers. The
    trainable parameters that ``base`` holds are moved into one flat vector, and only they are exchanged. Buffers
    (BatchNorm statistics) stay each rank's own: re-estimate them with ``mpitrain.reestimate_batchnorm``, inside
    ``consensus()``, before an averaged model is evaluated.

    Where the method works with the gradient itself (``needs_gradient``), a parameter without a gradient is updated as
    if its gradient were zero, while torch would leave it out: weight decay and momentum act on it. Put parameters that
    must not change into a parameter group with learning rate 0.

    From then on torch computes with this rank's share of the node's cores, unless OMP_NUM_THREADS or
    ``torch.set_num_threads`` sets their number.

    Each rank has its own parameters, which a script may change by hand, as it may with one process. Under
    ``AllReduceSGD(node_shared=True)`` around a plain ``torch.optim.SGD`` on the host, the ranks of a node share one
    copy, and each keeps the momentum of its part, which is therefore not in ``state``. There a change by hand is
    refused at the next step.

    ``close`` leaves the consensus in the model: what ``consensus()`` shows, on every rank.

    Args:
        base: A torch optimizer over parameters of ``model``, other than LBFGS, which computes several gradients per
            step, and SparseAdam. Methods that make the update themselves (EAMSGD) need a plain ``torch.optim.SGD``
            without momentum, and take learning rates and weight decays from it. Sparse gradients are converted to
            dense ones. A scheduler may be made on ``base`` or on this optimizer, before or after.
        model: The model, already on ``world.device``. Do not move or convert it afterwards.
        method: For example ``mpitrain.EASGD(period=10)``.
        world: From ``mpitrain.init()``, which is called when ``world`` is not given.
        seed: Of the method's random choices (gossip partners); the same on all ranks.
        average: A running average that is evaluated instead of what the method evaluates, such as
            ``mpitrain.Average("polyak")``.
        replica_size: Number of ranks k that are one worker: neighbours by rank, with the mean of their gradients. A
            group with mini-batches of b is one worker with a mini-batch of k*b.
        wire: Format of float32 vectors between nodes: ``"float32"``, unchanged; ``"bfloat16"`` or ``"float16"``, 2
            bytes per element; or ``"int8"``, 1 byte for changes of a center and 2 for everything else. A center stays
            float32 in memory. What its changes lose on the wire is sent with the next ones (error feedback), but a
            checkpoint does not hold what is still to be sent. What a sum of gradients loses is lost. Mailboxes
            (gossip) and background all-reduces (``dasgd``) are sent unchanged.
        fitness: Returns the loss of the model, as it is when called, on data held out from training; for methods that
            rank workers by it (neuroevolution). It is called without gradients; it should set the model's mode.

    Attributes:
        world: All ranks.
        method: The method.
        group: The ranks that are one worker with this one and make every step together; None where each rank is one.
        statistics: What this rank has exchanged so far, also inside its group.
        exchange_seconds: Time spent in ``step`` outside the local update, waiting included.

    Example:
        >>> optimizer = DistributedOptimizer(base, model, mpitrain.EASGD(period=10))  # doctest: +SKIP
        >>> optimizer.zero_grad(); criterion(model(x), y).backward(); optimizer.step()  # doctest: +SKIP

    Raises:
        UsageError: Arguments of another kind; parameters that are not floating point or of several types; a base
            optimizer that does not fit the method; models that differ between ranks; a number of ranks that cannot be
            divided into groups; a wire format where vectors cross nodes without messages.
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
    ) -> None:
        check_kinds(base, model, method)
        self.method = method
        self.world = world or init()
        share_cores(self.world.cores)
        check_base(base, model, method)
        check_unshared(base, (place.parameter for other in _open for place in other._open_parts.layout.places))
        equal = {"seed": seed, "average": average, "replica_size": replica_size, "wire": wire}
        equal["fitness"] = "absent" if fitness is None else "given"
        check_equal(base, model, method, self.world, equal)
        check_replica_size(replica_size, self.world)
        layout = FlatLayout(base.param_groups)
        check_memory(base, model)
        super().__init__(base)
        frozen = FrozenParameters(base, model)
        check_device((place.parameter for place in layout.places), self.world)
        options = ReplicaOptions(seed, average, replica_size, wire, fitness)
        replica = LocalReplica.make(base, model, method, layout=layout, world=self.world, options=options)
        update = LocalUpdate(base, replica)
        owner = Owner(method.name, self.world.rank, self.world.size, replica_size, replica.node_shared)
        self._parts: _Parts | None = _Parts(
            layout,
            replica,
            update,
            Stepper(method, replica, update, ParamGroups(base, method, replica), frozen),
            Evaluation(base, model, method, replica),
            OptimizerState(owner, describe(layout, model), base, update, replica),
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
        """The time spent in ``step`` outside the local update, waiting included."""
        return self._exchange_clock.seconds

    @exchange_seconds.setter
    def exchange_seconds(self, seconds: float) -> None:
        self._exchange_clock.seconds = seconds

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to None, as torch does, or to zero. Local."""
        self._open_parts.stepper.zero_gradients(set_to_none=set_to_none)

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Clip the norm of the gradient with which ``step`` updates. Collective where a step averages gradients.

        Call it on all ranks between ``backward`` and ``step``, after ``GradScaler.unscale_`` if there is a scaler.
        Where a step uses the mean of all ranks' gradients (or another aggregate: ``robust``, ``safeguard``), it is
        computed and clipped here, and ``step`` uses it. Where ranks update on their own, each clips its own gradient.
        A group of ranks (``replica_size``) is in both cases like one rank, with the mean of its gradients.

        As in torch, the gradient is multiplied by max_norm/(norm + 1e-6) if that is less than 1. With ``node_shared``
        ``step`` multiplies, and ``parameter.grad`` stays this rank's own.

        Args:
            max_norm: The largest norm.
            norm_type: The order of the norm, above 0; infinity stands for the largest absolute value.
            error_if_nonfinite: Raise an error if the norm is not finite.

        Returns:
            The norm of all gradients before clipping, a tensor (): the same on all ranks with the same gradient, NaN if
            they will leave out the step because a gradient is not finite.

        Raises:
            UsageError: ``max_norm`` is negative or NaN, or ``norm_type`` not above 0.
            RuntimeError: The norm is not finite, with ``error_if_nonfinite``.
        """
        return self._open_parts.stepper.clip_gradients(float(max_norm), float(norm_type), error_if_nonfinite)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, loss: Loss | None = None, *, closure: Callable[[], torch.Tensor] | None = None
    ) -> Any:
        """Exchange and update. Collective for synchronous methods, Local for the others (or Collective over a group).

        Args:
            loss: Of this mini-batch; only methods that rank workers by it need it. A closure that computes it again
                is called first, as with any torch optimizer.
            closure: The same, by the name that torch gives it.

        Returns:
            ``loss``, or what the closure returned.
        """
        parts = self._open_parts
        if parts.evaluation.is_shown:
            raise UsageError(
                "step() inside `with optimizer.consensus()`: the model holds what the method evaluates there; "
                "train outside the block"
            )
        scaling = Scaling.of(self) if hasattr(self, "found_inf") else None
        return parts.stepper.step(loss if closure is None else closure, scaling)

    def consensus(self) -> AbstractContextManager[None]:
        """Load the consensus (center, average, leader) into the model inside a ``with`` block. Local.

        At the end of the block the model has its own parameters again, and the buffers that it had before
        (``reestimate_batchnorm`` changes them). A single rank may enter at any time, while the others keep training.
        The consensus is exact between two barriers.

        Tensors taken from the model inside the block (a ``state_dict``) stay as they are. References to the values that
        were taken before it (``parameter.detach()``, ``parameter.data``) show the rank's own parameters.
        """
        return self._open_parts.evaluation.consensus()

    def consensus_state_dict(self, module: torch.nn.Module | None = None) -> dict[str, Any]:
        """Return the ``state_dict`` of the model with the consensus as its parameters. Local.

        The tensors are copies that nothing else refers to, so they can be kept, changed or saved. Buffers are this
        rank's; inside ``consensus()``, also those that ``reestimate_batchnorm`` has estimated there.

        Args:
            module: A part of the model, or a module that contains the model, such as a compiled one; by default the
                model.

        Raises:
            UsageError: ``module`` has parameters that the model does not have.
        """
        return self._open_parts.evaluation.state_dict(module)

    def consensus_vector(self) -> np.ndarray:
        """Return the consensus as a vector (n,), which the next call overwrites. Local."""
        return self._open_parts.evaluation.consensus_vector()

    def metrics(self) -> dict[str, float]:
        """Return the method's numbers about this worker, by the names in ``method.metrics``. Local.

        On a rank that is not the first of its group they are NaN.
        """
        return self._open_parts.replica.worker.metrics()

    def spread(self, vector: np.ndarray) -> tuple[float, float]:
        """Return the root mean square distance of the workers from a vector (n,), and the elastic energy. Local.

        The current parameters of up to 32 surviving workers, evenly spread over the ranks, are read.

        Raises:
            UsageError: On a rank that is not the first of its group: it cannot reach the other workers.
        """
        return self._open_parts.evaluation.spread(vector)

    def wait(self) -> None:
        """Wait for this rank's background exchanges. Local."""
        if self._parts is not None:
            self._parts.stepper.wait()

    def finalize(self) -> None:
        """Make the exchange that is due at the end of a run. Collective for synchronous methods, Local for the others.

        Many methods evaluate a vector that moves once per period: a center, or the outcome of an outer step. After this
        call it contains the steps of all ranks, also those of a period that has just begun. Call it once, at the end,
        on all ranks between two barriers. A second call without steps in between does nothing. To stop in order to
        continue later, save the state without this call.
        """
        self._open_parts.stepper.finalize()

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the state: its parameters, the base optimizer's state, the method's. Local.

        Each rank saves its own part and loads it again. For asynchronous methods call ``wait`` and then a barrier
        on all ranks first; otherwise the parts belong to different moments.
        """
        return self._open_parts.state.save()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from this rank's part of a state. Collective.

        Raises:
            UsageError: The state belongs to another rank, number of ranks, model or method, or was saved with settings
                under which the method stores other entries.
        """
        parts = self._open_parts
        parts.state.load(state_dict)
        parts.stepper.accept_parameters()

    def close(self) -> None:
        """Leave the consensus in the model, and free the shared memory. Collective; safe to call again.

        Every rank's model then holds what its ``consensus()`` shows, in memory of its own and without gradients.
        Buffers stay as they are.
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

    def __enter__(self) -> DistributedOptimizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:  # with an exception on one rank only, the others would never come
            self.close()
