"""All-reduce SGD: the synchronous baseline for all other methods.

    gbar = (1/p) sum_i g_i(x);   x <- x - eta*gbar

With a mini-batch of b on each of p workers this is SGD with a mini-batch of p*b. Every worker makes the same step from
the same point, so that all parameters stay equal to the last bit.

Every worker holds its own parameters, all receive the mean gradient, and each makes the same step.

With ``node_shared`` the workers of a node share one copy of the parameters instead, provided that the local update is
that of torch.optim.SGD and the model is on the host. Each worker updates a slice: one kernel reads that slice of all
gradients in place and makes mean, momentum, weight decay and step in one pass. Each worker holds the momentum of its
own slice only. (ZeRO shards optimizer state in the same way and then gathers the parameters, which here lie in memory
that all can read: Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054.) Only the method may change shared
parameters: a step after any other change is refused.

With ``overlap`` the sums are made during the backward pass. The vector is cut into blocks, from its end. A block is
summed in the background once its gradients and those of all blocks behind it are there, so that all workers sum the
same blocks in the same order. The gradient is the mean when ``backward`` returns. (Li et al., PyTorch Distributed,
2020, https://arxiv.org/abs/2006.15704, section 3.2.)

Source: Goyal et al., Accurate, Large Minibatch SGD, 2017, https://arxiv.org/abs/1706.02677; the baseline of Jin et
al., How to scale distributed deep learning?, 2016, https://arxiv.org/abs/1611.04581.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base import gradients
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.algorithms.base.rescaling import Parts
from mpitrain.algorithms.base.settings import boolean
from mpitrain.algorithms.base.state import Common, State
from mpitrain.algorithms.base.worker import Worker
from mpitrain.collectives.communicator import Communicator, Started
from mpitrain.kernels import norms

BLOCK = 1 << 18
"""The smallest number of elements in a block: a megabyte of float32 takes ten times the latency of a fast network."""


@dataclass(frozen=True)
class AllReduceSGD(Method):
    """Synchronous SGD: every step uses the mean of all workers' gradients.

    To clip the mean, call ``DistributedOptimizer.clip_grad_norm_``. torch's ``clip_grad_norm_`` clips each worker's own
    gradient before the mean is computed, except with ``overlap``.

    Args:
        overlap: Whether to sum gradients while the backward pass computes the others. This helps on a network. On one
            node, the sums would compete with the backward pass for the cores or the GPU.
        node_shared: Whether the workers of a node share one copy of the parameters, which saves memory and time. Only
            the optimizer may then change parameters. It needs a plain ``torch.optim.SGD`` on the host, and has no
            effect together with ``overlap``. ``mpitrain train`` sets it.
    """

    overlap: bool = boolean(False, "sum gradients while the backward pass computes the others")
    node_shared: bool = boolean(
        False, "one copy of the parameters for the workers of a node; nobody else may change it"
    )

    name: ClassVar[str] = "allreduce"
    summary: ClassVar[str] = "synchronous SGD on the mean of all gradients"
    source: ClassVar[str] = "Goyal et al. 2017, arXiv 1706.02677"
    communication: ClassVar[str] = "2(p-1)/p"
    goes_on: ClassVar[str] = "everything"
    begins_anew: ClassVar[str] = "nothing"
    combines_gradients: ClassVar[bool] = True
    averages_gradients: ClassVar[bool] = True

    @property
    def shares_parameters(self) -> bool:
        """Whether the workers of a node may share one copy of the parameters: with ``node_shared``, without overlap."""
        return self.node_shared and not self.overlap

    @property
    def takes_gradients_early(self) -> bool:
        """Whether the worker is notified of gradients during the backward pass: with ``overlap``."""
        return self.overlap

    def worker(self, replica: Replica) -> AllReduceWorker:
        """Make a worker. Collective."""
        if self.overlap:
            return EarlyWorker(replica)
        return (SlicedWorker if replica.node_shared else AllReduceWorker)(replica)


class AllReduceWorker(Worker):
    """A worker without state of its own."""

    def combine_gradients(self) -> None:
        """Compute gbar = (1/p) sum_i g_i. Collective."""
        gradients.average(self)

    def consensus(self, out: Any) -> None:
        """Write this worker's parameters, which are equal on all workers. Local."""
        out[...] = self.x.local


