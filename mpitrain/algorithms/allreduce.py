"""All-reduce SGD: the synchronous baseline that every other method is measured against.

    gbar = (1/p) sum_i g_i(x);   x <- x - eta*gbar

With a mini-batch of b on each of p workers this is SGD with a mini-batch of p*b. Every worker takes the same step from
the same point, so that all parameters stay equal to the last bit.

Source: Goyal et al., Accurate, Large Minibatch SGD, 2017, https://arxiv.org/abs/1706.02677; the baseline of Jin et
al., How to scale distributed deep learning?, 2016, https://arxiv.org/abs/1611.04581.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mpitrain.algorithms.method import Method, Replica, Worker


@dataclass(frozen=True)
class AllReduceSGD(Method):
    """Every step uses the mean of all workers' gradients. It has no hyper-parameters of its own.

    Gradient clipping done before ``step`` clips each worker's own
    gradient, before the mean.
    """

    name: ClassVar[str] = "allreduce"
    summary: ClassVar[str] = "synchronous SGD on the mean of all gradients"
    source: ClassVar[str] = "Goyal et al. 2017, arXiv 1706.02677"
    communication: ClassVar[str] = "2(p-1)/p"

    def worker(self, replica: Replica) -> AllReduceWorker:
        """Collective."""
        return AllReduceWorker(replica)


class AllReduceWorker(Worker):
    """No state but the parameters."""

    def before_update(self) -> None:
        """gbar = (1/p) sum_i g_i"""
        self.comm.allreduce(self.g, mean=True)

    def consensus(self, out: Any) -> None:
        """Any worker's parameters: they are equal. Local."""
        out[...] = self.x.local
