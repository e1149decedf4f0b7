"""The contract of a method: what it declares, and what everything above it works from.

A method is a frozen dataclass of hyper-parameters. ``worker`` makes the running state of one worker from a ``Replica``:
flat vectors and a communicator. The optimizer, the trainer, the checkpoint and the simulator know no more of a method
than this file says, and none of them asks for its name.

One step of a worker, with the gradient already in ``g``::

    before_update      exchanges whose gradient point is before them (the default of the papers)
    the local update   x <- x - eta*g, by the torch optimizer; or the method's own ``update`` (``owns_update``)
    after_update       exchanges after which the next gradient is computed
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Self

import numpy as np

from mpitrain import kernels
from mpitrain.collectives.communicator import Communicator, Vector
from mpitrain.errors import UsageError


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """Declare a hyper-parameter: a dataclass field with its range.

    Args:
        default: As in the paper.
        help: One line, with the paper's symbol.
        low, high: The range, ends included.
        above, below: The range, ends excluded.
        choices: The values of a choice.
    """
    bounds = {"low": low, "high": high, "above": above, "below": below}
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, **bounds})


@dataclass(frozen=True, slots=True)
class ParamGroupSlice:
    """A part of the flat vector that is updated with the same settings (a parameter group).

    Attributes:
        part: Of the vector.
        learning_rate: eta.
        weight_decay: The L2 term.
        momentum, nesterov: Of torch.optim.SGD, for a worker that makes its step.
    """

    part: slice
    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False


@dataclass(frozen=True)
class Replica:
    """What a worker is made from: one copy of the model, as flat vectors, and the other workers.

    Attributes:
        comm: The workers.
        x: (n,) what the model holds; equal on all workers when they are made.
        g: (n,) where the gradient will be.
        seed: Of the run; a worker draws from (seed, rank).
        layers: Where each parameter tensor lies in the vector, in order; empty when nobody knows, and then the
            vector is one layer.
        fitness: The loss of parameters (n,) on data held out from training, for methods that ask for it; the same
            function on all workers. None when there are no such data.
        node_shared: The workers of a node hold one ``x`` between them; only for methods that declare it.
    """

    comm: Communicator
    x: Vector
    g: Vector
    seed: int = 0
    layers: tuple[slice, ...] = ()
    fitness: Callable[[Any], float] | None = None
    node_shared: bool = False


@dataclass(frozen=True)
class Method(ABC):
    """Hyper-parameters of one method. Subclasses are frozen dataclasses whose fields are made by ``setting``.

    Attributes:
        name: In the registry and on the command line.
        summary: One line for ``mpitrain algorithms``.
        source: Authors, title, year, where.
        communication: What a worker sends and receives a step, in vectors of the model's size.
        owns_update: Whether the method makes the local update itself (then ``update`` is called and the torch
            optimizer only lends its learning rates and weight decays).
        needs_loss: Whether ``step`` must be given the loss.
        needs_gradient: Whether ``step`` must find the gradient in ``g``, for more than the local update.
        on_host: Whether it computes with its vectors otherwise than by kernels, and so needs them in host memory.
            Parameters on a GPU are then copied there and back at every step.
        evaluates_history: Whether what it evaluates is an average over the past, which moves on when the workers rest.
        learning_rate_factor: How much larger its learning rate should be than that of SGD with momentum 0.9; a default
            for comparisons, which nothing applies by itself.
        short_run: Settings for runs of a few hundred steps, in which the paper's periods and windows would hardly come
            round; for comparisons, like the factor.
        metrics: The names of what ``Worker.metrics`` tells.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    communication: ClassVar[str]
    owns_update: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = True
    on_host: ClassVar[bool] = False
    evaluates_history: ClassVar[bool] = False
    learning_rate_factor: ClassVar[float] = 1.0
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    metrics: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *_: Any, **settings: Any) -> Self:
        """Refuse settings that there are not, naming those that there are."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = next((name for name in settings if name not in known), None)
        if unknown is not None:
            raise TypeError(f"{cls.__name__} has no setting {unknown!r}: it has {', '.join(known) or 'none'}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check(field, getattr(self, field.name))

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def is_synchronous(self) -> bool:
        """Whether workers wait for each other in ``step``: then all of them must make the same number of steps."""
        return True

    @property
    def node_shared(self) -> bool:
        """Whether all workers hold the same parameters after every step, so that those of a node can hold one copy.

        Where the local update is torch.optim.SGD's, they then do, and the worker makes it.
        """
        return False

    @property
    def takes_gradients_early(self) -> bool:
        """Whether the worker is told during the backward pass which parts of the gradient are there.

        After ``gradient_complete`` the gradient in ``g``, which is that of the parameters, is what it has made of it.
        """
        return False

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """What is outside a region in which the method is proved to work, one line each.

        Each names the bound and a setting that would be inside.

        Args:
            size: The number of workers.
            learning_rate: eta, as the run begins.
        """
        yield from ()

    def elastic_coefficient(self, size: int, learning_rate: float) -> float:
        """rho, the strength of the springs between the workers and what is evaluated; 0 where there are none.

        Args:
            size: The number of workers.
            learning_rate: eta.
        """
        return 0.0

    @abstractmethod
    def worker(self, replica: Replica) -> Worker:
        """Allocate what one worker needs. Collective."""

    def _check(self, field: dataclasses.Field[Any], value: Any) -> None:
        """Refuse what the method cannot work with, naming what it can."""
        choices = field.metadata.get("choices")
        if choices is not None:
            if value not in choices:
                raise UsageError(f"{self.name}: {field.name} must be one of {', '.join(choices)}, not {value!r}")
            return
        kind = str(field.type)
        if value is None and "None" in kind:
            return
        wanted: tuple[type, ...] = (bool,) if "bool" in kind else (int,) if "int" in kind else (int, float)
        good_type = isinstance(value, wanted) and ("bool" in kind or not isinstance(value, bool))
        if not good_type or not math.isfinite(value) or not _within(field, value):
            raise UsageError(f"{self.name}: {field.name} must be {describe_range(field)}, not {value!r}")


def describe_range(field: dataclasses.Field[Any]) -> str:
    """The values a hyper-parameter may have, in words."""
    if field.metadata.get("choices"):
        return " | ".join(field.metadata["choices"])
    kind = str(field.type)
    if "bool" in kind:
        return "true or false"
    bounds = [
        f" {relation} {field.metadata[key]:g}"
        for key, relation in (("low", ">="), ("above", ">"), ("high", "<="), ("below", "<"))
        if field.metadata.get(key) is not None
    ]
    return ("a whole number" if "int" in kind else "a number") + " and".join(bounds)


def _within(field: dataclasses.Field[Any], value: float) -> bool:
    bounds = field.metadata
    return (
        (bounds.get("low") is None or value >= bounds["low"])
        and (bounds.get("high") is None or value <= bounds["high"])
        and (bounds.get("above") is None or value > bounds["above"])
        and (bounds.get("below") is None or value < bounds["below"])
    )


def is_finite(vector: Any) -> bool:
    """Whether all of a vector (n,) is finite."""
    return bool(np.isfinite(kernels.to_host(vector)).all())


def replace_nonfinite(vector: Any, other: Any) -> None:
    """Put the other's elements (n,) in the place of those of a vector (n,) that are not finite."""
    own = kernels.to_host(vector)
    kernels.assign(vector, np.where(np.isfinite(own), own, kernels.to_host(other)))


