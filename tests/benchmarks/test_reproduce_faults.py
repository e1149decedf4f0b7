"""Every reproduction runs the toolkit's methods: with a fault in a method the criterion that names it is missed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from benchmarks.reproduce.training import Cluster
from mpitrain import kernels
from mpitrain.algorithms import EASGD, AllReduceSGD, NeuroevolutionSGD
from mpitrain.algorithms.byzantine.safeguard import Window
from mpitrain.algorithms.elastic import easgd_tree
from mpitrain.algorithms.elastic.center import SynchronousCenter
from mpitrain.algorithms.elastic.easgd_tree import EASGDTree
from mpitrain.algorithms.elastic.method import ElasticMethod, ElasticWorker
from mpitrain.algorithms.flat_minima.parle import ParleWorker
from mpitrain.algorithms.gossip.sgp import StochasticGradientPush
from mpitrain.algorithms.leader.worker import Following
from mpitrain.algorithms.parameter_server import agn, dynsgd
from mpitrain.algorithms.parameter_server.adag import DampedDisplacement
from mpitrain.algorithms.parameter_server.downpour import DownpourWorker
from mpitrain.algorithms.parameter_server.gpu_asgd import GPUASGDWorker
from mpitrain.algorithms.population import neuroevolution
from mpitrain.algorithms.synchronous.allreduce import AllReduceWorker
from mpitrain.collectives.topology.graphs import complete

Patch = pytest.MonkeyPatch


def frozen(kernel: Callable[..., int]) -> Callable[..., int]:
    """Return a kernel that leaves its last array, the center, as it is."""

    def without_center(*args: Any, **scalars: Any) -> int:
        center = [value for value in args if isinstance(value, np.ndarray)][-1]
        before = center.copy()
        n_nonfinite = kernel(*args, **scalars)
        center[...] = before
        return n_nonfinite

    return without_center


def freeze_admm(patch: Patch) -> None:
    patch.setattr(kernels, "admm_turn", frozen(kernels.admm_turn))


def freeze_easgd(patch: Patch) -> None:
    patch.setattr(kernels, "elastic_exchange", frozen(kernels.elastic_exchange))


def sum_gradients(patch: Patch) -> None:
    patch.setattr(AllReduceWorker, "combine_gradients", lambda self: self.comm.allreduce(self.g))


def slow_center(patch: Patch) -> None:
    exchange = SynchronousCenter.exchange
    patch.setattr(SynchronousCenter, "exchange", lambda self, x, a_w, a_c: exchange(self, x, a_w, a_c / 2))


def lose_half_of_each_push(patch: Patch) -> None:
    commit = kernels.commit_and_pull
    patch.setattr(kernels, "commit_and_pull", lambda x, origin, c, a: commit(x, origin, c, a / 2))


def commit_twice(patch: Patch) -> None:
    commit = DownpourWorker.commit
    patch.setattr(DownpourWorker, "commit", lambda self: (commit(self), commit(self)))


def undamped(patch: Patch) -> None:
    damped = DampedDisplacement.__init__

    def init(self: Any, x: Any, method: Any) -> None:
        damped(self, x, method)
        self._inverse_gamma = 0.0

    patch.setattr(DampedDisplacement, "__init__", init)


def ignore_staleness(patch: Patch) -> None:
    patch.setattr(dynsgd, "inverse_staleness", lambda shared, steps: 1.0)


def last_leads(patch: Patch) -> None:
    def choose(self: Following, losses: np.ndarray) -> None:
        self.leader = int(self.members[np.argmax(losses[self.members])])

    patch.setattr(Following, "choose", choose)


def rest_of_center(patch: Patch) -> None:
    rates = ElasticMethod.rates
    patch.setattr(ElasticMethod, "rates", lambda self, size, eta: (rates(self, size, eta)[0], 0.0))


def every_step(patch: Patch) -> None:
    """Let elastic methods exchange at every step."""
    patch.setattr(ElasticWorker, "before_update", lambda self: self.exchange())


def one_level(patch: Patch) -> None:
    levels = easgd_tree.levels
    patch.setattr(easgd_tree, "levels", lambda size, degree, nodes: levels(size, size, nodes))


def whole_displacements(patch: Patch) -> None:
    patch.setattr(agn, "inverse_steps", lambda shared, steps: 1.0)


def follow_nobody(patch: Patch) -> None:
    patch.setattr(Following, "choose", lambda self, losses: None)


def average_twice(patch: Patch) -> None:
    refer = ParleWorker._refer_to
    patch.setattr(ParleWorker, "_refer_to", lambda self, values: (refer(self, values), refer(self, values)))


def lose_commits(patch: Patch) -> None:
    """Let the center get the commits of client 0 only."""
    commit = GPUASGDWorker.commit
    patch.setattr(GPUASGDWorker, "commit", lambda self: commit(self) if self.comm.rank == 0 else None)


def prefer_the_unfit(patch: Patch) -> None:
    plan = neuroevolution.make_plan
    patch.setattr(neuroevolution, "make_plan", lambda fitness, *others: plan(-fitness, *others))


def push_to_all(patch: Patch) -> None:
    patch.setattr(StochasticGradientPush, "graph", lambda self, size: complete(size))


def reverse_momentum(patch: Patch) -> None:
    slow = kernels.slow_momentum
    patch.setattr(kernels, "slow_momentum", lambda x, t, u, d, beta, *others: slow(x, t, u, d, -beta, *others))


CASES = {
    "ADMM with a frozen center": (
        "admm_stability",
        ["--points", "4", "--sweeps", "6"],
        {},
        freeze_admm,
        "ADMM: the radius is that of the paper's matrix",
    ),
    "EASGD in turn with a frozen center": (
        "admm_stability",
        ["--points", "4", "--sweeps", "6"],
        {},
        freeze_easgd,
        "EASGD: the radius is that of the paper's matrix",
    ),
    "all-reduce that sums": (
        "input_spread",
        ["--samples", "500", "--steps", "5"],
        {},
        sum_gradients,
        "all sampled rates within 4 standard errors",
    ),
    "EASGD whose center moves by half": (
        "input_spread",
        ["--samples", "100", "--steps", "5"],
        {},
        slow_center,
        "a step of the workers has the radius of the thesis' matrix",
    ),
    "DOWNPOUR that loses half of each push": (
        "downpour_phase",
        ["--rounds", "40", "--most", "4", "--eh", "0.5"],
        {},
        lose_half_of_each_push,
        "DOWNPOUR: the runs agree with the bound",
    ),
    "DOWNPOUR that commits twice": (
        "staleness",
        ["--commits", "300"],
        {"WORKERS": (3,)},
        commit_twice,
        "in turn: the mean is n - 1",
    ),
    "ADAG without damping": (
        "adag_rescue",
        ["--rounds", "16", "--seeds", "1"],
        {"PERIODS": (3,)},
        undamped,
        "ADAG on AGN: the loss stays below",
    ),
    "DynSGD that ignores staleness": (
        "adag_rescue",
        ["--rounds", "16", "--seeds", "1"],
        {"PERIODS": (3,)},
        ignore_staleness,
        "DynSGD: the loss stays below",
    ),
    "LSGD led by the last": (
        "leader_escape",
        ["--steps", "20", "--seeds", "1", "--ranks", "1"],
        {"PULLS": (0.01,), "RATIOS": np.array([0.2, 0.4, 0.6]), "WELL_STEPS": 400},
        last_leads,
        "LGD's leader is at the bottom of its valley",
    ),
    "EASGD in random order with a center at rest": (
        "period_sweep",
        ["--steps", "192"],
        {"LEARNING_RATES": {"downpour": (0.1,), "easgd": (0.4,), "eamsgd": (0.02,)}},
        rest_of_center,
        "DOWNPOUR's final loss at period 64 is more than twice EASGD's",
    ),
    "all-reduce that sums, on a cluster": (
        "crossover",
        ["--quick"],
        {
            "QUICK_WORKERS": (8,),
            "QUICK_VARIED_WORKERS": (8,),
            "NETWORKS": {"base": Cluster()},
            "LEARNING_RATES": (1.4,),
            "LONGEST_STEPS": 100,
            "TARGET": 0.5,
            "DECAYED_STEPS": 20,
            "seeds_of": lambda n_workers: 1,
        },
        sum_gradients,
        "all-reduce needs at most as many gradients as EASGD",
    ),
    "EASGD that exchanges at every step": (
        "elastic_scaling",
        ["--quick"],
        {"WORKERS": (2, 4), "QUICK_STEPS": 10, "LEARNING_RATES": (0.01,)},
        every_step,
        "communication per gradient falls by a factor of 7 to 14",
    ),
    "a tree of one level": (
        "tree_contention",
        ["--quick"],
        {
            "QUICK_WORKERS": (4, 16),
            "STEPS": 60,
            "CASES": {
                "EASGD, one server": (EASGD, Cluster(n_shards=1, bandwidth=0.3e9)),
                "EASGD Tree": (lambda: EASGDTree(degree=4), Cluster(n_shards=1, bandwidth=0.3e9)),
            },
        },
        one_level,
        "tree: the share of computation falls by at most",
    ),
    "AGN that commits whole displacements": (
        "agn_aeasgd",
        ["--quick"],
        {"QUICK_WORKERS": (10,), "QUICK_PERIODS": (4, 10), "LEARNING_RATES": (0.3,), "N_GRADIENTS": 800},
        whole_displacements,
        "AGN is ahead",
    ),
    "LSGD that follows nobody": (
        "leaders",
        ["--quick"],
        {"QUICK_WORKERS": (4,), "LEARNING_RATES": (1.0,), "LEADING_STEPS": 160, "STEPS": 80},
        follow_nobody,
        "bytes of an exchange",
    ),
    "Parle that averages twice": (
        "flat_minima",
        ["--quick"],
        {"QUICK_STEPS": 250},
        average_twice,
        "bytes per gradient: Elastic-SGD sends 25 times",
    ),
    "GPU A-SGD that loses the commits of all but one": (
        "warm_start",
        ["--quick"],
        {"CLIENTS": (1, 2), "QUICK_STEPS": 60},
        lose_commits,
        "warm: the best speed-up",
    ),
    "a population led by its least fit": (
        "neuroevolution",
        ["--quick"],
        {
            "QUICK_GENERATIONS": 6,
            "PERIOD": 8,
            "POPULATION": 4,
            "METHODS": {
                "suppression": (NeuroevolutionSGD(period=8, similarity=0.5), 4),
                "no suppression": (NeuroevolutionSGD(period=8, similarity=1.0), 4),
                "independent": (NeuroevolutionSGD(period=10**6, similarity=1.0), 4),
                "single": (AllReduceSGD(), 1),
            },
        },
        prefer_the_unfit,
        'equal gradients: the error of the population is below that of "independent"',
    ),
    "SGP that pushes to all": (
        "gradient_push",
        ["--quick"],
        {"QUICK_WORKERS": (4, 16), "QUICK_STEPS": 10},
        push_to_all,
        "SGP: seconds per step",
    ),
    "SlowMo whose momentum has the wrong sign": (
        "local_updates",
        ["--quick"],
        {"QUICK_PERIODS": (1, 8), "QUICK_STEPS": 64, "LEARNING_RATES": (0.3,), "MOMENTUM_WORKERS": (2, 3)},
        reverse_momentum,
        "H = 8: SlowMo's loss is below Local SGD's",
    ),
}


def passed(script: ModuleType, words: list[str], start: str, folder: Any, capsys: pytest.CaptureFixture[str]) -> bool:
    """Return whether the criterion that starts with ``start`` is met."""
    script.main([*words, "--json", "--out", str(folder)])
    criteria = json.loads(capsys.readouterr().out.splitlines()[-1])["criteria"]
    (one,) = [one["passed"] for one in criteria if one["criterion"].startswith(start)]
    return bool(one)


@pytest.mark.parametrize("name", CASES)
def test_a_faulty_method_misses_the_criterion(
    name: str, monkeypatch: Patch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    module, words, changes, plant, criterion = CASES[name]
    script = importlib.import_module(f"benchmarks.reproduce.{module}")
    monkeypatch.setattr(script.Outcome, "save", lambda outcome, figure: None)
    for constant, value in changes.items():
        monkeypatch.setattr(script, constant, value)
    assert passed(script, words, criterion, tmp_path, capsys)
    with monkeypatch.context() as patch:
        plant(patch)
        assert not passed(script, words, criterion, tmp_path, capsys)


def test_attackers_that_stay_are_not_counted_as_caught(monkeypatch: Patch) -> None:
    byzantine = importlib.import_module("benchmarks.reproduce.byzantine")
    assert len(byzantine.run("double safeguard", "label-flip", 100, seed=1).caught) == byzantine.ATTACKERS
    monkeypatch.setattr(Window, "close", lambda self, distances, good: None)
    assert not byzantine.run("double safeguard", "label-flip", 100, seed=1).caught
