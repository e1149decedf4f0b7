"""mpitrain: train PyTorch models over MPI with elastic averaging, gossip and all-reduce.

Importing this package starts nothing: MPI, torch and numba are loaded by what is used, when it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

from mpitrain.errors import UsageError as UsageError
from mpitrain.version import __version__ as __version__

_HOME_OF = {
    "init": "mpitrain.collectives.world",
    "World": "mpitrain.collectives.world",
    "DistributedOptimizer": "mpitrain.optimizer",
    "Average": "mpitrain.algorithms.averaging",
    "AllReduceSGD": "mpitrain.algorithms.allreduce",
    "EASGD": "mpitrain.algorithms.easgd",
    "EAMSGD": "mpitrain.algorithms.eamsgd",
    "AEASGD": "mpitrain.algorithms.aeasgd",
    "EASGDTree": "mpitrain.algorithms.easgd_tree",
    "ADMM": "mpitrain.algorithms.admm",
    "Downpour": "mpitrain.algorithms.downpour",
    "MDownpour": "mpitrain.algorithms.mdownpour",
    "ADownpour": "mpitrain.algorithms.adownpour",
    "MVADownpour": "mpitrain.algorithms.adownpour",
    "ZealousDownpour": "mpitrain.algorithms.zealous",
    "AGN": "mpitrain.algorithms.agn",
    "ADAG": "mpitrain.algorithms.adag",
    "DynSGD": "mpitrain.algorithms.dynsgd",
    "GossipSGD": "mpitrain.algorithms.gossip",
    "GoSGD": "mpitrain.algorithms.gosgd",
    "StochasticGradientPush": "mpitrain.algorithms.sgp",
    "DPSGD": "mpitrain.algorithms.dpsgd",
    "ADPSGD": "mpitrain.algorithms.adpsgd",
    "GPUASGD": "mpitrain.algorithms.gpu_asgd",
    "LSGD": "mpitrain.algorithms.lsgd",
    "LocalSGD": "mpitrain.algorithms.localsgd",
    "PostLocalSGD": "mpitrain.algorithms.localsgd",
    "SlowMo": "mpitrain.algorithms.slowmo",
    "DiLoCo": "mpitrain.algorithms.diloco",
    "DaSGD": "mpitrain.algorithms.dasgd",
    "EntropySGD": "mpitrain.algorithms.parle",
    "Parle": "mpitrain.algorithms.parle",
    "NeuroevolutionSGD": "mpitrain.algorithms.neuroevolution",
    "RobustSGD": "mpitrain.algorithms.robust",
    "SafeguardSGD": "mpitrain.algorithms.safeguard",
    "reestimate_batchnorm": "mpitrain.models.batchnorm",
}

__all__ = sorted((*_HOME_OF, "UsageError", "__version__"))  # noqa: PLE0605


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
