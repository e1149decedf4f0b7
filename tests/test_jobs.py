"""The job scripts under a stand-in for the launcher: the arguments they pass on, and their exit codes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

JOBS = Path(__file__).resolve().parent.parent / "jobs"


def program(path: Path, body: str) -> None:
    path.write_text("#!/usr/bin/env bash\n" + body)
    path.chmod(0o755)


def run(command: list[str], tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), **variables}
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def launchers(tmp_path: Path) -> Path:
    """A folder for stand-ins at the front of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


class TestLocal:
    def local(self, tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return run([str(JOBS / "local.sh"), *arguments], tmp_path, VIRTUAL_ENV=str(tmp_path), **variables)

    @pytest.mark.parametrize("arguments", [[], ["2"], ["two", "true"], ["0", "true"], ["-3", "true"]])
    def test_wrong_arguments_get_the_usage(self, tmp_path: Path, arguments: list[str]) -> None:
        done = self.local(tmp_path, *arguments)
        assert done.returncode == 2
        assert "usage: local.sh N command" in done.stderr

    @pytest.mark.parametrize("version", ["mpirun (Open MPI) 5.0.11", "HYDRA build details:"])
    def test_arguments_arrive_as_they_were_given(self, tmp_path: Path, launchers: Path, version: str) -> None:
        program(launchers / "mpirun", f'if [ "$1" = --version ]; then echo "{version}"; else printf "<%s>" "$@"; fi')
        done = self.local(tmp_path, "3", "echo", "two words", "", 'a"quote', "*")
        assert done.stdout.startswith("<-n><3>")
        assert done.stdout.endswith('<echo><two words><><a"quote><*>')

    def test_variables_that_are_set_are_kept(self, tmp_path: Path, launchers: Path) -> None:
        body = 'if [ "$1" = --version ]; then echo "(Open MPI) 5"; else echo $OMP_NUM_THREADS $OMPI_MCA_osc; fi'
        program(launchers / "mpirun", body)
        assert self.local(tmp_path, "1", "true").stdout == "1 ^ucx\n"
        assert self.local(tmp_path, "1", "true", OMP_NUM_THREADS="4", OMPI_MCA_osc="ucx").stdout == "4 ucx\n"

    def test_the_exit_code_is_the_launchers(self, tmp_path: Path, launchers: Path) -> None:
        program(launchers / "mpirun", '[ "$1" = --version ] || exit 7')
        assert self.local(tmp_path, "1", "true").returncode == 7


class TestSbatch:
    """Stand-ins: srun runs its command once, mpitrain records its arguments."""

    def sbatch(self, tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        variables = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "RUN": "runs/r", **variables}
        return run(["bash", str(JOBS / "train.sbatch"), *arguments], tmp_path, **variables)

    @pytest.fixture(autouse=True)
    def stand_ins(self, launchers: Path) -> None:
        program(launchers / "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
        program(launchers / "python", "exit ${WORLD_IS_WRONG:-0}")
        wait = "[ -n \"${FAIL-}\" ] || { mkdir -p runs/r; echo '{}' > runs/r/result.json; }"
        program(launchers / "mpitrain", f'printf "<%s>" "$@" > called; {wait}; exit ${{STATUS:-0}}')

    def test_a_run_that_wrote_its_result_has_succeeded(self, tmp_path: Path) -> None:
        done = self.sbatch(tmp_path, "--algorithm", "easgd")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "called").read_text() == "<train><--out><runs/r><--algorithm><easgd>"

    @pytest.mark.parametrize(("status", "expected"), [("0", 1), ("9", 9)])
    def test_a_run_without_a_result_has_failed_with_any_exit_code(
        self, tmp_path: Path, status: str, expected: int
    ) -> None:
        done = self.sbatch(tmp_path, FAIL="1", STATUS=status)
        assert done.returncode == expected
        assert "runs/r did not finish" in done.stderr

    def test_a_run_with_checkpoints_is_resumed(self, tmp_path: Path) -> None:
        (tmp_path / "runs" / "r" / "checkpoints" / "step-00000010").mkdir(parents=True)
        assert self.sbatch(tmp_path).returncode == 0
        assert (tmp_path / "called").read_text() == "<train><--resume><runs/r>"

    def test_a_run_with_a_glob_pattern_as_its_name_is_resumed(self, tmp_path: Path) -> None:
        run_folder = tmp_path / "runs" / "easgd[lr=0.1]*"
        (run_folder / "checkpoints" / "step-00000010").mkdir(parents=True)
        (run_folder / "config.json").write_text("{}")
        self.sbatch(tmp_path, RUN="runs/easgd[lr=0.1]*")
        assert (tmp_path / "called").read_text() == "<train><--resume><runs/easgd[lr=0.1]*>"
        assert [path.name for path in run_folder.parent.glob("easgd*")] == ["easgd[lr=0.1]*"]

    def test_a_run_that_ended_before_its_first_checkpoint_is_begun_again_and_kept(self, tmp_path: Path) -> None:
        run_folder = tmp_path / "runs" / "r"
        run_folder.mkdir(parents=True)
        (run_folder / "config.json").write_text("{}")
        assert self.sbatch(tmp_path).returncode == 0
        assert (tmp_path / "called").read_text() == "<train><--out><runs/r>"
        assert [old.name for old in (tmp_path / "runs").glob("r.*/config.json")] == ["config.json"]

    def test_a_run_that_was_asked_to_stop_is_requeued(self, tmp_path: Path, launchers: Path) -> None:
        program(launchers / "scontrol", 'echo "$@" > requeued')
        assert self.sbatch(tmp_path, FAIL="1", STATUS="3").returncode == 0
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"

    @pytest.mark.parametrize(
        ("status", "saves", "restarts", "expected"),
        [
            ("137", "step-00000020", "0", 0),
            ("137", "step-00000020", "20", 137),
            ("137", "step-00000010", "0", 137),  # no further than it was
            ("1", "step-00000020", "0", 1),
            ("2", "step-00000020", "0", 2),
        ],
    )
    def test_a_run_that_a_signal_ended_is_requeued_if_it_got_on(
        self, tmp_path: Path, launchers: Path, status: str, saves: str, restarts: str, expected: int
    ) -> None:
        program(launchers / "scontrol", 'echo "$@" > requeued')
        program(launchers / "mpitrain", f"mkdir -p runs/r/checkpoints/{saves}; exit {status}")
        (tmp_path / "runs" / "r" / "checkpoints" / "step-00000010").mkdir(parents=True)
        assert self.sbatch(tmp_path, SLURM_RESTART_COUNT=restarts).returncode == expected
        assert (tmp_path / "requeued").exists() == (expected == 0)

    def test_usr1_before_there_are_ranks_is_remembered(self, tmp_path: Path, launchers: Path) -> None:
        program(launchers / "scontrol", 'echo "$@" > requeued')
        program(launchers / "python", "kill -USR1 $PPID")  # in the check of the launch
        assert self.sbatch(tmp_path).returncode == 0
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"
        assert not (tmp_path / "called").exists()

    def test_usr1_is_passed_on_to_the_ranks(self, tmp_path: Path, launchers: Path) -> None:
        program(launchers / "scontrol", 'echo "$@" > requeued')
        program(launchers / "mpitrain", "trap 'echo stopped > called; exit 3' USR1; kill -USR1 $PPID; sleep 20 & wait")
        assert self.sbatch(tmp_path).returncode == 0
        assert (tmp_path / "called").read_text() == "stopped\n"
        assert (tmp_path / "requeued").exists()

    def test_a_finished_run_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "runs" / "r").mkdir(parents=True)
        (tmp_path / "runs" / "r" / "result.json").touch()
        assert self.sbatch(tmp_path).returncode == 0
        assert not (tmp_path / "called").exists()

    def test_a_wrong_world_size_stops_the_job_before_it_trains(self, tmp_path: Path) -> None:
        done = self.sbatch(tmp_path, WORLD_IS_WRONG="1")
        assert done.returncode == 1
        assert "does not make one world of 4 ranks" in done.stderr
        assert not (tmp_path / "called").exists()
