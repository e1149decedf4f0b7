"""NeuroevolutionSGD: a population of networks; local search by SGD, evolution between them, similar ones suppressed.

A generation of N individuals (x_k, fitness F_k = a loss, the lower the fitter), one per worker:

    1. local search   ``period`` SGD steps each;  u_k = x_k(end) - x_k(start)
    2. fitness        F_k, sent to all
    3. suppression    s_kl = mean over layers of cos(u_k, u_l);  clusters by average linkage, merged while two are more
                      similar than theta;  the fittest of each cluster survives, the others are suppressed
    4. reproduction   the least fit survivors, except the elite, are replaced too.  Each individual that is replaced
                      becomes a child of one of the elite and a survivor, of different clusters,
                          convex     x <- (1 - w)*x_a + w*x_b,  w uniform in (0, 1)
                          uniform    each layer from one of the two
                      and then, layer by layer,  x <- x + sigma*rms(u)*N(0, I),  u of its parents

The best individual is evaluated.

Source: Zhang, Hao, Gao, Wei, Tang, Combining neuroevolution and stochastic gradient descent, 2020,
https://arxiv.org/abs/2012.11184.

**This is our reconstruction.** Only the abstract of the paper was available to us. It describes a population, SGD as
local search, evolutionary operators, and a hierarchical clustering that suppresses individuals whose weight updates are
too similar. The equations and all defaults above are ours.

Deviations from an ideal method of this kind:

- One individual per worker, so that the population depends on the number of workers.
- Similarities are those of sketches: u_k in ``SKETCH`` numbers by random signs, with an error of about 1/sqrt(SKETCH)
  for orthogonal updates and none for equal ones. They are clustered at once, not first in blocks.
- The fitness is the mean training loss of the generation, unless a loss on held-out data is given (``fitness`` of
  ``DistributedOptimizer``).
- Mutation is relative to the update of a layer, not to its weights: it fades as the search converges.
- Velocities belong to the torch optimizer: a child continues with that of the individual it replaces. SGD without
  momentum has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.rescaling import PARAMETERS, Parts
from mpitrain.algorithms.base.settings import choice, integer, number
from mpitrain.algorithms.base.state import Located, State
from mpitrain.algorithms.base.worker import Worker

SKETCH = 256
"""The number of elements of the sketch of an update, over all layers."""
LEAST = 8
"""The smallest number of elements of the sketch of one layer."""
BLOCK = 4096
"""The number of parameters that are processed at a time."""


@dataclass(frozen=True)
class NeuroevolutionSGD(Method):
    """An evolving population of models, one per worker.

    The models train separately for a generation. Then children of the best models replace unfit and too similar models.
    This is a search with several models, not a faster training of one. It is a reconstruction from a paper's abstract.

    Args:
        period: The number of local steps per generation. An epoch is a good length.
        similarity: The similarity theta above which the updates of two models (or clusters of models) are too similar.
        elite_fraction: The fraction of the population that is always kept, at least one model.
        unfit_fraction: The fraction of the population that is replaced because of low fitness.
        crossover: ``convex``: a child is a point between its parents. ``uniform``: it has each layer from one of them.
        mutation: The standard deviation sigma of mutations, over the root mean square of the parents' layer updates.
    """

    period: int = integer(100, "local steps of a generation", low=1)
    similarity: float = number(0.9, "theta, cosine above which two updates are too similar", low=-1, high=1)
    elite_fraction: float = number(0.25, "of the population, always kept", low=0, high=1)
    unfit_fraction: float = number(0.25, "of the population, replaced though nobody is like them", low=0, high=1)
    crossover: str = choice("convex", "how two parents make a child", ("convex", "uniform"))
    mutation: float = number(0.1, "sigma, relative to the parents' update of a layer", low=0)

    name: ClassVar[str] = "neuroevolution"
    summary: ClassVar[str] = "a population of models: local SGD, crossover of the best, too similar ones suppressed"
    source: ClassVar[str] = "our reconstruction of Zhang, Hao, Gao, Wei, Tang 2020, arXiv 2012.11184 (abstract)"
    can_join: ClassVar[bool] = False
    lost: ClassVar[str] = "the individual of the dead rank"
    communication: ClassVar[str] = "at most 2/tau received (a child's parents)"
    averages_optimizer: ClassVar[bool] = False
    goes_on: ClassVar[str] = "best individual"
    begins_anew: ClassVar[str] = "the other individuals; optimizer states"
    on_host: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = True
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"period": 25})
    metrics: ClassVar[tuple[str, ...]] = ("fitness", "suppressed")

    @property
    def needs_equal_updates(self) -> bool:
        """Whether all workers need equal learning rates: False, because a search may try different ones."""
        return False

    def common_start(self, parts: Parts) -> Any:
        """Return the best individual of the last generation."""
        return parts[int(parts[0]["best"])][PARAMETERS]

    def entries_after_death(self, state: State, worker: Any, survivors: Sequence[int]) -> State:
        """Return the entries, with the new number of the best individual; 0 if it has died. Local."""
        best, numbers = int(state["best"]), list(survivors)
        return {**state, "best": numbers.index(best) if best in numbers else 0}

    def worker(self, replica: Replica) -> NeuroevolutionWorker:
        """Make a worker. Collective."""
        return NeuroevolutionWorker(self, replica)


@dataclass(frozen=True)
class Child:
    """A new individual for a slot of the population.

    Attributes:
        first, second: The ranks of its parents.
        seed: The seed of its crossover and mutation.
    """

    first: int
    second: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """The outcome of a generation, the same on all workers.

    Attributes:
        best: The fittest individual.
        suppressed: The individuals that are too similar to a fitter one.
        children: The new individuals, by the slot they fill.
    """

    best: int
    suppressed: tuple[int, ...]
    children: Mapping[int, Child]


class NeuroevolutionWorker(Worker):
    """A worker with one individual, which the model holds.

    Attributes:
        plan: The outcome of the last generation; None before the end of the first.
    """

    persistent: ClassVar[tuple[str, ...]] = (Located("_start"), "_losses", "_fitness", "_best", "_suppressed", "_rng")

    def __init__(self, method: NeuroevolutionSGD, replica: Replica) -> None:
        super().__init__(replica)
        self._method, self._fitness_of = method, replica.fitness
        x = self.x.local
        self._layers = replica.layers or (slice(0, x.size),)
        self._sketcher = Sketcher(self._layers)
        self._rng = np.random.default_rng(replica.seed)  # the same on all workers, which draw equally often
        self._start = x.copy()
        self._u = np.empty(BLOCK)
        self._losses = 0.0
        self._fitness, self._best, self._suppressed = math.inf, 0, 0
        self.plan: Plan | None = None
        kernels.keep_finite(x[:0])
        kernels.receive(x[:0], self._start[:0])  # compiled before the first step
        kernels.weighted_average(x[:0], self._start[:0], 0.0)
        kernels.scaled_add(x[:0], self._u[:0], 0.0)

    def after_update(self) -> None:
        """End a generation every ``period`` steps. Collective then, otherwise Local."""
        self._losses += math.nan if self.loss is None else self.loss
        if (self.t + 1) % self._method.period == 0:
            self._end_generation()

    def exchange_remaining(self) -> None:
        """Choose the best individual of an unfinished generation, without replacing any. Collective."""
        n_steps = self.t % self._method.period
        if n_steps:
            fitness = self._losses / n_steps if self._fitness_of is None else float(self._fitness_of(self.x.local))
            self._best = int(np.nanargmin(np.nan_to_num(self.comm.gather([fitness])[:, 0], nan=math.inf)))

    def consensus(self, out: Any) -> None:
        """Write the present parameters of the best individual of the last generation. Local."""

        def copy_parent(x: Any) -> None:
            out[...] = x

        self.comm.read(self.x, self._best, copy_parent)

    def metrics(self) -> dict[str, float]:
        """Return this individual's fitness in the last generation, and the number of suppressed individuals. Local."""
        return {"fitness": self._fitness, "suppressed": float(self._suppressed)}

    def _end_generation(self) -> None:
        """Make fitness, suppression and reproduction. Collective."""
        x, n_layers = self.x.local, len(self._layers)
        self._fitness = self._losses / self._method.period if self._fitness_of is None else float(self._fitness_of(x))
        sketch, rms = self._sketcher(x, self._start, self._rng)
        table = self.comm.gather([self._fitness, *rms, *sketch.ravel()])
        fitness, all_rms = table[:, 0], table[:, 1 : 1 + n_layers]
        similarities = mean_cosine(table[:, 1 + n_layers :].reshape(self.comm.size, *sketch.shape))
        self.plan = make_plan(fitness, similarities, self._method, self._rng)
        self._best, self._suppressed = self.plan.best, len(self.plan.suppressed)
        if self.plan.children:
            child = self.plan.children.get(self.comm.rank)
            if child is not None:
                self.comm.statistics.n_nonfinite += kernels.keep_finite(x)  # this individual is replaced
                self._become(child, (all_rms[child.first] + all_rms[child.second]) / 2)
            self.comm.barrier()  # parents continue when their children have read them
        self._start[...] = x
        self._losses = 0.0

    def _become(self, child: Child, rms: np.ndarray) -> None:
        """Create children by crossover and mutation. The parents survive and do not change during the call. Local."""
        rng, x = np.random.default_rng(child.seed), self.x.local
        self._read(child.first, lambda a: kernels.receive(x, a))
        if child.second != child.first:
            if self._method.crossover == "convex":
                w = float(rng.random())
                self._read(child.second, lambda b: kernels.weighted_average(x, b, w))
            else:
                theirs = [layer for layer, heads in zip(self._layers, rng.random(len(self._layers)) < 0.5) if heads]
                self._read(child.second, lambda b: sum(kernels.receive(x[part], b[part]) for part in theirs))
        for layer, scale in zip(self._layers, rms):
            if self._method.mutation * scale > 0 and math.isfinite(scale):
                for part in blocks(layer):
                    xi = rng.standard_normal(out=self._u[: part.stop - part.start])
                    kernels.scaled_add(x[part], xi, self._method.mutation * float(scale))

    def _read(self, peer: int, fn: Any) -> None:
        """Read a parent and count the exchange."""
        statistics = self.comm.statistics
        statistics.n_exchanges += 1
        statistics.bytes_sent += self.x.local.nbytes

        def counted(z: Any) -> None:
            statistics.n_nonfinite += fn(z)

        self.comm.read(self.x, peer, counted)


