"""Every reproduction runs the toolkit's methods: with a fault in a method the criterion that names it is missed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mpitrain import kernels
from mpitrain.algorithms.byzantine.safeguard import Window
from mpitrain.algorithms.elastic.center import SynchronousCenter
from mpitrain.algorithms.elastic.method import ElasticMethod
from mpitrain.algorithms.leader.worker import Following
from mpitrain.algorithms.parameter_server import dynsgd
from mpitrain.algorithms.parameter_server.adag import DampedDisplacement
from mpitrain.algorithms.parameter_server.downpour import DownpourWorker
from mpitrain.algorithms.synchronous.allreduce import AllReduceWorker

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
