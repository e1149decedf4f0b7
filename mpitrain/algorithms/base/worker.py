"""The running state of a method on one worker.

One step, with the gradient already in ``g``::

    combine_gradients  all workers' gradients are combined in g, in methods whose workers make the same step
    before_update      the exchange takes place here if it follows the gradient (the default of the papers)
    the local update   x <- x - eta*g, by the torch optimizer; or by the method's own ``update`` (``owns_update``)
    after_update       the exchange takes place here if the next gradient is to be computed after it
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from mpitrain import kernels
from mpitrain.algorithms.base import gradients, nonfinite, rescaling
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.algorithms.base.state import State, entries, restore


class Worker(ABC):
    """The running state of a method on one rank.

    Args:
        replica: The vectors and the communicator to work with.

    Attributes:
        persistent: The names of the attributes that a checkpoint contains besides ``x``. Each class declares its own
            (``base.state``).
        comm, x, g: The communicator, the parameters and the gradient of the replica.
        t: The number of local steps of this worker.
        learning_rate: The learning rate eta of the present step.
        group_slices: The parameter groups of the present step.
        loss: The loss of the present mini-batch, for methods that need it.
        skips: Whether the present step skips the local update, because a gradient is not finite.
        has_common_gradient: Whether the present gradient is the same on all workers.
        n_nonfinite: The number of non-finite elements at the last check.
        joined_at: The value of t after this worker's last own step, while it only takes part in the steps of the other
            workers (``DistributedOptimizer.join``); else None.
        unchanged_by_exchanges: The names of the entries that only local updates and the last exchange change.
        is_replicated: Whether all workers hold equal copies of all persistent attributes.
        positions: The worker's own vectors (n,) of parameters; ``x`` is the first.
        velocities: The worker's own vectors (n,) such as momenta, in which a non-finite element becomes zero.
    """

    persistent: ClassVar[tuple[str, ...]] = ("t", "_finalized_at")
    is_replicated: ClassVar[bool] = False
    unchanged_by_exchanges: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, replica: Replica) -> None:
        self.comm, self.x, self.g = replica.comm, replica.x, replica.g
        self.t = 0
        self.learning_rate = 0.0
        self.group_slices: Sequence[ParamGroupSlice] = ()
        self.loss: float | None = None
        self.skips = self.has_common_gradient = False
        self._finalized_at = 0
        self.positions: tuple[Any, ...] = (self.x.local,)
        self.velocities: tuple[Any, ...] = ()
        self.n_nonfinite = 0
        self.joined_at: int | None = None

    def step(
        self,
        group_slices: Sequence[ParamGroupSlice],
        local_update: Callable[[], object] | None,
        loss: float | None = None,
        *,
        skips: bool = False,
        is_combined: bool = False,
    ) -> bool:
        """Make one step with the gradient in ``g``.

        Args:
            group_slices: The learning rate and the weight decay of each part of the vector. Methods with one eta for
                the whole vector use the largest learning rate.
            local_update: A function that updates ``x`` in place; None if the method makes the update itself.
            loss: The loss of the mini-batch, for methods that rank workers by it.
            skips: Whether to skip the local update, because the gradient is not finite. The exchanges take place in any
                case, since other workers may wait for them. If the method averages gradients, all workers skip the
                update.
            is_combined: Whether ``clip_gradients`` has combined the gradients of this step.

        Returns:
            Whether non-finite elements were found and replaced in the worker's vectors. If so, the local update should
            reset the non-finite elements of its own state, too.
        """
        self.use(group_slices)
        self.loss = loss
        if not is_combined:
            gradients.combine(self, skips=skips)
        self.before_update()
        if self.skips:
            self.comm.statistics.n_nonfinite += not skips  # another worker's gradient; its own has been counted
        elif local_update is not None:
            local_update()
        else:
            self.update_all(group_slices)
        self.after_update()
        self.t += 1
        return nonfinite.repair(self)

    def use(self, group_slices: Sequence[ParamGroupSlice]) -> None:
        """Store the parameter groups of a step, and the largest of their learning rates as eta."""
        self.group_slices = group_slices
        self.learning_rate = max(group_slice.learning_rate for group_slice in group_slices)

    def gradient_ready(self, layer: int) -> bool:
        """Take note that the gradient of ``replica.layers[layer]`` is in ``g``. Local; called in the backward pass.

        Returns:
            Whether ``begin_ready`` should be called.
        """
        return False

    def begin_ready(self) -> None:  # noqa: B027 - optional
        """Start the communication of the gradients that are in ``g`` so far. Local."""

    def gradient_complete(self) -> None:  # noqa: B027 - optional
        """Take note that the backward pass has ended, so that the whole gradient is in ``g``."""

    def combine_gradients(self) -> None:  # noqa: B027 - optional
        """Combine the gradients of all workers, in methods that declare ``combines_gradients``. Collective."""

    def clip_gradients(
        self,
        group_slices: Sequence[ParamGroupSlice],
        max_norm: float,
        order: float,
        *,
        skips: bool = False,
        is_combined: bool = False,
    ) -> float:
        """Combine the gradients before the step, and scale the result to a norm of at most ``max_norm``.

        Collective in methods that declare ``combines_gradients``, else Local. Pass ``is_combined=True`` to the next
        step.

        Args:
            group_slices: The parameter groups of the step.
            max_norm: The largest norm.
            order: The order of the norm; see ``gradients.norm``.
            skips: See ``step``.
            is_combined: Whether the gradients have been combined already.

        Returns:
            The norm before clipping; NaN if the step is skipped. If gradients are combined, it is the same on all
            workers.
        """
        self.use(group_slices)
        if not is_combined:
            gradients.combine(self, skips=skips)
        norm = gradients.norm(self, order)
        factor = gradients.clip_factor(norm, max_norm)
        if factor < 1:
            kernels.scale(self.g.local, factor)
        return norm

    def before_update(self) -> None:  # noqa: B027 - optional
        """Do what the method does between the gradient and the local update, such as an exchange."""

    def update_all(self, group_slices: Sequence[ParamGroupSlice]) -> None:
        """Make the local update, in methods that declare ``owns_update``."""
        for group_slice in group_slices:
            self.update(group_slice)

    def update(self, group_slice: ParamGroupSlice) -> None:
        """Make the local update of one part of the vector, in methods that declare ``owns_update``."""
        raise NotImplementedError(f"{type(self).__name__} declares owns_update and has no update")

    def after_update(self) -> None:  # noqa: B027 - optional
        """Do what the method does after the local update, such as an exchange."""

    @abstractmethod
    def consensus(self, out: Any) -> None:
        """Write the consensus (center, average, leader) to ``out`` (n,). Local, at any time."""

    def wait(self) -> None:  # noqa: B027 - optional
        """Wait for this worker's background operations on shared memory. Local."""

    def finalize(self, group_slices: Sequence[ParamGroupSlice] = ()) -> None:
        """Make the last exchange of a run. Collective for synchronous methods, else Local.

        A second call without steps in between does nothing.

        Args:
            group_slices: The parameter groups to use if this worker has made no step since it was loaded.
        """
        if self.t == self._finalized_at:
            return
        self._finalized_at = self.t
        if group_slices and not self.group_slices:
            self.use(group_slices)
        self.exchange_remaining()

    def exchange_remaining(self) -> None:  # noqa: B027 - optional
        """Exchange the local steps since the last exchange, even if they are fewer than a period."""

    def metrics(self) -> dict[str, float]:
        """Return the present values of the method's ``metrics``. Local and cheap."""
        return {}

    def state(self) -> Iterator[tuple[str, Any]]:
        """Yield the names and the values that a checkpoint contains besides ``x``. Local."""
        self.wait()
        yield from entries(self)

    def load(self, state: State) -> None:
        """Continue from a checkpoint; ``x`` has been loaded already. Collective.

        Args:
            state: This worker's entries; or, if the number of workers has changed, the result of
                ``rescaling.merge_all``.

        Raises:
            KeyError: An entry is missing.
        """
        self.wait()
        if rescaling.START in state:
            rescaling.restart(self, state)
            self.t = int(state[rescaling.CLOCK])
        else:
            restore(self, state)
        self.after_load()
        self.comm.barrier()  # before peers read what was loaded

    def after_load(self) -> None:  # noqa: B027 - optional
        """Recompute the values that are derived from the loaded state. Collective."""


