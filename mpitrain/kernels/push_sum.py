"""Push-sum: averaging over directed graphs, where weights travel with the vectors and correct for uneven shares.

Kempe, Dobra, Gehrke 2003, Gossip-based computation of aggregate information; Assran, Loizou, Ballas, Rabbat 2019,
Stochastic Gradient Push, https://arxiv.org/abs/1811.10792, Algorithm 1. The caller keeps the scalar weight w. A message
is taken in by ``mixing.weighted_average``, on the estimates z = x/w, and the numerator x = w*z is made by
``mixing.scale``.
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
    doc="The estimate z at which the gradient is taken: the numerator x over the push weight w; z may be x itself.",
)

KERNELS: Final = (debias,)