class EarlyWorker(AllReduceWorker):
    """A worker that sums blocks of the gradient during the backward pass."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica)
        self._blocks = blocks_from_the_end(replica.layers, self.g.local.size)
        self._block_of = [
            next(b for b, block in enumerate(self._blocks) if block.start <= layer.start < block.stop)
            for layer in replica.layers
        ]
        self._n_layers = [self._block_of.count(b) for b in range(len(self._blocks))]
        self._n_missing = list(self._n_layers)
        self._begun: list[Started] = []
        self._is_mean = False
        self.comm.allreduce(self.g, mean=True, part=slice(0, 0))  # compiled before the first step

    def gradient_ready(self, layer: int) -> bool:
        """Take note that a layer's gradient is in ``g``; return whether the next block is complete. Local."""
        self._n_missing[self._block_of[layer]] -= 1
        return self._next_is_complete()

    def begin_ready(self) -> None:
        """Start the sum of the next block, and of the complete blocks directly after it. Local."""
        while self._next_is_complete():
            self._begin()

    def _next_is_complete(self) -> bool:
        k = len(self._begun)
        return k < len(self._blocks) and self._n_missing[k] <= 0

    def gradient_complete(self) -> None:
        """Sum the remaining blocks and wait for all sums. Collective."""
        while len(self._begun) < len(self._blocks):
            self._begin()
        for sum_ in self._begun:
            sum_.wait()
        self._begun.clear()
        self._n_missing[:] = self._n_layers
        self._is_mean = True

    def combine_gradients(self) -> None:
        """Compute gbar = (1/p) sum_i g_i, unless ``g`` already is the mean. Collective."""
        if not self._is_mean:
            self.gradient_complete()
        self._is_mean = False
        self.has_common_gradient, self.skips = True, False
        self.skips = not math.isfinite(gradients.norm(self, 2))  # of the mean, and so the same on all workers

    def _begin(self) -> None:
        block = self._blocks[len(self._begun)]
        self._begun.append(self.comm.start(lambda: self.comm.allreduce(self.g, mean=True, part=block)))


def blocks_from_the_end(layers: Sequence[slice], n: int, at_least: int = BLOCK) -> list[slice]:
    """Divide a vector into blocks that begin at layers, and return them from the last to the first.

    Args:
        layers: The slice of each layer, in order. Elements between two layers go to the block of the first of them.
        n: The number of elements of the vector.
        at_least: The smallest number of elements in a block. Only the first block of the vector may be smaller.
    """
    blocks, stop = [], n
    for start in [layer.start for layer in reversed(layers[1:])]:
        if stop - start >= at_least:
            blocks.append(slice(start, stop))
            stop = start
    return [*blocks, slice(0, stop)]


