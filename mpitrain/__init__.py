"""mpitrain: train PyTorch models over MPI with elastic averaging, gossip and all-reduce.

Importing this package starts nothing: MPI, torch and numba are loaded by what is used, when it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

from mpitrain.errors import UsageError
from mpitrain.version import __version__

_HOME_OF = {
    "init": "mpitrain.collectives.world",
    "World": "mpitrain.collectives.world",
    "DistributedOptimizer": "mpitrain.optimizer",
    "AllReduceSGD": "mpitrain.algorithms.allreduce",
    "EASGD": "mpitrain.algorithms.easgd",
    "EAMSGD": "mpitrain.algorithms.eamsgd",
    "GossipSGD": "mpitrain.algorithms.gossip",
    "reestimate_batchnorm": "mpitrain.models.batchnorm",
}

__all__ = [
    "EAMSGD",
    "EASGD",
    "AllReduceSGD",
    "DistributedOptimizer",
    "GossipSGD",
    "UsageError",
    "World",
    "__version__",
    "init",
    "reestimate_batchnorm",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mpitrain' has no attribute {name!r}")
    module = importlib.import_module(_HOME_OF[name])
    value = getattr(module, "reestimate" if name == "reestimate_batchnorm" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
