"""The job scripts under a stand-in for the launcher: the arguments they pass on, and their exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from mpitrain.records import lock_file

JOBS = Path(__file__).resolve().parent.parent / "jobs"


def program(path: Path, body: str) -> None:
    path.write_text("#!/usr/bin/env bash\n" + body)
    path.chmod(0o755)


def run(command: list[str], tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), **variables}
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture
def launchers(tmp_path: Path) -> Path:
    """A folder for stand-ins at the front of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


class TestLocal:
    def local(self, tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return run([str(JOBS / "local.sh"), *arguments], tmp_path, **{"VIRTUAL_ENV": str(tmp_path), **variables})

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

    @pytest.mark.parametrize("there", [True, False], ids=["with an mpirun", "without one"])
    def test_the_active_environment_comes_before_the_path(self, tmp_path: Path, launchers: Path, there: bool) -> None:
        venv = tmp_path / "venv"
        (venv / "bin").mkdir(parents=True)
        for folder, name in ((launchers, "path"), (venv / "bin", "venv")):
            program(folder / "tool", f"echo tool of {name}")
            if name == "path" or there:
                program(folder / "mpirun", f'[ "$1" = --version ] || {{ echo mpirun of {name}; tool; }}')
        done = self.local(tmp_path, "1", "tool", VIRTUAL_ENV=str(venv))
        name = "venv" if there else "path"
        assert done.stdout == f"mpirun of {name}\ntool of {name}\n"

    def test_without_any_mpirun_the_message_says_how_to_get_one(self, tmp_path: Path, launchers: Path) -> None:
        for tool in ("bash", "dirname"):
            (launchers / tool).symlink_to(str(shutil.which(tool)))
        done = self.local(tmp_path, "1", "true", PATH=str(launchers))
        assert done.returncode == 127
        assert "no mpirun: run 'make setup'" in done.stderr

    @pytest.mark.parametrize(
        ("version", "flags", "settings"),
        [
            ("mpirun (Open MPI) 5.0.11", "--map-by :OVERSUBSCRIBE --bind-to none", "1 1 1 1 1 ^ofi unset"),
            ("HYDRA build details:", "", "unset unset unset unset unset unset fork"),
        ],
        ids=["Open MPI", "MPICH"],
    )
    def test_ranks_may_outnumber_cores_and_run_as_root_in_containers(
        self, tmp_path: Path, launchers: Path, version: str, flags: str, settings: str
    ) -> None:
        names = [
            *(f"{mpi}_ALLOW_RUN_AS_ROOT{more}" for mpi in ("OMPI", "PRTE") for more in ("", "_CONFIRM")),
            *("OMPI_MCA_mpi_yield_when_idle", "OMPI_MCA_btl", "HYDRA_LAUNCHER"),
        ]
        values = " ".join(f"${{{name}-unset}}" for name in names)
        given = f'echo {values}; printf "%s " "$@"'
        program(launchers / "mpirun", f'if [ "$1" = --version ]; then echo "{version}"; else {given}; fi')
        lines = self.local(tmp_path, "9", "true").stdout.splitlines()
        assert lines[0] == settings
        assert lines[1].split() == ["-n", "9", *flags.split(), "true"]

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
        noted = 'echo "$OMP_NUM_THREADS $SRUN_CPUS_PER_TASK $OMPI_MCA_osc $@" >> steps'
        program(launchers / "srun", f'{noted}; while [[ $1 == --* ]]; do shift; done; exec "$@"')
        program(launchers / "python", "echo ${VENDOR-}; exit ${WORLD_IS_WRONG:-0}")
        wait = "[ -n \"${FAIL-}\" ] || { mkdir -p runs/r; echo '{}' > runs/r/result.json; }"
        program(launchers / "mpitrain", f'printf "<%s>" "$@" > called; {wait}; exit ${{STATUS:-0}}')

    def test_a_run_that_wrote_its_result_has_succeeded(self, tmp_path: Path) -> None:
        done = self.sbatch(tmp_path, "--algorithm", "easgd")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "called").read_text() == "<train><--out><runs/r><--algorithm><easgd>"

    @pytest.mark.parametrize(
        ("variables", "step"),
        [
            ({}, "1 1 ^ucx --mpi=pmix"),
            ({"MPI_TYPE": "pmi2", "SLURM_CPUS_PER_TASK": "3"}, "3 3 ^ucx --mpi=pmi2"),
            ({"SLURM_CPUS_PER_TASK": "3", "OMP_NUM_THREADS": "2", "OMPI_MCA_osc": "x"}, "2 3 x --mpi=pmix"),
            ({"VENDOR": "MPICH", "LAUNCHER": "srun"}, "1 1 ^ucx --mpi=pmi2"),
        ],
        ids=["default", "of the job", "of the user", "of the MPI"],
    )
    def test_the_steps_have_the_cores_and_the_mpi_of_the_job(
        self, tmp_path: Path, variables: dict[str, str], step: str
    ) -> None:
        assert self.sbatch(tmp_path, **variables).returncode == 0
        check, train = (line for line in (tmp_path / "steps").read_text().splitlines() if "--mpi" in line)
        assert check.startswith(f"{step} --kill-on-bad-exit=1 python -c ")
        assert check.endswith(" 4")  # ranks
        assert train.startswith(f"{step} --kill-on-bad-exit=1 mpitrain train ")

    def test_mpirun_starts_the_ranks_of_mpich(self, tmp_path: Path, launchers: Path) -> None:
        program(launchers / "mpirun", 'echo "mpirun $@" >> steps; while [[ $1 == -n ]]; do shift 2; done; exec "$@"')
        assert self.sbatch(tmp_path, VENDOR="MPICH").returncode == 0
        assert (tmp_path / "steps").read_text().splitlines()[-1] == "mpirun -n 4 mpitrain train --out runs/r"

    @pytest.mark.parametrize(("name", "folder"), [({}, "mpitrain-7"), ({"SLURM_JOB_NAME": "mine"}, "mine-7")])
    def test_the_run_has_the_name_of_the_job_by_default(
        self, tmp_path: Path, name: dict[str, str], folder: str
    ) -> None:
        self.sbatch(tmp_path, RUN="", **name)
        assert (tmp_path / "called").read_text() == f"<train><--out><runs/{folder}>"

    def test_without_slurm_the_message_says_how_to_submit(self, tmp_path: Path) -> None:
        done = run(["bash", str(JOBS / "train.sbatch")], tmp_path)
        assert done.returncode != 0
        assert "this is a batch script: submit it with sbatch" in done.stderr

    def test_slurm_warns_the_script_and_may_requeue_it(self) -> None:
        lines = (JOBS / "train.sbatch").read_text().splitlines()
        asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH --")}
        # B: the signal goes to this script alone, which passes it on; without append a requeued job loses its log.
        assert {"signal=B:USR1@120", "requeue", "open-mode=append"} <= asked

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

    @pytest.mark.parametrize(
        ("name", "folder"),
        [
            ("-x", "./-x"),
            ("--", "./--"),
            ("two words", "two words"),
            ("two\nlines", "two\nlines"),
            ("runs/[", "runs/["),
            ("$(touch no)`touch no`", "$(touch no)`touch no`"),
            ("runs/slash//", "runs/slash"),
        ],
    )
    def test_a_run_may_have_any_name(self, tmp_path: Path, launchers: Path, name: str, folder: str) -> None:
        body = 'printf "<%s>" "$@" > called; mkdir -p -- "$3/checkpoints/step-1"; echo {} > "$3/config.json"; exit 137'
        program(launchers / "mpitrain", body)
        program(launchers / "scontrol", "exit 0")
        assert self.sbatch(tmp_path, RUN=name).returncode == 0
        assert (tmp_path / "called").read_text() == f"<train><--out><{folder}>"
        program(launchers / "mpitrain", 'printf "<%s>" "$@" > called; echo {} > "$3/result.json"')
        assert self.sbatch(tmp_path, RUN=name).stdout.endswith(f"finished: {folder}\n")
        assert (tmp_path / "called").read_text() == f"<train><--resume><{folder}>"
        assert not (tmp_path / "no").exists()

    @pytest.mark.parametrize(("job", "kept"), [("8", True), ("7", False)], ids=["another job", "this job"])
    def test_a_run_that_another_job_has_just_begun_is_not_moved(self, tmp_path: Path, job: str, kept: bool) -> None:
        run_folder = tmp_path / "runs" / "r"
        run_folder.mkdir(parents=True)
        (run_folder / "config.json").write_text("{}")
        (run_folder / "lock").write_text(json.dumps({"host": "a", "job": job}))
        self.sbatch(tmp_path)
        assert (run_folder / "config.json").exists() == kept

    def test_the_lock_is_read_as_it_is_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        assert '"job": "8"' in json.dumps(lock_file.describe())

    @pytest.mark.parametrize("words", [["--data", "a.h5"], ["--data=a.h5"]])
    def test_staged_data_are_read_from_the_copy(self, tmp_path: Path, words: list[str]) -> None:
        (tmp_path / "a.h5").write_text("data")
        stage = tmp_path / "-local"
        assert self.sbatch(tmp_path, *words, "--model", "a.h5.py", STAGE="a.h5", STAGE_DIR=str(stage)).returncode == 0
        assert (stage / "a.h5").read_text() == "data"
        called = (tmp_path / "called").read_text()
        assert f"{stage}/a.h5><--model><a.h5.py>" in called
        assert "<a.h5>" not in called

    def test_a_staged_file_that_no_option_names_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.h5").write_text("data")
        done = self.sbatch(tmp_path, "--data", "b.h5", STAGE="a.h5", STAGE_DIR=str(tmp_path / "local"))
        assert done.returncode == 2
        assert "STAGE=a.h5 is not the file of --data" in done.stderr

    @pytest.mark.parametrize("row", ["0", "3", ""])
    def test_a_sweep_has_a_task_for_each_line(self, tmp_path: Path, row: str) -> None:
        (tmp_path / "lines").write_text("--lr 1\n# none\n--lr 2\n")
        variables = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"} | ({"SLURM_ARRAY_TASK_ID": row} if row else {})
        done = run(["bash", str(JOBS / "sweep.sbatch"), "lines"], tmp_path, **variables)
        assert done.returncode == 2
        assert f"submit {'with --array=1-2' if row else 'this script as an array'}" in done.stderr

    @pytest.mark.parametrize("task", ["0", "3", ""])
    def test_a_scaling_task_fits_the_job(self, tmp_path: Path, task: str) -> None:
        variables = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2"}
        variables |= {"SLURM_ARRAY_TASK_ID": task} if task else {}
        done = run(["bash", str(JOBS / "scaling.sbatch")], tmp_path, **variables)
        assert done.returncode == 2
        assert "--array=1,2" in done.stderr

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

    def test_a_run_that_cannot_be_requeued_has_failed(self, tmp_path: Path, launchers: Path) -> None:
        program(launchers / "scontrol", "exit 1")
        done = self.sbatch(tmp_path, FAIL="1", STATUS="3")
        assert done.returncode == 3
        assert "the job cannot be requeued: submit it again with RUN=runs/r" in done.stderr

    @pytest.mark.parametrize("preempted", [False, True])
    def test_a_job_that_is_cancelled_is_not_requeued_but_one_that_is_preempted(
        self, tmp_path: Path, launchers: Path, preempted: bool
    ) -> None:
        answer = f"echo JobId=7 PreemptTime={'2026-01-01' if preempted else 'None'}"
        program(launchers / "scontrol", f'if [ "$1" = requeue ]; then echo "$@" > requeued; else {answer}; fi')
        body = "trap 'echo saved > called; exit 3' USR1; kill -TERM $PPID; sleep 20 & wait"
        program(launchers / "mpitrain", body)
        done = self.sbatch(tmp_path)
        assert (tmp_path / "called").read_text() == "saved\n"
        assert (tmp_path / "requeued").exists() == preempted
        assert done.returncode == (0 if preempted else 3), done.stderr
        assert ("cancelled; submit the job again with RUN=runs/r" in done.stderr) != preempted

    def test_starts_in_a_row_without_a_new_checkpoint_are_counted(self, tmp_path: Path, launchers: Path) -> None:
        program(launchers / "scontrol", "exit 0")
        program(launchers / "mpitrain", "[ -z ${SAVES-} ] || mkdir -p runs/r/checkpoints/$SAVES; exit 137")
        starts = [("1", ""), ("1", "step-1"), ("1", ""), ("1", "")]
        codes = [
            self.sbatch(tmp_path, STALLS="2", SLURM_RESTART_COUNT=n, SAVES=saves).returncode for n, saves in starts
        ]
        assert codes == [0, 0, 0, 137]

    @pytest.mark.parametrize(("left", "code"), [("2:59", 2), ("3:00", 0), ("UNLIMITED", 0)])
    def test_a_job_without_time_to_train_is_refused(
        self, tmp_path: Path, launchers: Path, left: str, code: int
    ) -> None:
        program(launchers / "squeue", f"echo {left}")
        done = self.sbatch(tmp_path)
        assert done.returncode == code
        assert (tmp_path / "called").exists() == (code == 0)
        assert ("the time limit leaves 179 s" in done.stderr) == (code == 2)

    @pytest.mark.parametrize(("allowed", "expected"), [("3", 0), ("2", 137)])
    def test_the_number_of_restarts_can_be_chosen(
        self, tmp_path: Path, launchers: Path, allowed: str, expected: int
    ) -> None:
        program(launchers / "scontrol", "exit 0")
        program(launchers / "mpitrain", "mkdir -p runs/r/checkpoints/step-00000020; exit 137")
        assert self.sbatch(tmp_path, SLURM_RESTART_COUNT="2", RESTARTS=allowed).returncode == expected

    def test_a_run_that_was_killed_after_usr1_is_requeued(self, tmp_path: Path, launchers: Path) -> None:
        program(launchers / "scontrol", 'echo "$@" > requeued')
        program(launchers / "mpitrain", "trap '' USR1; kill -USR1 $PPID; sleep 0.5; exit 137")  # before it could save
        assert self.sbatch(tmp_path).returncode == 0
        assert (tmp_path / "requeued").exists()

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
        program(launchers / "scontrol", "cp called requeued")  # once the ranks have saved
        body = "trap 'sleep 0.5; echo stopped > called; exit 3' USR1; kill -USR1 $PPID; sleep 20 & wait"
        program(launchers / "mpitrain", body)
        assert self.sbatch(tmp_path).returncode == 0
        assert (tmp_path / "requeued").read_text() == "stopped\n"

    def test_a_finished_run_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "runs" / "r").mkdir(parents=True)
        (tmp_path / "runs" / "r" / "result.json").touch()
        assert self.sbatch(tmp_path).returncode == 0
        assert not (tmp_path / "called").exists()

    @pytest.mark.parametrize(("size", "expected"), [(4, 0), (1, 1), (5, 1)])
    def test_the_world_must_have_the_ranks_of_the_job(
        self, tmp_path: Path, launchers: Path, size: int, expected: int
    ) -> None:
        mpi = f"rc, MPI = of(), of(COMM_WORLD=of(size={size}), get_vendor=lambda: ['x'])"
        (tmp_path / "mpi4py.py").write_text(f"from types import SimpleNamespace as of\n{mpi}\n")
        program(launchers / "python", f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"')
        done = self.sbatch(tmp_path)
        assert done.returncode == expected, done.stderr
        assert (tmp_path / "called").exists() == (expected == 0)

    def test_a_wrong_world_size_stops_the_job_before_it_trains(self, tmp_path: Path) -> None:
        done = self.sbatch(tmp_path, WORLD_IS_WRONG="1")
        assert done.returncode == 1
        assert "does not make one world of 4 ranks" in done.stderr
        assert not (tmp_path / "called").exists()


class TestOtherBatchSystems:
    """Stand-ins: mpirun and flux run their command once, in place of the ranks."""

    SCRIPTS: ClassVar[dict[str, tuple[str, dict[str, str]]]] = {
        "PBS": ("train.pbs", {"PBS_JOBID": "7", "PBS_NODEFILE": "nodes"}),
        "LSF": ("train.lsf", {"LSB_JOBID": "7", "LSB_DJOB_NUMPROC": "3"}),
        "Flux": ("train.flux", {"FLUX_JOB_ID": "7", "N_RANKS": "3"}),
    }

    @pytest.fixture(autouse=True)
    def stand_ins(self, tmp_path: Path, launchers: Path) -> None:
        (tmp_path / "nodes").write_text("a\na\nb\n")
        body = 'while [[ $1 != python && $1 != mpitrain ]]; do shift; done; exec "$@"'
        program(launchers / "mpirun", f'echo "mpirun $@" >> steps; {body}')
        program(launchers / "flux", f'echo "flux $@" >> steps; [ "$1" = run ] || exit 0; {body}')
        program(launchers / "qsub", 'echo "qsub $@" >> steps')
        splits = f'case $2 in *shlex*) exec {sys.executable} "$@" ;; esac'
        program(launchers / "python", f"{splits}; exit 0")
        program(launchers / "mpitrain", 'printf "<%s>" "$@" > called; mkdir -p runs/r; exit 3')

    def submit(self, tmp_path: Path, system: str, **variables: str) -> subprocess.CompletedProcess[str]:
        script, of_the_system = self.SCRIPTS[system]
        variables = {"RUN": "runs/r", "JOBS": str(JOBS), **of_the_system, **variables}
        return run(["bash", str(JOBS / script)], tmp_path, **variables)

    @pytest.mark.parametrize(
        ("system", "first", "last", "code"),
        [
            ("PBS", "mpirun -n 3 --hostfile nodes", "qsub -V ", 0),
            ("LSF", "mpirun -n 3", "mpirun -n 3 mpitrain train", 3),  # LSF requeues a job with this exit code
            ("Flux", "flux run -n 3 -o mpi=none", "flux --parent batch ", 0),
        ],
    )
    def test_a_run_that_was_stopped_is_requeued(
        self, tmp_path: Path, system: str, first: str, last: str, code: int
    ) -> None:
        done = self.submit(tmp_path, system)
        assert done.returncode == code, done.stderr
        steps = (tmp_path / "steps").read_text().splitlines()
        assert [step.partition(" python -c ")[0] for step in steps if " python -c " in step] == [first]
        assert steps[-1].startswith(last)
        assert (tmp_path / "runs/r/restarts").read_text() == "1\n"

    @pytest.mark.parametrize("system", ["PBS", "LSF"])
    def test_options_in_a_variable_are_words_of_a_shell(self, tmp_path: Path, system: str) -> None:
        self.submit(tmp_path, system, OPTIONS="--data 'two words.h5'\n--model \"a[*]\" ''")
        called = (tmp_path / "called").read_text()
        assert called == "<train><--out><runs/r><--data><two words.h5><--model><a[*]><>"
        done = self.submit(tmp_path, system, OPTIONS="--data 'open")
        assert done.returncode == 2
        assert "cannot be split into words: --data 'open" in done.stderr

    def test_pbs_submits_the_next_job_with_the_resources_of_this_one(self, tmp_path: Path, launchers: Path) -> None:
        facts = [
            *("Job Id: 7.server", "    Job_Name = mine", "    queue = long"),
            *("    Resource_List.select = 2:ncpus=4:mem=", "\t8gb:mpiprocs=4", "    Resource_List.walltime = 02:00:00"),
        ]
        (tmp_path / "facts").write_text("\n".join(facts) + "\n")
        program(launchers / "qstat", "cat facts")
        assert self.submit(tmp_path, "PBS").returncode == 0
        *_, last = (tmp_path / "steps").read_text().splitlines()
        resources = "-l select=2:ncpus=4:mem=8gb:mpiprocs=4 -l walltime=02:00:00 -q long -N mine"
        assert last == f"qsub -V {resources} {JOBS}/train.pbs"

    @pytest.mark.parametrize("system", SCRIPTS)
    def test_restarts_are_counted_in_the_folder_of_the_run(self, tmp_path: Path, system: str) -> None:
        (tmp_path / "runs/r").mkdir(parents=True)
        (tmp_path / "runs/r/restarts").write_text("2\n")
        done = self.submit(tmp_path, system, RESTARTS="2")
        assert done.returncode == 3
        assert "did not finish after 2 restarts" in done.stderr
        assert not (tmp_path / "runs/r/restarts").exists()
