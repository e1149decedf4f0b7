"""The registry of the methods."""

from __future__ import annotations

from collections.abc import Mapping

from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.settings import values_of_texts
from mpitrain.algorithms.byzantine.robust import RobustSGD
from mpitrain.algorithms.byzantine.safeguard import SafeguardSGD
from mpitrain.algorithms.elastic.admm import ADMM
from mpitrain.algorithms.elastic.aeasgd import AEASGD
from mpitrain.algorithms.elastic.eamsgd import EAMSGD
from mpitrain.algorithms.elastic.easgd import EASGD
from mpitrain.algorithms.elastic.easgd_tree import EASGDTree
from mpitrain.algorithms.flat_minima.parle import EntropySGD, Parle
from mpitrain.algorithms.gossip.adpsgd import ADPSGD
from mpitrain.algorithms.gossip.dpsgd import DPSGD
from mpitrain.algorithms.gossip.gosgd import GoSGD
from mpitrain.algorithms.gossip.gossip import GossipSGD
from mpitrain.algorithms.gossip.sgp import StochasticGradientPush
from mpitrain.algorithms.leader.lsgd import LSGD
from mpitrain.algorithms.parameter_server.adag import ADAG
from mpitrain.algorithms.parameter_server.adownpour import ADownpour, MVADownpour
from mpitrain.algorithms.parameter_server.agn import AGN
from mpitrain.algorithms.parameter_server.downpour import Downpour
from mpitrain.algorithms.parameter_server.dynsgd import DynSGD
from mpitrain.algorithms.parameter_server.gpu_asgd import GPUASGD
from mpitrain.algorithms.parameter_server.mdownpour import MDownpour
from mpitrain.algorithms.parameter_server.zealous import ZealousDownpour
from mpitrain.algorithms.population.neuroevolution import NeuroevolutionSGD
from mpitrain.algorithms.synchronous.allreduce import AllReduceSGD
from mpitrain.algorithms.synchronous.dasgd import DaSGD
from mpitrain.algorithms.synchronous.diloco import DiLoCo
from mpitrain.algorithms.synchronous.localsgd import LocalSGD, PostLocalSGD
from mpitrain.algorithms.synchronous.slowmo import SlowMo
from mpitrain.errors import UsageError, unknown

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (
        AllReduceSGD, EASGD, EAMSGD, AEASGD, EASGDTree, ADMM, GossipSGD, GoSGD, StochasticGradientPush, DPSGD, ADPSGD,
        Downpour, MDownpour, ADownpour, MVADownpour, ZealousDownpour, AGN, ADAG, DynSGD, GPUASGD,
        LocalSGD, PostLocalSGD, SlowMo, DiLoCo, DaSGD, EntropySGD, Parle,
        LSGD, RobustSGD, SafeguardSGD, NeuroevolutionSGD,
    )
}  # fmt: skip
"""The methods by name: a new method is one more class here."""

__all__ = [
    "ADAG",
    "ADMM",
    "ADPSGD",
    "AEASGD",
    "AGN",
    "DPSGD",
    "EAMSGD",
    "EASGD",
    "EASGDTree",
    "GPUASGD",
    "METHODS",
    "ADownpour",
    "AllReduceSGD",
    "DaSGD",
    "DiLoCo",
    "Downpour",
    "DynSGD",
    "EntropySGD",
    "GoSGD",
    "GossipSGD",
    "LSGD",
    "LocalSGD",
    "MDownpour",
    "MVADownpour",
    "Method",
    "Parle",
    "PostLocalSGD",
    "SlowMo",
    "StochasticGradientPush",
    "ZealousDownpour",
    "create",
    "RobustSGD",
    "SafeguardSGD",
    "NeuroevolutionSGD",
]


def create(name: str, settings: Mapping[str, str] | None = None) -> Method:
    """Create a method from its name and its settings, both given as text on the command line.

    Args:
        name: The name of the method, for example ``easgd``.
        settings: The settings, for example ``{"period": "10"}``.

    Raises:
        UsageError: The name or a setting is unknown, or a value is invalid.
    """
    if name not in METHODS:
        raise UsageError(unknown("algorithm", name, METHODS, otherwise="see mpitrain algorithms"))
    return METHODS[name](**values_of_texts(METHODS[name], name, settings or {}))