class Sketcher:
    """A random projection of a change x - start to k numbers per layer, which keeps inner products in expectation.

    Element e of a layer is added to number (e mod k) with a random sign.

    Args:
        layers: The position of each layer.
    """

    def __init__(self, layers: Sequence[slice]) -> None:
        self._layers = layers
        self.k = max(SKETCH // len(layers), LEAST)
        self._length = BLOCK // self.k * self.k
        self._u, self._x = np.empty(self._length), np.empty(self._length)

    def __call__(self, x: Any, start: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the sketch (layers, k) and the root mean square (layers,) of x - start."""
        sketch, squares = np.zeros((len(self._layers), self.k)), np.zeros(len(self._layers))
        with np.errstate(all="ignore"):  # an individual that has diverged is not an error: it is unfit
            for index, layer in enumerate(self._layers):
                for part in blocks(layer, self._length):
                    n = part.stop - part.start
                    self._u[n:] = 0
                    self._u[:n], self._x[:n] = x[part], start[part]
                    u = np.subtract(self._u[:n], self._x[:n], out=self._u[:n])
                    squares[index] += np.dot(u, u)
                    u *= rng.integers(0, 2, n, np.int8) * np.int8(2) - np.int8(1)
                    sketch[index] += self._u.reshape(-1, self.k).sum(axis=0)
            sizes = np.array([max(layer.stop - layer.start, 1) for layer in self._layers])
            return sketch, np.sqrt(squares / sizes)


def blocks(layer: slice, length: int = BLOCK) -> Iterator[slice]:
    """Yield a layer in pieces of at most ``length`` elements."""
    for start in range(layer.start, layer.stop, length):
        yield slice(start, min(start + length, layer.stop))


def mean_cosine(sketches: np.ndarray) -> np.ndarray:
    """Return the cosines between sketches (N, layers, k), averaged over the layers: (N, N).

    The cosine of a layer that has not changed is 0.
    """
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(sketches, axis=2, keepdims=True)
        unit = np.where((lengths > 0) & np.isfinite(lengths), sketches / lengths, 0.0)
    return np.asarray(np.einsum("ilk,jlk->ij", unit, unit) / sketches.shape[1])


def clusters(similarities: np.ndarray, theta: float) -> list[list[int]]:
    """Cluster individuals by average linkage, and return the clusters.

    The two most similar clusters are merged while their similarity is above theta.

    Args:
        similarities: (N, N) the similarities between individuals.
        theta: The largest mean similarity between two different clusters.
    """
    found = [[k] for k in range(len(similarities))]
    while len(found) > 1:
        pairs = [(i, j) for i in range(len(found)) for j in range(i)]
        linkage = [float(similarities[np.ix_(found[i], found[j])].mean()) for i, j in pairs]
        most = int(np.argmax(linkage))
        if linkage[most] <= theta:
            break
        i, j = pairs[most]
        found[j] = sorted(found[j] + found.pop(i))
    return found


def make_plan(
    fitness: np.ndarray, similarities: np.ndarray, method: NeuroevolutionSGD, rng: np.random.Generator
) -> Plan:
    """Choose the survivors of a generation and the parents of the children that fill the other slots.

    Args:
        fitness: (N,) the losses. Individuals whose loss is not finite are the least fit and are replaced.
        similarities: (N, N) the similarities between individuals.
        method: The method, with theta and the fractions.
        rng: A generator in the same state on all workers.
    """
    n = len(fitness)
    loss = np.where(np.isfinite(fitness), fitness, np.inf)
    by_fitness = np.argsort(loss, kind="stable")
    if not np.isfinite(loss[by_fitness[0]]):
        return Plan(0, (), {})  # no individual is fit to be a parent
    rank = np.argsort(by_fitness)
    found = clusters(similarities, method.similarity)
    cluster_of = {k: index for index, members in enumerate(found) for k in members}
    fittest = {min(members, key=lambda k: rank[k]) for members in found}
    suppressed = tuple(k for k in range(n) if k not in fittest)
    survivors = [int(k) for k in by_fitness if k in fittest and np.isfinite(loss[k])]
    n_elite = max(1, round(method.elite_fraction * n))
    elite, others = survivors[:n_elite], survivors[n_elite:]
    n_unfit = min(int(method.unfit_fraction * n), len(others))
    parents = elite + others[: len(others) - n_unfit]
    children = {}
    for slot in range(n):
        if slot in parents:
            continue
        first = elite[int(rng.integers(len(elite)))]
        mates = [k for k in parents if cluster_of[k] != cluster_of[first]] or [first]
        children[slot] = Child(first, mates[int(rng.integers(len(mates)))], int(rng.integers(2**63)))
    return Plan(int(by_fitness[0]), suppressed, children)
