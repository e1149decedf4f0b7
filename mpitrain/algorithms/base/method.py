"""The contract of a method.

A method is a frozen dataclass of hyper-parameters. ``worker`` makes the running state of one worker from a ``Replica``:
flat vectors and a communicator. The optimizer, the trainer, the checkpoint and the simulator rely only on the
interface in this file and ``base.worker``, and never on the name of a method.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Self

from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.settings import check_settings
from mpitrain.algorithms.base.worker import Worker
from mpitrain.errors import suggestion

LEAST_PERIODS = 3
"""Periods that a run should have at least. With fewer, its last exchange decides what is evaluated."""


@dataclass(frozen=True)
class Interval:
    """How often a worker exchanges.

    Attributes:
        steps: Local steps between two exchanges, or those after which an average has followed.
        setting: The setting that decides.
        advice: Returns the text of a value with which it would be that many steps.
    """

    steps: float
    setting: str = "period"
    advice: Callable[[float], str] = lambda steps: f"{max(int(steps), 1)} or less"


@dataclass(frozen=True)
class Method(ABC):
    """The hyper-parameters of one method. Subclasses are frozen dataclasses whose fields are ``base.settings``.

    Attributes:
        name: The name in the registry and on the command line.
        summary: One line for ``mpitrain algorithms``.
        source: Authors, title, year, where.
        communication: What a worker sends and receives per step, in vectors of the model's size.
        owns_update: Whether the method makes the local update itself. Then ``update`` is called, and the torch
            optimizer only provides learning rates and weight decays.
        needs_loss: Whether ``step`` must be given the loss.
        needs_gradient: Whether ``step`` needs the gradient in ``g``, for more than the local update.
        combines_gradients: Whether a step replaces the gradients of all workers by one, their mean or another
            aggregate. If the aggregate is not finite all of them leave out the step.
        on_host: Whether the method computes with its vectors by other means than kernels, and so needs them in host
            memory. Parameters on a GPU are then copied there and back at every step.
        evaluates_history: Whether it evaluates an average over the past, which moves on while the workers rest.
        learning_rate_factor: How much larger its learning rate should be than that of SGD with momentum 0.9; a default
            for comparisons, which nothing applies by itself.
        short_run: Settings for runs of a few hundred steps, which are shorter than the papers' periods and windows;
            for comparisons, like the factor.
        metrics: The names of the values that ``Worker.metrics`` returns.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    communication: ClassVar[str]
    owns_update: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = True
    combines_gradients: ClassVar[bool] = False
    on_host: ClassVar[bool] = False
    evaluates_history: ClassVar[bool] = False
    learning_rate_factor: ClassVar[float] = 1.0
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    metrics: ClassVar[tuple[str, ...]] = ()

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
        """Return the hyper-parameters by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def is_synchronous(self) -> bool:
        """Whether workers wait for each other in ``step``: then all of them must make the same number of steps."""
        return True

    @property
    def needs_equal_updates(self) -> bool:
        """Whether all workers need equal learning rates, momenta and other numbers of the parameter groups."""
        return self.is_synchronous

    @property
    def shares_parameters(self) -> bool:
        """Whether the workers of a node may share one copy of the parameters, which are equal after every step.

        They do so where the local update is that of torch.optim.SGD; the worker then makes the update. A method offers
        this as a setting ``node_shared`` that is off by default: what a script does to shared parameters by hand would
        be done once per rank. ``mpitrain train`` turns it on.
        """
        return False

    @property
    def takes_gradients_early(self) -> bool:
        """Whether the worker is told during the backward pass which parts of the gradient are in ``g``.

        After ``gradient_complete`` the parameters' gradient is what the worker has left in ``g``.
        """
        return False

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Yield one line for each setting outside the region in which the method is proved to work.

        Each line names the bound and a value inside it.

        Args:
            size: The number of workers.
            learning_rate: eta at the start of the run.
        """
        yield from ()

    def interval(self, size: int) -> Interval:
        """Return how often one of ``size`` workers exchanges; by the setting ``period`` if there is one."""
        return Interval(float(getattr(self, "period", None) or 1))

    def budget_warnings(self, size: int, steps: float) -> Iterator[str]:
        """Yield a line if a run has fewer than three of the method's periods, with a period that would fit.

        Args:
            size: The number of workers.
            steps: Local steps of each worker in the run.
        """
        interval = self.interval(size)
        if interval.steps > 1 and steps < LEAST_PERIODS * interval.steps:
            yield (
                f"{self.name}: {steps:.0f} steps of each worker are fewer than {LEAST_PERIODS} periods of "
                f"{interval.steps:.0f} steps: set {interval.setting}={interval.advice(steps / LEAST_PERIODS)}, "
                "or make the run longer"
            )

    def elastic_coefficient(self, size: int, learning_rate: float) -> float:
        """Return rho, the strength of the springs between the workers and the consensus; 0 without springs.

        Args:
            size: The number of workers.
            learning_rate: eta.
        """
        return 0.0

    @abstractmethod
    def worker(self, replica: Replica) -> Worker:
        """Create a worker and allocate its memory. Collective."""
