"""Push-sum: averaging over directed graphs. Weights travel with the vectors and correct for uneven shares.

Kempe, Dobra, Gehrke 2003, Gossip-based computation of aggregate information; Assran, Loizou, Ballas, Rabbat 2019,
Stochastic Gradient Push, https://arxiv.org/abs/1811.10792, Algorithm 1. The caller keeps the scalar push weight w.
``mixing.weighted_average`` averages a received estimate into the estimate z = x/w, and ``mixing.scale`` computes the
numerator x = w*z.
"""

from __future__ import annotations

from typing import Final

from mpitrain.kernels.compile.declare import Kernel

debias: Final = Kernel(
    "debias",
    "z = x / w",
    arrays="z x",
    scalars="w",
    source="Assran et al. 2019, arXiv 1811.10792, Algorithm 1, line 8",
    doc="Divide the numerator x by the push weight w: the estimate z at which the gradient is taken. z may be x.",
)

KERNELS: Final = (debias,)
