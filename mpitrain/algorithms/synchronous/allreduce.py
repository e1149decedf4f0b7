"""All-reduce SGD: the synchronous baseline that every other method is measured against.

    gbar = (1/p) sum_i g_i(x);   x <- x - eta*gbar

With a mini-batch of b on each of p workers this is SGD with a mini-batch of p*b. Every worker takes the same step from
the same point, so that all parameters stay equal to the last bit.

Where the local update is that of torch.optim.SGD, the workers of a node therefore hold one copy of the parameters
between them, and each is in charge of a slice of it: one kernel reads that slice of all gradients where they lie and
takes mean, momentum, weight decay and step in one pass. Nobody holds the momentum of another's slice. (Rajbhandari et
al., ZeRO, 2020, https://arxiv.org/abs/1910.02054, shard optimizer state in the same way, and then gather the
parameters, which here lie where all can see them.) With any other optimizer every worker holds its own parameters, the
mean gradient is written to all, and each makes the same step.

With ``overlap`` the sums are made while the backward pass goes on: from its end, the vector is cut into blocks, and a
block is summed in the background as soon as its gradients and those of all blocks behind it are there, so that all
workers sum the same blocks in the same order. The gradient is then the mean when ``backward`` returns. (Li et al.,
PyTorch Distributed, 2020, https://arxiv.org/abs/2006.15704, section 3.2.)

Source: Goyal et al., Accurate, Large Minibatch SGD, 2017, https://arxiv.org/abs/1706.02677; the baseline of Jin et
al., How to scale distributed deep learning?, 2016, https://arxiv.org/abs/1611.04581.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.method import Method, ParamGroupSlice, Replica, Worker, setting
from mpitrain.collectives.communicator import Started

BLOCK = 1 << 18
"""Elements that are summed at once, at least: a megabyte of float32 takes ten times its latency on a fast network."""


@dataclass(frozen=True)
class AllReduceSGD(Method):
    """Every step uses the mean of all workers' gradients.

    Gradient clipping done before ``step`` clips each worker's own gradient, before the mean; with ``overlap`` the mean.

    Args:
        overlap: Sum gradients while the backward pass computes the others. For networks: on one node the sums are made
            by the cores (or the GPU) that the backward pass needs, and the one copy of the parameters is lost.
    """

    overlap: bool = setting(False, "sum gradients while the backward pass computes the others")

    name: ClassVar[str] = "allreduce"
    summary: ClassVar[str] = "synchronous SGD on the mean of all gradients"
    source: ClassVar[str] = "Goyal et al. 2017, arXiv 1706.02677"
    communication: ClassVar[str] = "2(p-1)/p"

    @property
    def node_shared(self) -> bool:
        """Whether the workers of a node can hold one copy of the parameters."""
        return not self.overlap

    @property
    def takes_gradients_early(self) -> bool:
        """Whether the worker is told which gradients are there."""
        return self.overlap

    def worker(self, replica: Replica) -> AllReduceWorker:
        """Collective."""
        if self.overlap:
            return EarlyWorker(replica)
        return (SlicedWorker if replica.node_shared else AllReduceWorker)(replica)


class AllReduceWorker(Worker):
    """No state but the parameters."""

    def before_update(self) -> None:
        """gbar = (1/p) sum_i g_i"""
        self.comm.allreduce(self.g, mean=True)

    def consensus(self, out: Any) -> None:
        """Any worker's parameters: they are equal. Local."""
        out[...] = self.x.local


