"""mpitrain: train PyTorch models over MPI with elastic averaging, gossip and all-reduce.

Importing this package starts nothing: its modules load MPI, torch and numba when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from mpitrain.errors import UsageError as UsageError
from mpitrain.version import __version__ as __version__

_HOME_OF = {
    "init": "mpitrain.collectives.world.launch",
    "World": "mpitrain.collectives.world.world",
    "DistributedOptimizer": "mpitrain.optimizer.distributed",
    "Average": "mpitrain.algorithms.base.iterate_average",
    "AllReduceSGD": "mpitrain.algorithms.synchronous.allreduce",
    "EASGD": "mpitrain.algorithms.elastic.easgd",
    "EAMSGD": "mpitrain.algorithms.elastic.eamsgd",
    "AEASGD": "mpitrain.algorithms.elastic.aeasgd",
    "EASGDTree": "mpitrain.algorithms.elastic.easgd_tree",
    "ADMM": "mpitrain.algorithms.elastic.admm",
    "Downpour": "mpitrain.algorithms.parameter_server.downpour",
    "MDownpour": "mpitrain.algorithms.parameter_server.mdownpour",
    "ADownpour": "mpitrain.algorithms.parameter_server.adownpour",
    "MVADownpour": "mpitrain.algorithms.parameter_server.adownpour",
    "ZealousDownpour": "mpitrain.algorithms.parameter_server.zealous",
    "AGN": "mpitrain.algorithms.parameter_server.agn",
    "ADAG": "mpitrain.algorithms.parameter_server.adag",
    "DynSGD": "mpitrain.algorithms.parameter_server.dynsgd",
    "GossipSGD": "mpitrain.algorithms.gossip.gossip",
    "GoSGD": "mpitrain.algorithms.gossip.gosgd",
    "StochasticGradientPush": "mpitrain.algorithms.gossip.sgp",
    "DPSGD": "mpitrain.algorithms.gossip.dpsgd",
    "ADPSGD": "mpitrain.algorithms.gossip.adpsgd",
    "GPUASGD": "mpitrain.algorithms.parameter_server.gpu_asgd",
    "LSGD": "mpitrain.algorithms.leader.lsgd",
    "LocalSGD": "mpitrain.algorithms.synchronous.localsgd",
    "PostLocalSGD": "mpitrain.algorithms.synchronous.localsgd",
    "SlowMo": "mpitrain.algorithms.synchronous.slowmo",
    "DiLoCo": "mpitrain.algorithms.synchronous.diloco",
    "DaSGD": "mpitrain.algorithms.synchronous.dasgd",
    "EntropySGD": "mpitrain.algorithms.flat_minima.parle",
    "Parle": "mpitrain.algorithms.flat_minima.parle",
    "NeuroevolutionSGD": "mpitrain.algorithms.population.neuroevolution",
    "RobustSGD": "mpitrain.algorithms.byzantine.robust",
    "SafeguardSGD": "mpitrain.algorithms.byzantine.safeguard",
    "RunLogger": "mpitrain.loggers.run_logger",
    "Timeline": "mpitrain.records.timeline",
    "reestimate_batchnorm": "mpitrain.models.batchnorm",
}

__all__ = sorted((*_HOME_OF, "UsageError", "__version__"))  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mpitrain' has no attribute {name!r}")
    module = importlib.import_module(_HOME_OF[name])
    value = getattr(module, "reestimate" if name == "reestimate_batchnorm" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
