"""Ranks of synchronous methods are killed and the others continue (`--with-ft ulfm`), on one node and on two."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from support.continuing import ETA, METHODS, MOMENTUM, B, H, N
from support.launching import ROOT, Finished, launch, python

pytestmark = pytest.mark.launches

P, N_STEPS = 4, 15


@dataclass(frozen=True)
class Deaths:
    """The ranks that are killed, each in a step, and the number of nodes.

    Attributes:
        killed: (rank, step) of each, in the order of the steps.
        n_nodes: Of the four ranks; the first half of them is on the first of two nodes.
    """

    killed: tuple[tuple[int, int], ...]
    n_nodes: int

    @property
    def dead(self) -> list[int]:
        return sorted(rank for rank, _ in self.killed)

    @property
    def survivors(self) -> list[int]:
        return self.living("dpsgd", N_STEPS)

    def living(self, name: str, step: int) -> list[int]:
        """Return the ranks that make a step of a method. All-reduce makes the step in which a rank is killed."""
        return [i for i in range(P) if all(i != rank or step < at + (name == "allreduce") for rank, at in self.killed)]


DEATHS = {
    "one of a node": Deaths(((1, 6),), 1),
    "one of another node, then the rest of it": Deaths(((3, 6), (2, 10)), 2),
    "the node of rank 0": Deaths(((0, 6), (1, 7)), 2),
}


def mixing(name: str, k: int, step: int) -> np.ndarray:
    """Return the weights (k, k) with which k workers average in a step: in a ring, or along a one-peer graph."""
    if name == "dpsgd":
        near = {0, 1, k - 1}
        return np.array([[((i - j) % k in near) / len(near & set(range(k))) for j in range(k)] for i in range(k)])
    hops = [2**n for n in range(k) if 2**n < k]
    hop = hops[step % len(hops)]
    return np.array([[0.5 if j in (i, (i - hop) % k) else 0.0 for j in range(k)] for i in range(k)])


def expected(name: str, deaths: Deaths) -> np.ndarray:
    """Return the parameters of each rank after the run, (P, N), by the definition of the method."""
    x, v, x0, u = np.zeros((P, N)), np.zeros((P, N)), np.zeros(N), np.zeros(N)
    for t in range(N_STEPS):
        living = deaths.living(name, t)
        g = np.array([[H[i] * (a - B[i]) for a in x[i]] for i in range(P)])
        if name == "allreduce":
            g[living] = g[living].mean(axis=0)
        if name == "dpsgd":
            x[living] = mixing(name, len(living), t) @ x[living]
        v[living] = MOMENTUM * v[living] + g[living]  # no survivor's momentum is lost
        x[living] -= ETA * v[living]
        if name == "sgp":
            x[living] = mixing(name, len(living), t) @ x[living]
        if name in ("localsgd", "slowmo") and (t + 1) % 4 == 0:
            mean = x[living].mean(axis=0)
            if name == "slowmo":  # beta = 0.5, alpha = 1
                u = 0.5 * u + (x0 - mean) / ETA
                x0 = mean = x0 - ETA * u
            x[living] = mean
    return x


@dataclass(frozen=True)
class Run:
    """A run: its deaths, its output and end, and the document of each rank."""

    deaths: Deaths
    done: Finished
    found: dict[int, dict[str, Any]]


@pytest.fixture(scope="module", params=DEATHS.values(), ids=DEATHS)
def run(request: pytest.FixtureRequest) -> Run:
    deaths: Deaths = request.param
    script = str(ROOT / "tests" / "support" / "continuing.py")
    killed = ",".join(f"{rank}:{step}" for rank, step in deaths.killed)
    command = ["--with-ft", "ulfm", python("openmpi"), script, killed, str(N_STEPS)]
    environment = {"PYTHONPATH": str(ROOT / "tests"), "MPITRAIN_EMULATED_NODES": str(deaths.n_nodes)}
    done = launch(P, command, timeout_seconds=240.0, extra_env=environment)
    lines = re.findall(r'\{"rank".*\}', done.output)
    return Run(deaths, done, {document["rank"]: document for document in map(json.loads, lines)})


def test_the_survivors_end_with_exit_code_0_and_know_who_died(run: Run) -> None:
    assert (run.done.timed_out, run.done.returncode) == (False, 0), run.done.output
    assert sorted(run.found) == run.deaths.survivors, run.done.output
    assert all(document["dead"] == run.deaths.dead for document in run.found.values())


def test_the_lead_says_with_which_step_they_continue_after_which_pause(run: Run) -> None:
    continued = r"(\d) of (\d) workers continue with step (\d+), after a pause of ([\d.]+) s"
    pauses = re.findall(continued, run.done.output)
    if len(run.deaths.killed) == 1:
        assert all((left, before) == ("3", "4") for left, before, *_ in pauses)
        steps, (_, at) = sorted(int(step) for *_, step, _ in pauses), run.deaths.killed[0]
        # All-reduce has made that step and dies in the next one; local SGD and SlowMo notice at the end of their round.
        assert steps == [at + 1, at + 1, at + 2, at + 2, at + 2]
    assert all(float(seconds) > 0 for *_, seconds in pauses)
    assert len(pauses) >= len(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_the_survivors_follow_the_trajectory_of_fewer_workers(run: Run, name: str) -> None:
    x = expected(name, run.deaths)
    for rank in run.deaths.survivors:
        found = run.found[rank]["methods"][name]
        np.testing.assert_allclose(found["x"], x[rank], rtol=1e-12, err_msg=f"rank {rank}")
        assert found["members"] == run.deaths.survivors


@pytest.mark.parametrize("name", METHODS)
def test_the_consensus_is_that_of_the_survivors(run: Run, name: str) -> None:
    living = run.deaths.survivors
    all_of_them = [run.found[rank]["methods"][name]["consensus"] for rank in living]
    np.testing.assert_allclose(all_of_them, np.tile(all_of_them[0], (len(living), 1)), rtol=1e-12)
    if name in ("dpsgd", "sgp"):
        np.testing.assert_allclose(all_of_them[0], expected(name, run.deaths)[living].mean(axis=0), rtol=1e-12)


def test_a_state_is_one_of_as_many_ranks_as_live(run: Run) -> None:
    n = len(run.deaths.survivors)
    saved = [run.found[rank]["methods"]["allreduce"]["saved"] for rank in run.deaths.survivors]
    assert saved == [[k, n] for k in range(n)]
