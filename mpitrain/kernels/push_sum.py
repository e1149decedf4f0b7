"""Push-sum: averaging over directed graphs, where weights travel with the vectors and correct for uneven shares.

Kempe, Dobra, Gehrke 2003, Gossip-based computation of aggregate information; Assran, Loizou, Ballas, Rabbat 2019,
Stochastic Gradient Push, https://arxiv.org/abs/1811.10792, Algorithm 1. The caller keeps the scalar weight w.
"""

from __future__ import annotations

from typing import Final

from .declare import Kernel

_SGP: Final = "Assran et al. 2019, arXiv 1811.10792, Algorithm 1"

push_sum_mix: Final = Kernel(
    "push_sum_mix",
    """
    d = r
    x = keep * x + d
    """,
    arrays="x r",
    scalars="keep",
    guard="d",
    source=f"{_SGP}, line 6",
    doc="x keeps its own share and takes in what was received; a rejected element loses the sender's mass, not ours.",
)

debias: Final = Kernel(
    "debias",
    "z = x / w",
    arrays="z x",
    scalars="w",
    source=f"{_SGP}, line 8",
    doc="The estimate z at which the gradient is taken: the numerator x over the push weight w.",
)

KERNELS: Final = (push_sum_mix, debias)
