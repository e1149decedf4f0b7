"""A rank is killed and the launcher lets the others live (Open MPI's `--with-ft ulfm`)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.launching import ROOT, Finished, launch, python

from mpitrain.records.checkpoint import newest_parts
from mpitrain.records.metrics import read_metrics

pytestmark = pytest.mark.launches

IN_TIME_SECONDS = 400.0  # a hang would last for ever
ULFM = ["--with-ft", "ulfm"]
TRAIN = [
    *ULFM,
    "mpitrain",
    "train",
    "--quiet",
    "--model",
    "support.small_models:kills_a_rank",
    "--evaluate-every",
    "1000",
]


# Where the others need not wait for the dead rank: or their run may be over before they know of its death.
WAITS = ["--model", "support.small_models:kills_a_rank_and_waits"]


def document_in(output: str) -> dict[str, Any]:
    """Return the JSON document in the output, which this launcher ends with a NUL."""
    found: dict[str, Any] = json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
    return found


def train(n_ranks: int, victim: int, *arguments: str, **environment: str) -> Finished:
    """Run a training in which rank ``victim`` is killed in its 30th step."""
    extra = {"PYTHONPATH": str(ROOT / "tests"), "VICTIM": str(victim), **environment}
    done = launch(n_ranks, [*TRAIN, *arguments], timeout_seconds=IN_TIME_SECONDS, extra_env=extra)
    assert not done.timed_out, done.output
    return done


@pytest.mark.parametrize("n_nodes", [1, 2], ids=lambda n: f"nodes={n}")
def test_survivors_take_over_the_lock_of_a_dead_rank_and_keep_its_exchanges(n_nodes: int) -> None:
    script = str(ROOT / "tests" / "support" / "surviving.py")
    done = launch(
        4,
        [*ULFM, python("openmpi"), script, "1"],
        timeout_seconds=IN_TIME_SECONDS,
        extra_env={"MPITRAIN_EMULATED_NODES": str(n_nodes)},
    )
    assert done.returncode == 0, done.output
    assert done.output.count("mpitrain: rank 1 of 4 died") == 1
    found = document_in(done.output)
    assert (found["dead"], found["alive_ranks"]) == ([1], [0, 2, 3])
    assert found["finished"][1] == 20
    assert all(found["finished"][rank] >= 50 for rank in (0, 2, 3))
    assert found["wrong"] == 0
    assert found["unfinished"] > 0
    # A shard of another node is changed in a copy, which its home gets back as a whole or, after a death, in part.
    assert found["once_more"] == found["unfinished"] if n_nodes == 1 else found["once_more"] <= found["unfinished"]


@pytest.mark.parametrize(
    "method",
    [["easgd", "--set", "overlap=true"], ["gossip", "--set", "direction=push"]],
    ids=" ".join,
)
def test_a_run_goes_on_without_a_rank_that_died(method: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--gradients", "1000", "--checkpoint-every", "0", "--out", str(run)]
    done = train(3, 2, *WAITS, "--algorithm", *method, *options, REPORTED=str(tmp_path / "reported"))
    assert done.returncode == 0, done.output
    assert done.output.count("mpitrain: rank 2 of 3 died") == 1
    assert "Traceback" not in done.output
    result = json.loads((run / "result.json").read_text())
    assert (result["died"], result["ranks"], result["complete"]) == ([2], 3, True)
    assert result["steps_of_ranks"][2] == 29
    assert result["gradients"] >= 1000
    assert result["test_accuracy"] > 0.8


def test_a_checkpoint_of_the_survivors_is_resumed_by_all_ranks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = ["--algorithm", "easgd-tree", "--set", "degree=2"]  # rank 2 had an inner node to save
    done = train(4, 2, *tree, "--steps", "120", "--checkpoint-every", "60", "--out", str(run))
    assert done.returncode == 0, done.output
    assert "easgd-tree on 4 ranks (rank 2 died): test accuracy" in done.output
    assert json.loads((run / "result.json").read_text())["steps_of_ranks"] == [120, 120, 29, 120]
    done = launch(
        4,
        ["mpitrain", "train", "--resume", str(run), "--steps", "130"],
        timeout_seconds=IN_TIME_SECONDS,
        extra_env={"PYTHONPATH": str(ROOT / "tests"), "VICTIM": "-1"},
    )
    assert done.returncode == 0, done.output
    result = json.loads((run / "result.json").read_text())
    assert (result["died"], result["steps_of_ranks"]) == ([], [130, 130, 130, 130])  # the dead one went on as a twin
    assert result["test_accuracy"] > 0.8


@pytest.mark.parametrize("method", [["sgp"], ["easgd", "--replica-size", "3"]], ids=" ".join)
def test_a_run_of_ranks_that_wait_for_each_other_ends_with_the_reason(method: list[str]) -> None:
    done = train(3, 1, "--algorithm", *method, "--minutes", "100")
    assert done.returncode == 1, done.output
    assert "mpitrain: rank 1 of 3 died" in done.output
    assert (
        "rank 1 died, and the ranks that wait for it cannot continue: resume from the newest checkpoint" in done.output
    )
    assert "Traceback" not in done.output


def test_the_next_rank_takes_the_lead_of_a_run_whose_rank_0_died(tmp_path: Path) -> None:
    """It evaluates, saves, stores metrics and the result, and keeps the lock of the folder and earlier evaluations."""
    run = tmp_path / "run"
    options = ["--gradients", "1000", "--checkpoint-every", "50", "--evaluate-every", "10"]
    done = train(3, 0, *WAITS, *options, "--out", str(run), "--json", REPORTED=str(tmp_path / "reported"))
    assert done.returncode == 0, done.output
    assert done.output.count("rank 0 of 3 died") == 1
    assert "Traceback" not in done.output
    result = json.loads((run / "result.json").read_text())
    assert (result["died"], result["complete"], result["steps_of_ranks"][0]) == ([0], True, 29)
    assert result == document_in(done.output)
    assert result["gradients"] >= 1000
    assert result["test_accuracy"] > 0.8
    seconds = [point["seconds"] for point in result["evaluation"]]
    assert seconds == sorted(seconds)
    assert result["evaluation"][0]["step"] == 0
    assert any(point["gradients"] > 500 for point in result["evaluation"])
    assert len(list(run.glob("checkpoints/step-*"))) == 2
    assert not (run / "lock").exists()
    assert read_metrics(run / "metrics.h5")["evaluation"]["gradients"][-1] == result["gradients"]


NODES = {"MPITRAIN_EMULATED_NODES": "2"}  # of 4 ranks: 0 and 1, 2 and 3
LOSSES = {
    "the other node, rank by rank": ("easgd-tree", "degree=2", "kill:rank=3,step=30", "kill:rank=2,step=90"),
    "the node of rank 0, which has the center": ("downpour", "period=5", "kill:rank=0,step=30", "kill:rank=1,step=90"),
}


@pytest.fixture(scope="module", params=LOSSES.values(), ids=LOSSES)
def without_a_node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    """A run on two nodes that loses first one rank of a node, and then the other one."""
    method, setting, *kills = request.param
    run = tmp_path_factory.mktemp("nodes") / "run"
    faults = [word for kill in kills for word in ("--inject", kill)]
    arguments = ["--algorithm", method, "--set", setting, *faults, "--gradients", "1500"]
    arguments += ["--checkpoint-every", "200", "--out", str(run)]
    return train(4, -1, *arguments, **NODES), run


def test_a_run_goes_on_without_ranks_of_other_nodes_and_without_nodes(without_a_node: tuple[Finished, Path]) -> None:
    """The rank that dies first serves the memory of its node; the next one of the node takes it over, and dies too."""
    done, run = without_a_node
    assert done.returncode == 0, done.output
    assert "Traceback" not in done.output
    result = json.loads((run / "result.json").read_text())
    assert result["died"] in ([0, 1], [2, 3])
    assert (result["ranks"], result["complete"]) == (4, True)
    assert result["test_accuracy"] > 0.8
    for rank in result["died"]:
        assert re.search(rf"ranks? [\d, ]*\b{rank}\b[\d, ]* of 4 died", done.output), done.output


def test_its_checkpoints_are_complete(without_a_node: tuple[Finished, Path]) -> None:
    _, run = without_a_node
    states = newest_parts(run / "checkpoints")
    died = json.loads((run / "result.json").read_text())["died"]
    assert len(states) == 4
    assert not {part["optimizer"]["rank"] for part in states} & set(died)  # theirs are copies of living ranks' parts
    for part in states:
        assert np.isfinite(np.asarray(part["optimizer"]["parameters"])).all()


@pytest.mark.parametrize(
    ("method", "environment"),
    [(["allreduce"], {}), (["easgd", "--replica-size", "2"], {}), (["easgd"], {"MPITRAIN_BETWEEN_NODES": "windows"})],
    ids=["synchronous", "replica groups", "windows"],
)
def test_where_a_death_leaves_nobody_who_can_continue_all_ranks_end(
    method: list[str], environment: dict[str, str]
) -> None:
    done = train(4, 2, "--algorithm", *method, "--minutes", "100", **NODES, **environment)
    assert done.returncode == 1, done.output
    assert "rank 2 of 4 died, with memory that the others need: resume from the newest checkpoint" in done.output


def test_a_rank_that_has_ended_hears_of_a_death_among_the_others() -> None:
    script = """
