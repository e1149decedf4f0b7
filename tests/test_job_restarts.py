"""The rules of jobs/lib.sh by which a job goes on or fails, under stand-ins for launcher, training and batch system."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from test_jobs import JOBS, program, run

REQUEUED = "requeued"


@pytest.fixture(autouse=True)
def stand_ins(tmp_path: Path) -> None:
    """srun runs its command once; mpitrain saves the checkpoint $SAVES and ends with $STATUS."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder / "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    program(folder / "mpirun", 'while [[ $1 == -* ]]; do shift 2; done; exec "$@"')
    program(folder / "python", "exit 0")
    program(folder / "mpitrain", '[ -z "${SAVES-}" ] || mkdir -p "runs/r/checkpoints/$SAVES"; exit "${STATUS:-0}"')
    for name in ("scontrol", "qsub"):
        program(folder / name, f'[ "$1" = show ] && exit 1; echo "$@" > {REQUEUED}')


def train(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run train.sbatch in the run folder runs/r."""
    variables = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "RUN": "runs/r", **variables}
    return run(["bash", str(JOBS / "train.sbatch")], tmp_path, **variables)


def is_requeued(tmp_path: Path) -> bool:
    return (tmp_path / REQUEUED).exists()


@pytest.mark.parametrize("status", ["3", "4", "14", "137", "143", "0"])
def test_what_is_no_error_of_the_user_goes_on_after_a_new_checkpoint(tmp_path: Path, status: str) -> None:
    done = train(tmp_path, STATUS=status, SAVES="step-00000010")
    assert (done.returncode, is_requeued(tmp_path)) == (0, True), done.stderr


@pytest.mark.parametrize("status", ["1", "2"])
def test_an_error_of_the_user_fails_even_with_a_new_checkpoint(tmp_path: Path, status: str) -> None:
    done = train(tmp_path, STATUS=status, SAVES="step-00000010")
    assert (done.returncode, is_requeued(tmp_path)) == (int(status), False)


@pytest.mark.parametrize("status", ["3", "14"])
@pytest.mark.parametrize(("restarts", "goes_on"), [("4", True), ("5", False)])
def test_restarts_are_bounded_for_every_exit_code(tmp_path: Path, status: str, restarts: str, goes_on: bool) -> None:
    done = train(tmp_path, STATUS=status, SAVES="step-00000010", RESTARTS="5", SLURM_RESTART_COUNT=restarts)
    assert is_requeued(tmp_path) == goes_on
    assert (done.returncode == 0) == goes_on
    assert ("after 5 restarts" in done.stderr) == (not goes_on)


def test_a_job_that_stops_and_stops_without_progress_ends(tmp_path: Path) -> None:
    outcomes = []
    for restart in range(5):
        done = train(tmp_path, STATUS="3", SLURM_RESTART_COUNT=str(restart))
        outcomes.append(done.returncode)
        if done.returncode:
            break
    assert outcomes == [0, 0, 3]
    assert "3 times in a row without a new checkpoint" in done.stderr


def test_progress_forgives_the_starts_without_it(tmp_path: Path) -> None:
    for restart, saves in enumerate(["", "", "step-00000010", "", "step-00000020", "", ""]):
        done = train(tmp_path, STATUS="3", SLURM_RESTART_COUNT=str(restart), **({"SAVES": saves} if saves else {}))
        assert done.returncode == 0, (restart, done.stderr)
    assert train(tmp_path, STATUS="3", SLURM_RESTART_COUNT="7").returncode == 3


def test_a_failed_restart_is_tried_again_but_a_failed_first_start_is_not(tmp_path: Path) -> None:
    assert train(tmp_path, STATUS="137").returncode == 137
    assert not is_requeued(tmp_path)
    assert train(tmp_path, STATUS="137", SLURM_RESTART_COUNT="1").returncode == 0
    assert is_requeued(tmp_path)


@pytest.mark.parametrize(
    ("left", "refused"),
    [("2:00", True), ("2:59", True), ("3:00", False), ("1:00:00", False), ("1-00:00:00", False), ("UNLIMITED", False)],
)
def test_a_time_limit_below_the_signal_and_the_start_is_refused(tmp_path: Path, left: str, refused: bool) -> None:
    program(tmp_path / "bin" / "squeue", f"echo {left}")
    done = train(tmp_path, STATUS="3", SAVES="step-00000010")
    assert (done.returncode == 2) == refused, done.stderr
    assert is_requeued(tmp_path) == (not refused)
    assert ("set --time to 4 minutes or more" in done.stderr) == refused


def test_a_signal_at_the_start_does_not_end_the_script(tmp_path: Path) -> None:
    """SLURM sends USR1 at once to a job whose time limit is no longer than the lead of the signal."""
    program(tmp_path / "bin" / "python", "kill -USR1 $(ps -o ppid= -p $PPID); exit 0")  # Python is asked for its MPI
    program(tmp_path / "bin" / "squeue", "echo 1:50")
    done = train(tmp_path)
    assert done.returncode == 2, done.stderr
    assert "USR1: the ranks save and stop" in done.stderr
    assert "set --time to 4 minutes or more" in done.stderr


@pytest.mark.parametrize("preempted", [True, False])
def test_term_saves_and_only_a_preempted_job_is_requeued(tmp_path: Path, preempted: bool) -> None:
    program(
        tmp_path / "bin" / "mpitrain",
        "trap 'mkdir -p runs/r/checkpoints/step-00000010; exit 3' USR1; kill -TERM $PPID; sleep 20 & wait",
    )
    time = "2026-11-30T07:11:02" if preempted else "None"
    program(
        tmp_path / "bin" / "scontrol",
        f'if [ "$1" = show ]; then echo "JobId=7 PreemptTime={time} X=1"; else echo "$@" > {REQUEUED}; fi',
    )
    done = train(tmp_path)
    assert (tmp_path / "runs" / "r" / "checkpoints" / "step-00000010").exists()
    assert is_requeued(tmp_path) == preempted
    assert done.returncode == (0 if preempted else 3)
    assert ("cancelled; submit the job again with RUN=runs/r" in done.stderr) == (not preempted)


def test_the_ranks_run_inside_the_container(tmp_path: Path) -> None:
    program(tmp_path / "bin" / "apptainer", 'echo "$@" >> inside; shift 2; exec "$@"')
    train(tmp_path, STATUS="3", SAVES="step-00000010", CONTAINER="apptainer exec image.sif")
    words = [line.split()[:3] for line in (tmp_path / "inside").read_text().splitlines()]
    assert ["exec", "image.sif", "mpitrain"] in words
    assert all(word[:2] == ["exec", "image.sif"] for word in words)


def test_pbs_submits_the_script_again_and_counts(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("a\nb\n")
    variables = {"PBS_JOBID": "7.server", "PBS_NODEFILE": str(tmp_path / "nodes"), "RUN": "runs/r", "JOBS": str(JOBS)}
    for k in range(3):
        env = {**variables, "STATUS": "3", "SAVES": f"step-{k + 1:08d}", "RESTARTS": "2"}
        done = run(["bash", str(JOBS / "train.pbs")], tmp_path, **env)
        assert (done.returncode == 0) == (k < 2), done.stderr
    assert (tmp_path / REQUEUED).read_text().endswith("jobs/train.pbs\n")


def test_lsf_requeues_a_job_by_its_exit_code(tmp_path: Path) -> None:
    variables = {"LSB_JOBID": "7", "LSB_DJOB_NUMPROC": "2", "RUN": "runs/r", "JOBS": str(JOBS)}
    done = run(["bash", str(JOBS / "train.lsf")], tmp_path, **variables, STATUS="137", SAVES="step-00000010")
    assert done.returncode == 3, done.stderr
    assert "#BSUB -Q 3" in (JOBS / "train.lsf").read_text().splitlines()


def test_a_script_outside_a_batch_system_says_how_to_submit_it(tmp_path: Path) -> None:
    for name in ("train.sbatch", "sweep.sbatch", "train.pbs", "train.flux"):
        done = run(["bash", str(JOBS / name)], tmp_path, JOBS=str(JOBS))
        assert done.returncode == 2
        assert done.stderr.startswith("this is a batch script: submit it with")