class SlicedWorker(AllReduceWorker):
    """A worker that makes the step of torch.optim.SGD for its slice of the shared parameters of the node."""

    persistent: ClassVar[tuple[str, ...]] = (Common("_velocity"),)

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica)
        self._velocity = VelocitySlice(self.comm, self.x.local)
        n, mine = self.x.local.size, self._velocity.mine
        starts = self.comm.gather([mine.start if mine.start < mine.stop else 0])[:, 0].astype(np.intp)
        self._starts = np.unique(starts) if n else starts[:0]
        self._factor = 1.0  # of the gradient
        neighbours = self.comm.nodes.count(self.comm.nodes[self.comm.rank])
        for kind in ("sgd", "momentum", "nesterov"):  # compiled before the first step
            kernels.mean_step(kind, neighbours if neighbours <= kernels.MAX_MEAN_GRADIENTS else 1).prepare(
                self._velocity.values
            )

    def combine_gradients(self) -> None:
        """Do nothing, because ``before_update`` computes the mean together with the step."""
        self._factor = 1.0

    def clip_gradients(
        self,
        group_slices: Sequence[ParamGroupSlice],
        max_norm: float,
        order: float,
        *,
        skips: bool = False,
        is_combined: bool = False,
    ) -> float:
        """Return the norm of the mean gradient. The next step scales the gradient. Collective."""
        self.use(group_slices)
        if not is_combined:
            gradients.combine(self, skips=skips)
        if self.skips:
            self.g.local[self._starts] = math.nan
        found: list[float] = []
        self.comm.reduce_slices(self.g, lambda _, addends: found.append(norms.powers_of_sum(addends, order)))
        nodes = self.comm.nodes
        on_all = self.comm.gather([norms.total(found, order)])[[node == nodes[self.comm.rank] for node in nodes], 0]
        norm = norms.root(norms.total(on_all, order), order) / self.comm.size * self._factor
        self._factor *= gradients.clip_factor(norm, max_norm)
        return norm

    def before_update(self) -> None:
        """Compute gbar = (1/p) sum_i g_i and make the step, in one pass. Collective.

        A worker with a non-finite gradient sets the first element of every slice to NaN, so that all workers skip the
        step.
        """
        if self.skips:
            self.g.local[self._starts] = math.nan

        def advance(part: slice, addends: Sequence[Any]) -> None:
            if part.start == self._velocity.mine.start and part.start < part.stop:
                self.skips = not math.isfinite(sum(float(addend[0]) for addend in addends))
            if self.skips:
                return
            for group_slice in self.group_slices:
                start, stop = max(part.start, group_slice.part.start), min(part.stop, group_slice.part.stop)
                if start < stop:
                    inside = slice(start - part.start, stop - part.start)
                    self._advance(group_slice, slice(start, stop), [addend[inside] for addend in addends])

        self.comm.reduce_slices(self.g, advance)

    def update_all(self, group_slices: Sequence[ParamGroupSlice]) -> None:
        """Do nothing, because ``before_update`` has made the step."""

    def _advance(self, group_slice: ParamGroupSlice, part: slice, addends: Sequence[Any]) -> None:
        """Make one step of torch.optim.SGD on a part of the slice."""
        x, share = self.x.local[part], self._factor / self.comm.size
        eta, decay = group_slice.learning_rate, group_slice.weight_decay
        if group_slice.momentum == 0:
            kernels.mean_step("sgd", len(addends))(x, *addends, share, eta, decay)
            return
        start = self._velocity.mine.start
        v = self._velocity.values[part.start - start : part.stop - start]
        kind = "nesterov" if group_slice.nesterov else "momentum"
        kernels.mean_step(kind, len(addends))(x, v, *addends, share, eta, group_slice.momentum, decay)


class VelocitySlice:
    """The momentum of this worker's slice of the parameters.

    Args:
        comm: The communicator of the workers.
        x: (n,) the parameters.

    Attributes:
        mine: The slice of this worker.
        values: (length of the slice,) the momentum.
    """

    def __init__(self, comm: Communicator, x: Any) -> None:
        self._comm, self._n = comm, x.size
        self.mine = comm.slice_of(x.size)
        self.values = np.zeros(self.mine.stop - self.mine.start, x.dtype)

    def state(self) -> Iterator[tuple[str, Any]]:
        """Yield the slice. Local."""
        yield "slice_start", self.mine.start
        yield "velocity", self.values

    def merge(self, parts: Parts) -> Iterator[tuple[str, Any]]:
        """Yield the momentum of all parameters (n,), from all slices. Local."""
        whole = np.zeros(self._n, self.values.dtype)
        for part in parts:
            start, held = int(part["slice_start"]), part["velocity"]
            whole[start : start + held.size] = held
        yield "velocity", whole

    def restart(self, state: State) -> None:
        """Continue with this worker's slice of the momentum of all parameters. Local."""
        self.values[...] = state["velocity"][self.mine]

    def load(self, state: State) -> None:
        """Assemble this worker's slice from the saved slices of all workers. Their bounds may differ. Collective."""
        held = state["velocity"]
        for root, (start, size) in enumerate(self._comm.gather([state["slice_start"], held.size]).astype(int)):
            values = held.copy() if root == self._comm.rank else np.empty(size, held.dtype)
            self._comm.broadcast(values, root)
            first, last = max(start, self.mine.start), min(start + size, self.mine.stop)
            if first < last:
                self.values[first - self.mine.start : last - self.mine.start] = values[first - start : last - start]