import os, signal, time
import mpitrain
world = mpitrain.init()
world.barrier()
if world.rank == 2:
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
if world.rank == 1:
    while not world.dead:
        time.sleep(0.1)
    print("rank 1 has gone on")
"""
    done = launch(
        3,
        [*ULFM, python("openmpi"), "-c", script],
        timeout_seconds=IN_TIME_SECONDS,
        extra_env={"MPITRAIN_EMULATED_NODES": "2"},
    )
    assert not done.timed_out, done.output
    assert done.returncode == 0, done.output
    assert "rank 2 of 3 died" in done.output
    assert "rank 1 has gone on" in done.output
    assert "Traceback" not in done.output


def test_without_deaths_fault_tolerance_changes_nothing(tmp_path: Path) -> None:
    arguments = ["--steps", "40", "--json", "--seed", "3"]
    with_it = train(2, -1, "--algorithm", "allreduce", *arguments)
    assert with_it.returncode == 0, with_it.output
    result = document_in(with_it.output)
    assert (result["died"], result["steps_of_ranks"]) == ([], [40, 40])
    assert result["world"]["a rank that dies"].startswith("is left behind")
    without = launch(
        2,
        [*TRAIN[2:], "--algorithm", "allreduce", *arguments],
        timeout_seconds=IN_TIME_SECONDS,
        extra_env={"PYTHONPATH": str(ROOT / "tests"), "VICTIM": "-1"},
    )
    same = document_in(without.output)
    assert same["world"]["a rank that dies"] == "ends all ranks"
    assert (same["test_loss"], same["train_loss"]) == (result["test_loss"], result["train_loss"])


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    """A synchronous run on two nodes whose rank 0 dies, after a checkpoint of 3 ranks and before one of 2.

    Ranks 0 and 1 share a node, so that each node has one survivor.
    """
    run = tmp_path_factory.mktemp("continued") / "run"
    options = ["--steps", "60", "--checkpoint-every", "20", "--on-failure", "continue", "--out", str(run)]
    return train(3, 0, "--algorithm", "allreduce", *options, **NODES), run


def test_a_synchronous_run_continues_without_its_lead(continued: tuple[Finished, Path]) -> None:
    done, run = continued
    assert done.returncode == 0, done.output
    assert done.output.count("rank 0 of 3 died") == 1
    assert "mpitrain (rank 1): 2 of 3 workers continue with step 30, after a pause of " in done.output
    assert "Traceback" not in done.output
    result = json.loads((run / "result.json").read_text())
    assert (result["died"], result["complete"]) == ([0], True)
    assert result["steps_of_ranks"] == [29, 60, 60]
    assert result["test_accuracy"] > 0.8


def test_its_checkpoints_are_of_as_many_ranks_as_live_and_continue_on_others(continued: tuple[Finished, Path]) -> None:
    _, run = continued
    parts = {path.name: len(list(path.glob("rank-*.h5"))) for path in run.glob("checkpoints/step-*")}
    assert parts == {"step-00000040": 2, "step-00000060": 2}
    states = newest_parts(run / "checkpoints")
    assert [part["optimizer"]["rank"] for part in states] == [0, 1]
    same = [part["optimizer"]["parameters"] for part in states]
    assert (same[0] == same[1]).all()  # to the last bit
    done = launch(
        1,
        ["mpitrain", "train", "--resume", str(run), "--steps", "65"],
        timeout_seconds=IN_TIME_SECONDS,
        extra_env={"PYTHONPATH": str(ROOT / "tests"), "VICTIM": "-1"},
    )
    assert done.returncode == 0, done.output
    result = json.loads((run / "result.json").read_text())
    assert (result["died"], result["ranks"], result["complete"]) == ([], 1, True)