class EarlyWorker(AllReduceWorker):
    """Sums blocks of the gradient while others are computed."""

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
        """Whether a block has become whole, and all that come before it."""
        self._n_missing[self._block_of[layer]] -= 1
        return self._next_is_whole()

    def begin_ready(self) -> None:
        """Begin to sum it, and those that waited for it."""
        while self._next_is_whole():
            self._begin()

    def _next_is_whole(self) -> bool:
        k = len(self._begun)
        return k < len(self._blocks) and self._n_missing[k] <= 0

    def gradient_complete(self) -> None:
        """Sum what no gradient was announced of, and wait for all sums. Collective."""
        while len(self._begun) < len(self._blocks):
            self._begin()
        for sum_ in self._begun:
            sum_.wait()
        self._begun.clear()
        self._n_missing[:] = self._n_layers
        self._is_mean = True

    def before_update(self) -> None:
        """gbar = (1/p) sum_i g_i, unless there is one."""
        if not self._is_mean:
            self.gradient_complete()
        self._is_mean = False

    def _begin(self) -> None:
        block = self._blocks[len(self._begun)]
        self._begun.append(self.comm.start(lambda: self.comm.allreduce(self.g, mean=True, part=block)))


def blocks_from_the_end(layers: Sequence[slice], n: int, at_least: int = BLOCK) -> list[slice]:
    """The vector in blocks, the last first, each beginning with a layer; the first of the vector may be small.

    Args:
        layers: Where each begins, in order; what lies between them belongs to the one before.
        n: Elements of the vector.
        at_least: Elements of a block.
    """
    blocks, stop = [], n
    for start in [layer.start for layer in reversed(layers[1:])]:
        if stop - start >= at_least:
            blocks.append(slice(start, stop))
            stop = start
    return [*blocks, slice(0, stop)]


class SlicedWorker(AllReduceWorker):
    """Makes the steps of torch.optim.SGD for its slice of parameters that the node shares."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica)
        self._mine = self.comm.slice_of(self.x.local.size)
        self._v = np.zeros(self._mine.stop - self._mine.start, self.x.local.dtype)
        neighbours = self.comm.nodes.count(self.comm.nodes[self.comm.rank])
        for kind in ("sgd", "momentum", "nesterov"):  # compiled before the first step
            kernels.mean_step(kind, neighbours if neighbours <= kernels.MAX_MEAN_GRADIENTS else 1).prepare(self._v)

    def before_update(self) -> None:
        """The mean is taken in ``update_all``."""

    def update_all(self, group_slices: Sequence[ParamGroupSlice]) -> None:
        """gbar = (1/p) sum_i g_i and the step with it, in one pass. Collective."""

        def advance(part: slice, addends: Sequence[Any]) -> None:
            for group_slice in group_slices:
                start, stop = max(part.start, group_slice.part.start), min(part.stop, group_slice.part.stop)
                if start < stop:
                    inside = slice(start - part.start, stop - part.start)
                    self._advance(group_slice, slice(start, stop), [addend[inside] for addend in addends])

        self.comm.reduce_slices(self.g, advance)

    def _advance(self, group_slice: ParamGroupSlice, part: slice, addends: Sequence[Any]) -> None:
        """One step of torch.optim.SGD on a part of the slice."""
        x, share, eta, decay = (
            self.x.local[part],
            1 / self.comm.size,
            group_slice.learning_rate,
            group_slice.weight_decay,
        )
        if group_slice.momentum == 0:
            kernels.mean_step("sgd", len(addends))(x, *addends, share, eta, decay)
            return
        v = self._v[part.start - self._mine.start : part.stop - self._mine.start]
        kind = "nesterov" if group_slice.nesterov else "momentum"
        kernels.mean_step(kind, len(addends))(x, v, *addends, share, eta, group_slice.momentum, decay)

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, and the momentum of this worker's slice."""
        yield from super().state()
        yield "slice_start", self._mine.start
        yield "velocity", self._v

    def load(self, state: dict[str, Any]) -> None:
        """Collective: the slices may have been others."""
        super().load(state)
        held = state["velocity"]
        for root, (start, size) in enumerate(self.comm.gather([state["slice_start"], held.size]).astype(int)):
            values = held.copy() if root == self.comm.rank else np.empty(size, held.dtype)
            self.comm.broadcast(values, root)
            first, last = max(start, self._mine.start), min(start + size, self._mine.stop)
            if first < last:
                self._v[first - self._mine.start : last - self._mine.start] = values[first - start : last - start]
