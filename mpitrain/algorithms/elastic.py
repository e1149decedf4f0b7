"""The elastic coupling of a worker to the center, which EASGD and EAMSGD share.

    E = alpha*(x - c);   x <- x - E;   c <- c + E

Asynchronous: whenever a worker comes, atomically for each shard of the center (Zhang, Choromanska, LeCun 2015,
https://arxiv.org/abs/1412.6651, algorithm 1). Synchronous: all workers at once, from the old values of x and c (eq. 5
and 6); every worker keeps the center, and one all-reduce of sum x_i keeps all copies equal to the last bit.

The sum of all x_i and c does not change in an exchange, whatever the order: what the center gains is what the worker
gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.method import Method, setting
from mpitrain.collectives.communicator import Communicator
from mpitrain.errors import UsageError

BETA = 0.9
"""p*alpha in all experiments of Zhang, Choromanska and LeCun."""


@dataclass(frozen=True)
class ElasticMethod(Method):
    """Hyper-parameters of the methods with an elastic center.

    Args:
        moving_rate: alpha, the same on the worker's and on the center's side. 0.9/p when it is not given. It stays
            fixed when the learning rate decays.
        rho: The elastic coefficient; alpha = eta*rho then follows the learning rate. Give one of the two.
        period: tau, local steps between two exchanges.
        synchronous: All workers exchange at once, and wait for each other.
        grad_point: ``pre``: the gradient of a step with an exchange is taken before it (the paper's order);
            ``post``: after it.
    """

    moving_rate: float | None = setting(None, "alpha; 0.9/p when not given", above=-2, below=2)
    rho: float | None = setting(None, "elastic coefficient, alpha = eta*rho; instead of moving_rate", low=0)
    period: int = setting(10, "tau, local steps between exchanges", low=1)
    synchronous: bool = setting(False, "all workers exchange at once")
    grad_point: str = setting("pre", "gradient before or after the exchange", choices=("pre", "post"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moving_rate is not None and self.rho is not None:
            raise UsageError(f"{self.name}: give moving_rate or rho, not both: rho means moving_rate = eta*rho")

    @property
    def is_synchronous(self) -> bool:
        """Whether workers wait for each other."""
        return self.synchronous

    def alpha(self, size: int, learning_rate: float) -> float:
        """The moving rate of an exchange between ``size`` workers."""
        if self.rho is not None:
            return learning_rate * self.rho
        return BETA / size if self.moving_rate is None else self.moving_rate

    def center(self, comm: Communicator, start: Any) -> Center:
        """The center, seeded by worker 0's parameters. Collective."""
        return SynchronousCenter(comm, start) if self.synchronous else AsynchronousCenter(comm, start)


class Center(Protocol):
    """The center variable, as a worker meets it."""

    def exchange(self, x: Any, alpha: float) -> None:
        """x <- x - alpha*(x - c), and the center's side of it."""

    def read(self, out: Any) -> None:
        """Copy the center to ``out`` (n,). Local."""

    def state(self) -> Iterator[tuple[str, Any]]:
        """What a checkpoint must hold."""

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Collective."""


class AsynchronousCenter:
    """The center lives in the memory of all workers, a shard each."""

    def __init__(self, comm: Communicator, start: Any) -> None:
        self._comm, self._dtype = comm, start.dtype
        self._c = comm.shared_vector(start.size, start.dtype)
        kernels.elastic_exchange(start[:0], start[:0].copy(), 0.0, 0.0)  # compiled before the first exchange
        self._seed(start)

    def exchange(self, x: Any, alpha: float) -> None:
        """One fused pass over x and c, shard by shard. Local."""
        self._c.update(lambda part, c: kernels.elastic_exchange(x[part], c, alpha, alpha))

    def read(self, out: Any) -> None:
        """Copy the center to ``out`` (n,). Local."""
        self._c.read(out)

    def state(self) -> Iterator[tuple[str, Any]]:
        """The whole center, in worker 0's part of a checkpoint."""
        if self._comm.rank == 0:
            values = np.empty(self._c.n, self._dtype)
            self._c.read(values)
            yield "center", values

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        self._seed(state.get("center"))

    def _seed(self, values: Any) -> None:
        """Exactly one worker seeds the center."""
        if self._comm.rank == 0:
            self._c.write(values)
        self._comm.barrier()


class SynchronousCenter:
    """Every worker keeps the center; s = sum_i x_i by all-reduce."""

    def __init__(self, comm: Communicator, start: Any) -> None:
        self._comm = comm
        self._s = comm.vector(start.size, start.dtype)
        self._c = start.copy()
        comm.broadcast(self._c)
        kernels.elastic_sync(start[:0], self._c[:0], self._s.local[:0], 0.0, 0.0, 1.0)  # compiled before the first

    def exchange(self, x: Any, alpha: float) -> None:
        """x <- x - alpha*(x - c);  c <- c + alpha*(s - p*c), both from the old values. Collective."""
        self._s.local[...] = x
        self._comm.allreduce(self._s)
        self._comm.statistics.n_rejected += kernels.elastic_sync(
            x, self._c, self._s.local, alpha, alpha, float(self._comm.size)
        )

    def read(self, out: Any) -> None:
        """Copy the center to ``out`` (n,). Local."""
        out[...] = self._c

    def state(self) -> Iterator[tuple[str, Any]]:
        """This worker's copy: all are equal."""
        yield "center", self._c

    def load(self, state: dict[str, Any]) -> None:
        """Local."""
        self._c[...] = state["center"]
