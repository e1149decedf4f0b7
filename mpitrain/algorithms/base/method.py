"""The contract of a method.

A method is a frozen dataclass of hyper-parameters. ``worker`` makes the running state of one worker from a ``Replica``:
flat vectors and a communicator. The optimizer, the trainer, the checkpoint and the simulator rely only on the
interface in this file and ``base.worker``, and never on the name of a method.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Self

from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.rescaling import PARAMETERS, Parts, mean_of_parts
from mpitrain.algorithms.base.settings import check_settings
from mpitrain.algorithms.base.state import State
from mpitrain.algorithms.base.worker import Worker
from mpitrain.errors import suggestion

LEAST_PERIODS = 3
"""Periods that a run should have at least. With fewer, its last exchange decides what is evaluated."""


@dataclass(frozen=True)
class Interval:
    """The interval between two exchanges of a worker.

    Attributes:
        steps: The number of local steps between two exchanges. If the method evaluates a moving average, it is the
            number of steps over which this average extends.
        setting: The name of the setting that determines ``steps``.
        advice: A function that takes a number of steps. It returns a text with the values of the setting for which
            ``steps`` is at most this number.
    """

    steps: float
    setting: str = "period"
    advice: Callable[[float], str] = lambda steps: f"{max(int(steps), 1)} or less"


@dataclass(frozen=True)
class Method(ABC):
    """The settings of a method. Subclasses are frozen dataclasses; their fields are declared with ``base.settings``.

    Attributes:
        name: The name in the registry and on the command line.
        summary: A description in one line.
        source: The paper: authors, title, year, place.
        communication: The data that a worker sends and receives per step, in vectors of the model's size.
        owns_update: Whether the method makes the local update itself, in ``update``. The torch optimizer then only
            provides learning rates and weight decays.
        needs_loss: Whether the caller must pass the loss to ``step``.
        needs_gradient: Whether the method itself uses the gradient in ``g``, apart from the local update.
        combines_gradients: Whether a step replaces the gradients of all workers by their mean or another aggregate. If
            the aggregate is not finite, all workers skip the step.
        averages_gradients: Whether every step is made with the mean of all workers' gradients.
        on_host: Whether the vectors must be in host memory, because the method needs operations without a GPU kernel.
            Parameters on a GPU are then copied to the host and back at every step.
        evaluates_history: Whether the consensus is an average over the past, which follows the parameters slowly.
        learning_rate_factor: The recommended learning rate, divided by that of SGD with momentum 0.9. Only comparisons
            use it.
        short_run: The recommended settings for runs of a few hundred steps, for which the periods in the papers are too
            long. Only comparisons use them.
        metrics: The names of the values that ``Worker.metrics`` returns.
        can_join: Whether a rank whose batches have run out may go on taking part in the exchanges of the other ranks
            (``DistributedOptimizer.join``).
        starts_at: The checkpoint entry with the parameters from which all workers start when a run continues with a
            different number of workers. With None, they start from the mean of all workers' parameters.
        can_lose_workers: Whether the workers of a synchronous method can continue after the death of one of them
            (``base.surviving``).
        lost: A description of what is lost with a worker, apart from its local steps since the last exchange.
        averages_optimizer: Whether the torch optimizers of such a run start with the mean of the saved optimizer
            states. Otherwise they start without a state.
        goes_on, begins_anew: Descriptions of the state that continues with a different number of ranks, and of the
            state that starts anew.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    communication: ClassVar[str]
    owns_update: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = True
    combines_gradients: ClassVar[bool] = False
    averages_gradients: ClassVar[bool] = False
    on_host: ClassVar[bool] = False
    evaluates_history: ClassVar[bool] = False
    learning_rate_factor: ClassVar[float] = 1.0
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    metrics: ClassVar[tuple[str, ...]] = ()
    can_join: ClassVar[bool] = True
    starts_at: ClassVar[str | None] = None
    averages_optimizer: ClassVar[bool] = True
    can_lose_workers: ClassVar[bool] = True
    lost: ClassVar[str] = ""
    goes_on: ClassVar[str] = "mean of the parameters and of the optimizer states"
    begins_anew: ClassVar[str] = "differences between workers"

    def __new__(cls, *_: Any, **settings: Any) -> Self:
        """Refuse unknown settings and name the known ones."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = next((name for name in settings if name not in known), None)
        if unknown is not None:
            raise TypeError(f"{cls.__name__} has no setting {unknown!r}: {suggestion(unknown, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_settings(self, self.name)

    def settings(self) -> dict[str, Any]:
        """Return the settings by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def is_synchronous(self) -> bool:
        """Whether workers wait for each other in ``step``. If so, they must all make the same number of steps."""
        return True

    @property
    def needs_equal_updates(self) -> bool:
        """Whether the settings of the parameter groups, such as learning rates, must be equal on all workers."""
        return self.is_synchronous

    @property
    def shares_parameters(self) -> bool:
        """Whether the workers of a node may share one copy of the parameters, which are equal after every step.

        They share it if the local update is that of torch.optim.SGD; the worker then makes the update. The setting
        ``node_shared`` of a method controls this. It is off by default, because a direct change of shared parameters by
        a script would take place once per rank. ``mpitrain train`` turns it on.
        """
        return False

    @property
    def takes_gradients_early(self) -> bool:
        """Whether the worker is notified during the backward pass when a part of the gradient is in ``g``.

        At the end of the backward pass, the optimizer calls ``Worker.gradient_complete``. It continues with the
        gradient that is in ``g`` after this call.
        """
        return False

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Yield a line for each setting outside the region in which the method is proven to converge.

        Each line names the bound, and a value inside the region.

        Args:
            size: The number of workers.
            learning_rate: The learning rate eta at the start of the run.
        """
        yield from ()

    def interval(self, size: int) -> Interval:
        """Return the interval between two exchanges of a worker, by default from the setting ``period``."""
        return Interval(float(getattr(self, "period", None) or 1))

    def budget_warnings(self, size: int, steps: float) -> Iterator[str]:
        """Yield a warning if a run is shorter than three periods of the method. The warning names a shorter period.

        Args:
            size: The number of workers.
            steps: The number of local steps of each worker in the run.
        """
        interval = self.interval(size)
        if interval.steps > 1 and steps < LEAST_PERIODS * interval.steps:
            yield (
                f"{self.name}: {steps:.0f} steps of each worker are fewer than {LEAST_PERIODS} periods of "
                f"{interval.steps:.0f} steps: set {interval.setting}={interval.advice(steps / LEAST_PERIODS)}, "
                "or make the run longer"
            )

    def check_size(self, size: int) -> None:  # noqa: B027 - optional
        """Check that the method can run with this number of workers. Local.

        Raises:
            UsageError: It cannot; the message says why.
        """

    def exchanges_before(self, worker: Any) -> bool:
        """Return whether a worker communicates before the local update of its present step. Local.

        Args:
            worker: A worker of this method, in or after the step before.
        """
        return self.combines_gradients

    def exchanges_after(self, worker: Any) -> bool:
        """Return whether a worker communicates after the local update of its present step. Local.

        By default, it does so at the end of a period, unless the method combines gradients.

        Args:
            worker: A worker of this method, in the step.
        """
        period = int(getattr(self, "period", None) or 1)
        return not self.combines_gradients and (worker.t + 1) % period == 0

    def entries_after_death(self, state: State, worker: Any, survivors: Sequence[int]) -> State:
        """Return the entries with which a survivor continues in a new worker. Local.

        Args:
            state: The survivor's checkpoint entries, at the beginning of the exchange that failed.
            worker: The new worker, one of as many as there are survivors.
            survivors: The former number of each new worker, in ascending order.
        """
        return state

    def elastic_coefficient(self, size: int, learning_rate: float) -> float:
        """Return rho, the strength of the springs between the workers and the consensus; 0 without springs.

        Args:
            size: The number of workers.
            learning_rate: The learning rate eta.
        """
        return 0.0

    def common_start(self, parts: Parts) -> Any:
        """Return the parameters (n,) from which all workers start when their number has changed. Local.

        Their type is float32 or wider.

        Args:
            parts: For each worker of the saved run, its checkpoint entries and its parameters.
        """
        if self.starts_at is not None:
            return parts[0][self.starts_at]
        return mean_of_parts((part[PARAMETERS], 1.0) for part in parts)

    @abstractmethod
    def worker(self, replica: Replica) -> Worker:
        """Create a worker and allocate its memory. Collective."""