def wide_copy(vector: Any) -> Any:
    """A copy of a vector (n,) in which small changes add up (``kernels.accumulator``)."""
    copied = np.zeros_like(vector, dtype=kernels.accumulator(vector.dtype))
    kernels.copy(copied, vector)
    return copied


STEPS_BETWEEN_CHECKS = 50
"""On a GPU, at what has been rejected: the look waits for it."""


class Worker(ABC):
    """One worker's running state of a method.

    A worker whose gradient was not finite recovers: when something of its, or something that it was sent, has been
    rejected, it takes what the method evaluates where its own values are not finite.

    Args:
        replica: What it works on.

    Attributes:
        comm, x, g: The replica's.
        t: The worker's own clock: local steps made.
        learning_rate: eta of the present step.
        loss: Of the present mini-batch, for methods that need it.
        positions: The worker's own vectors (n,) that lie where the model does; ``x`` is the first.
        velocities: Its own vectors (n,) that a worker at rest has as zeros.
    """

    def __init__(self, replica: Replica) -> None:
        self.comm, self.x, self.g = replica.comm, replica.x, replica.g
        self.t = 0
        self.learning_rate = 0.0
        self.loss: float | None = None
        self.positions: tuple[Any, ...] = (self.x.local,)
        self.velocities: tuple[Any, ...] = ()
        self._n_nonfinite = 0  # when it was looked at

    def step(
        self,
        group_slices: Sequence[ParamGroupSlice],
        local_update: Callable[[], object] | None,
        loss: float | None = None,
    ) -> bool:
        """Make one step with the gradient in ``g``.

        Args:
            segments: Learning rate and weight decay of each part of the vector. Where a method has one eta for the
                whole vector it is the largest: parts with none are at rest.
            local_update: Updates ``x`` in place; None when the method owns the update.
            loss: Of the mini-batch, for methods that rank workers by it.

        Returns:
            Whether something has been rejected. The worker has recovered then, and the local update should forget what
            it remembers and is not finite.
        """
        self.learning_rate = max(group_slice.learning_rate for group_slice in group_slices)
        self.loss = loss
        self.before_update()
        if local_update is not None:
            local_update()
        else:
            self.update_all(group_slices)
        self.after_update()
        self.t += 1
        return self._recovers()

    def _recovers(self) -> bool:
        n_nonfinite: Any = self.comm.statistics.n_nonfinite
        if not isinstance(n_nonfinite, int | np.integer) and self.t % STEPS_BETWEEN_CHECKS:
            return False
        before, self._n_nonfinite = self._n_nonfinite, int(n_nonfinite)
        if self._n_nonfinite == before:
            return False
        self.reset_nonfinite()
        return True

    def reset_nonfinite(self) -> None:
        """Take what the method evaluates where this worker's own values are not finite. Local."""
        if not all(is_finite(vector) for vector in self.positions):
            evaluated = np.zeros_like(self.x.local)
            self.consensus(evaluated)
            for vector in self.positions:
                replace_nonfinite(vector, evaluated)
        for vector in self.velocities:
            kernels.keep_finite(vector)

    def gradient_ready(self, layer: int) -> bool:
        """During a backward pass: the gradient of ``replica.layers[layer]`` is in ``g``.

        Returns:
            Whether ``begin_ready`` should be called.
        """
        return False

    def begin_ready(self) -> None:  # noqa: B027 - not every method has something to do here
        """Begin what can be begun with the gradients that are there."""

    def gradient_complete(self) -> None:  # noqa: B027 - not every method has something to do here
        """The backward pass is at its end, and all of the gradient is in ``g``."""

    def before_update(self) -> None:  # noqa: B027 - not every method has something to do here
        """What happens with the gradient known and the local update not yet made."""

    def update_all(self, group_slices: Sequence[ParamGroupSlice]) -> None:
        """The local update, for methods that own it."""
        for group_slice in group_slices:
            self.update(group_slice)

    def update(self, group_slice: ParamGroupSlice) -> None:
        """The local update of a part, for methods that own it."""
        raise NotImplementedError(f"{type(self).__name__} declares owns_update and has no update")

    def after_update(self) -> None:  # noqa: B027 - not every method has something to do here
        """What happens after the local update."""

    @abstractmethod
    def consensus(self, out: Any) -> None:
        """Write what the method evaluates (center, average, leader) to ``out`` (n,). Local, at any time."""

    def wait(self) -> None:  # noqa: B027 - not every method has something to do here
        """Nothing of this worker's is under way any more at what all share. Local."""

    def finalize(self) -> None:  # noqa: B027 - not every method has something to do here
        """The run is at its end: hand over what no exchange has taken. Local."""

    def metrics(self) -> dict[str, float]:
        """A number for each name in the method's ``metrics``, as it is now. Local, and so cheap that nobody minds."""
        return {}

    def state(self) -> Iterator[tuple[str, Any]]:
        """Name and value of everything a checkpoint must hold besides ``x``: arrays, numbers, strings."""
        yield "t", self.t

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Collective."""
        self.t = int(state["t"])


class PeriodicWorker(Worker):
    """A worker that exchanges every tau steps; ``grad_point`` says on which side of the gradient.

    Args:
        method: With the settings ``period`` (tau) and ``grad_point``.
        replica: What it works on.
    """

    def __init__(self, method: Any, replica: Replica) -> None:
        super().__init__(replica)
        self._method = method

    def before_update(self) -> None:
        """grad_point = pre: the gradient was taken before this exchange."""
        if self._method.grad_point == "pre" and self.t % self._method.period == 0:
            self.exchange()

    def after_update(self) -> None:
        """grad_point = post: the next gradient is taken after this exchange."""
        if self._method.grad_point == "post" and (self.t + 1) % self._method.period == 0:
            self.exchange()

    @abstractmethod
    def exchange(self) -> None:
        """Exchange once. Local, or Collective where the method is synchronous."""
