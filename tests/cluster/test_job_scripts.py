"""Every other script of jobs/ to its end, on a real SLURM or, for other batch systems, with their variables set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.cluster import Cluster
from support.cluster_jobs import JOBS, Submitted, checkpoints, wait_until
from support.launching import ROOT

pytestmark = pytest.mark.cluster

DIGITS = "--algorithm allreduce --data digits --model mlp:hidden=16 --batch-size 32 --steps 20".split()
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


class Jobs:
    """Jobs that wait for SLURM at the same time: a job of each script whose tests do not act on it."""

    def __init__(self, cluster: Cluster) -> None:
        self.out = {name: cluster.folder / name for name in ("scaling", "sweep", "compare")}
        settings = cluster.folder / "settings.txt"
        settings.write_text("# too small a step\n--lr 0.000001\n\n--lr 0.1\n")
        out = {name: {"OUT": str(folder)} for name, folder in self.out.items()}
        one_node = ("--array=1-2%1", "--nodes=1", "--ntasks-per-node=1")
        compared = "--algorithms allreduce,easgd --data digits --model mlp:hidden=16 --gradients 60 --evaluations 1"
        self.scaling = Submitted(
            cluster, "scaling.sbatch", "--array=1,2", *TWO_NODES, arguments=DIGITS, **out["scaling"]
        )
        self.sweep = Submitted(
            cluster,
            "sweep.sbatch",
            *one_node,
            arguments=[str(settings), *DIGITS],
            MPI_TYPE="pmix",
            **out["sweep"],
        )
        self.compare = Submitted(
            cluster,
            "compare.sbatch",
            *TWO_NODES,
            arguments=compared.split(),
            mpi="mpich",
            LAUNCHER="mpirun",
            **out["compare"],
        )


@pytest.fixture(scope="module")
def jobs(cluster: Cluster) -> Jobs:
    return Jobs(cluster)


def array_states(cluster: Cluster, number: int) -> dict[str, str]:
    """Return the state of each task of an array job."""
    lines = cluster.check(["scontrol", "show", "job", "-o", str(number)]).splitlines()
    facts = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines if line]
    return {one["ArrayTaskId"]: one["JobState"] for one in facts}


def wait_for_array(cluster: Cluster, number: int, tasks: set[str]) -> None:
    wait_until(
        lambda: array_states(cluster, number) == dict.fromkeys(tasks, "COMPLETED"),
        seconds=400,
        text=lambda: f"{array_states(cluster, number)}\n{outputs(cluster)}",
    )


def outputs(cluster: Cluster) -> str:
    """Return what all tasks of arrays have printed."""
    return "\n".join(path.read_text() for path in sorted(cluster.folder.glob("*-*-*.out")))


def test_a_users_script_is_interrupted_and_continues(cluster: Cluster, jobs: Jobs) -> None:
    run = cluster.folder / "own"
    arguments = [str(ROOT / "examples" / "restartable.py"), "--epochs", "60", "--save-every", "20"]
    job = Submitted(cluster, "script.sbatch", *TWO_NODES, arguments=arguments, RUN=str(run))
    wait_until(lambda: checkpoints(run), text=lambda: job.output)
    cluster.check(["scancel", "-b", "-s", "USR1", str(job.number)])
    ended = job.end()
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), job.output
    result = json.loads((run / "result.json").read_text())
    assert 0 < result["resumed_at"] < result["steps"]


def test_the_scaling_array_collects_one_table(cluster: Cluster, jobs: Jobs) -> None:
    out = jobs.out["scaling"]
    wait_for_array(cluster, jobs.scaling.number, {"1", "2"})
    table = (out / "scaling.md").read_text()
    assert [line.split("|")[2:4] for line in table.splitlines()[4:6]] == [
        ["     1 ", "     1 "],
        ["     2 ", "     2 "],
    ]
    assert (out / "scaling.png").exists()
    worlds = [json.loads((out / f"nodes-{n}" / "result.json").read_text())["world"] for n in (1, 2)]
    assert [(world["nodes"], world["ranks"]) for world in worlds] == [(1, 1), (2, 2)]


def test_the_sweep_prints_its_best_row(cluster: Cluster, jobs: Jobs) -> None:
    wait_for_array(cluster, jobs.sweep.number, {"1", "2"})
    lines = [line for line in outputs(cluster).splitlines() if line.startswith("best of")]
    assert any(line.startswith("best of 2 of 2 rows: row 2, test accuracy") for line in lines), lines
    assert all(line.endswith(": --lr 0.1") for line in lines if "of 2 of 2" in line)


def test_the_comparison_runs_under_mpich_by_mpirun(jobs: Jobs) -> None:
    assert jobs.compare.end().state == "COMPLETED", jobs.compare.output
    assert '"allreduce"' in jobs.compare.output


@pytest.mark.parametrize("script", ["train.pbs", "train.lsf"])
def test_other_batch_systems_run_the_same_loop(cluster: Cluster, script: str, tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("host1\nhost1\n")
    systems = {
        "train.pbs": {"PBS_JOBID": "7.server", "PBS_NODEFILE": str(nodes)},
        "train.lsf": {"LSB_JOBID": "7", "LSB_DJOB_NUMPROC": "2"},
    }
    env = cluster.environment(**systems[script], RUN="run", OPTIONS=" ".join(DIGITS), JOBS=str(JOBS))
    env |= {"OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    done = cluster.run(["bash", str(JOBS / script)], env=env, cwd=tmp_path, seconds=300)
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text())["ranks"] == 2
    again = cluster.run(["bash", str(JOBS / script)], env=env, cwd=tmp_path, seconds=300)
    assert (again.returncode, again.stdout.splitlines()[-1]) == (
        0,
        "run has finished already: see run/result.json",
    )