class PeriodicWorker(Worker):
    """A worker that exchanges every tau steps, before or after the gradient (``grad_point``).

    Args:
        method: The method, with the settings ``period`` (tau) and ``grad_point``.
        replica: The vectors and the communicator to work with.
    """

    def __init__(self, method: Any, replica: Replica) -> None:
        super().__init__(replica)
        self._method = method

    def before_update(self) -> None:
        """Exchange if it is due and grad_point = pre, which means that the gradient precedes the exchange."""
        if self._method.grad_point == "pre" and self.t % self._method.period == 0:
            self.exchange()

    def after_update(self) -> None:
        """Exchange if it is due and grad_point = post, which means that the exchange precedes the next gradient."""
        if self._method.grad_point == "post" and (self.t + 1) % self._method.period == 0:
            self.exchange()

    def exchange_remaining(self) -> None:
        """Exchange if there have been local steps since the last exchange."""
        if self.n_local_steps:
            self.exchange()

    @property
    def is_absent(self) -> bool:
        """Whether this worker has no weight in the mean of this round, because it makes no steps in it."""
        period = int(self._method.period)
        return self.joined_at is not None and self.joined_at <= self.t // period * period

    @property
    def n_local_steps(self) -> int:
        """The number of local steps since the last exchange. It is valid only between two steps."""
        if self._method.grad_point == "pre":
            return (self.t - 1) % int(self._method.period) + 1
        return self.t % int(self._method.period)

    @abstractmethod
    def exchange(self) -> None:
        """Exchange once. Collective for synchronous methods, else Local."""
