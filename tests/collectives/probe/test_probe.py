"""The probe: an operation that ends a pair of ranks gets a verdict; results are stored for their circumstances."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.launching import environment, installed, launch, python

from mpitrain.cli.info import show, table
from mpitrain.collectives.probe import cache, runner
from mpitrain.collectives.probe.cache import Probe, settings_of
from mpitrain.collectives.probe.launcher import child_environment
from mpitrain.collectives.probe.outcome import MEMORIES, OPERATIONS, Outcome
from mpitrain.collectives.probe.runner import measure
from mpitrain.collectives.probe.trials import TRIALS

IN_TIME_SECONDS = 500.0
GPUS = ("H200",)

BROKEN = """
import json, os, signal, time
from contextlib import contextmanager
from mpitrain.collectives.probe import child, trials

def operation(run, is_right=lambda pair: True):
    @contextmanager
    def made(pair, n_bytes):
        yield trials.Trial(lambda: run(pair), lambda: is_right(pair))
    return made, (8,)

def die(pair):
    if pair.rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    pair.comm.Barrier()

def hang(pair):
    if pair.rank == 0:
        time.sleep(1000)

def fail(pair):
    if pair.rank == 1:
        raise ValueError("a reason\\nand more")

def note_segments(pair):
    if pair.rank == 0:
        with open(os.path.join(os.path.dirname(__file__), "segments"), "w") as file:
            json.dump(child._segments(), file)

def fail_both(pair):
    raise ValueError("no windows")

def nothing(pair):
    pass

trials.TRIALS.update({
    "dies": operation(die),
    "lies": operation(nothing, lambda pair: pair.rank == 0),
    "hangs": operation(hang),
    "fails": operation(fail),
    "window creation": operation(fail_both),
    "rests": operation(note_segments),
    "rests again": operation(nothing),
})
child.main()
"""

STAND_IN = """
from support.standin_gpu import StandInGpu
from mpitrain.collectives.probe import child
from mpitrain.kernels import gpu

def use(rank):
    gpu._current = StandInGpu()

child._use_gpu = use
child.main()
"""

MEASURE = """
import json, sys
from dataclasses import asdict
from mpitrain.collectives.probe.runner import measure
memories, hang_seconds, program, *names = sys.argv[1:]
memories = memories.split(",")
rows = measure(dict.fromkeys(memories), names, program=[program], hang_seconds=float(hang_seconds))
print(json.dumps({name: {memory: asdict(row[memory]) for memory in row} for name, row in rows.items()}))
"""


def measured_by(mpi: str, script: Path, *names: str) -> dict[str, Any]:
    """Return the outcomes of `measure` in the environment of an MPI, with the operations of a script."""
    script.write_text(BROKEN)
    command = [python(mpi), "-c", MEASURE, "host", "8", str(script), *names]
    done = launch(0, command, mpi=mpi, timeout_seconds=IN_TIME_SECONDS)
    assert done.returncode == 0, done.output
    return {name: row["host"] for name, row in json.loads(done.output.splitlines()[-1]).items()}


def test_every_operation_has_a_trial() -> None:
    assert tuple(TRIALS) == OPERATIONS


@pytest.mark.launches
@pytest.mark.parametrize("mpi", installed())
def test_all_operations_work_on_memory_that_mpi_reads(mpi: str, tmp_path: Path) -> None:
    script = tmp_path / "with_a_stand_in.py"
    script.write_text(STAND_IN)
    command = [python(mpi), "-c", MEASURE, "host,device", str(4 * runner.HANG_SECONDS), str(script), *OPERATIONS]
    extra_env = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    # itself a rank, as under mpirun
    done = launch(1, command, mpi=mpi, timeout_seconds=IN_TIME_SECONDS, extra_env=extra_env)
    assert done.returncode == 0, done.output
    rows = json.loads(done.output.splitlines()[-1])
    assert tuple(rows) == OPERATIONS
    for name, row in rows.items():
        assert tuple(row) == ("host", "device")
        for memory, outcome in row.items():
            assert outcome["verdict"] == "ok", (name, memory, outcome)
            assert outcome["latency_us"] > 0
            moves_bytes = name not in ("window creation", "fetch_and_op", "lock")
            assert (outcome["gb_per_s"] is not None) == moves_bytes, (name, memory)


@pytest.mark.launches
@pytest.mark.parametrize("mpi", installed())
def test_an_operation_that_ends_a_pair_gets_a_verdict_and_the_next_is_tried(mpi: str, tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    names = ("rests", "dies", "lies", "hangs", "fails", "window creation", "put", "rests again", "lock")
    outcomes = measured_by(mpi, script, *names)
    assert {name: (outcome["verdict"], outcome["detail"]) for name, outcome in outcomes.items()} == {
        "rests": ("ok", ""),
        "dies": ("crashed", "signal 11"),
        "lies": ("wrong", ""),
        "hangs": ("hung", "nothing for 8 s"),
        "fails": ("error", "a reason"),
        "window creation": ("error", "no windows"),
        "put": ("not tried", "no window can be made"),
        "rests again": ("ok", ""),
        "lock": ("not tried", "no window can be made"),
    }
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(script) in _text(path)]
    left = json.loads((tmp_path / "segments").read_text())
    assert left
    assert not [path for path in left if Path(path).exists()]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended in the meantime
        return ""


def test_the_output_of_a_failing_launcher_is_the_detail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = tmp_path / "mpirun"
    launcher.write_text("#!/bin/sh\necho -----\necho no slots for $*\nexit 1\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # the launcher beside it is used
    outcomes = measure({"host": None}, ["send", "put"])
    assert {row["host"].verdict for row in outcomes.values()} == {"not tried"}
    assert outcomes["put"]["host"].detail.startswith("no slots for -n 2 ")


def test_without_a_launcher_nothing_is_tried_or_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: dict[str, Any]
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    outcomes = cache._measure(()).outcomes
    assert outcomes["send"]["host"] == Outcome("not tried", "there is no mpirun beside the interpreter or on PATH")
    assert not cache._measure(()).proved("send", "host")
    assert cache.known(GPUS) is None


def test_a_child_inherits_settings_but_no_variables_of_launchers() -> None:
    of_the_launcher = {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_MCA_PREFIXES": "mca,opal",
        "OMPI_MCA_cpu_type": "x86_64",
        "OMPI_MCA_initial_wdir": "/home",
        "OMPI_MCA_num_procs": "2",
        "OMPI_MCA_ess_base_jobid": "7",
        "PMIX_RANK": "1",
        "PMIX_NAMESPACE": "prterun",
        "PRTE_LAUNCHED": "1",
        "OPAL_USER_PARAMS_GIVEN": "1",
        "PMI_FD": "11",
        "HYDI_CONTROL_FD": "7",
        "HYDRA_LAUNCHER": "slurm",
        "MPI_LOCALRANKID": "1",
        "SLURM_JOB_ID": "3",
        "SLURMD_NODENAME": "n1",
        "PBS_NODEFILE": "/nodes",
    }
    of_the_user = {
        "HOME": "/home",
        "LD_LIBRARY_PATH": "/ucx/lib",
        "OPAL_PREFIX": "/moved",
        "OMPI_MCA_pml": "ucx",
        "OMPI_MCA_mpi_yield_when_idle": "0",
        "UCX_TLS": "sm,cuda_copy,cuda_ipc",
        "MPIR_CVAR_ENABLE_GPU": "1",
        "PMIX_MCA_gds": "hash",
        "OMP_NUM_THREADS": "3",
    }
    child = child_environment(of_the_launcher | of_the_user)
    assert child.items() >= of_the_user.items()
    assert child["HYDRA_LAUNCHER"] == "fork"
    assert child["OMPI_ALLOW_RUN_AS_ROOT"] == child["PRTE_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
    assert not (of_the_launcher.keys() - {"HYDRA_LAUNCHER"}) & child.keys()


def test_settings_are_the_same_under_any_launcher(tmp_path: Path) -> None:
    ucx, own = tmp_path / "ucx", tmp_path / "lib"
    ucx.mkdir()
    own.mkdir()
    (ucx / "libucp.so.0").touch()
    user = {"OMPI_MCA_pml": "ucx", "UCX_TLS": "all", "LD_LIBRARY_PATH": str(ucx), "HOME": "/home"}
    rank = user | {
        "OMPI_MCA_num_procs": "2",
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "LD_LIBRARY_PATH": f"{own}:{own}::{ucx}",
        "SLURM_JOB_ID": "3",
    }
    expected = {"OMPI_MCA_pml": "ucx", "UCX_TLS": "all", "LD_LIBRARY_PATH": str(ucx)}
    assert settings_of(user) == settings_of(rank) == expected
    assert "LD_LIBRARY_PATH" not in settings_of(rank | {"LD_LIBRARY_PATH": str(own)})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return circumstances that a test may change, with an empty cache and without MPI."""
    circumstances = {"host": "a.b/c", "mpi": "An MPI 1.0", "gpus": ("H200",), "settings": {"UCX_TLS": "all"}}
    monkeypatch.setenv("MPITRAIN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_circumstances", lambda gpus: dict(circumstances))
    return circumstances


def matrix(**differences: Outcome) -> dict[str, dict[str, Outcome]]:
    """Return outcomes for a host without GPUs; `differences` are named memory_operation."""
    works, absent = Outcome("ok", "", 2.04, 9.96), Outcome("not tried", "no GPU")
    return {
        operation: {
            memory: differences.get(f"{memory}_{operation}", works if memory == "host" else absent)
            for memory in MEMORIES
        }
        for operation in OPERATIONS
    }


def result(circumstances: dict[str, Any], **differences: Outcome) -> Probe:
    return Probe(**circumstances, measured="2026-11-21T16:45:58+0000", outcomes=matrix(**differences))


def test_a_result_is_found_in_its_circumstances_only(here: dict[str, Any]) -> None:
    assert cache.known(GPUS) is None
    assert cache.newest(GPUS) is None
    found = result(here, device_send=Outcome("crashed", "signal 11"))
    cache._store(found)
    assert cache.known(GPUS) == cache.newest(GPUS) == found
    for name, other in {"mpi": "An MPI 1.1", "gpus": (), "settings": {}, "host": "a"}.items():
        before, here[name] = here[name], other
        assert cache.known(GPUS) is None, name
        assert (cache.newest(GPUS) == found) == (name in ("gpus", "settings")), name
        here[name] = before
    again = result(here)
    cache._store(again)
    assert cache.known(GPUS) == again


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 0}', '{"format": 1, "outcomes": {"send": 3}}'])
def test_an_incomplete_file_is_ignored(text: str, here: dict[str, Any]) -> None:
    cache._store(result(here))
    path = cache._path(**here)
    assert path is not None
    path.write_text(text)
    assert cache.known(GPUS) is None
    assert cache.newest(GPUS) is None


def test_only_right_bytes_prove_an_operation(here: dict[str, Any]) -> None:
    found = result(here, device_put=Outcome("ok", "", 1.0, 1.0), device_get=Outcome("wrong", "", 1.0, 1.0))
    assert found.proved("all-reduce", "host")
    assert found.proved("put", "device")
    assert not found.proved("get", "device")
    assert not found.proved("lock", "device")


def test_the_document_is_complete(here: dict[str, Any]) -> None:
    document = json.loads(json.dumps(result(here).document()))
    assert document["outcomes"]["put"]["host"] == {
        "verdict": "ok",
        "detail": "",
        "latency_us": 2.04,
        "gb_per_s": 9.96,
    }
    assert document["gpus"] == ["H200"]
    assert document["measured"] == "2026-11-21T16:45:58+0000"


def test_table(here: dict[str, Any]) -> None:
    differences = {
        "host_lock": Outcome("ok", "", 123.4),
        "device_send": Outcome("wrong", "", 3.0, 3.0),
        "device_all-reduce": Outcome("crashed", "signal 11"),
        "device_window creation": Outcome("error", "MPI_ERR_WIN: " + 40 * "x"),
        "device_rput": Outcome("hung", "nothing for 15 s"),
        "device_put": Outcome("not tried", "no window can be made"),
    }
    fine = "ok   2.0 us  10.0 GB/s  -       "
    assert table(result(here, **differences)) == [
        "                 host                    pinned  device",
        f"send             {fine}wrong bytes",
        f"all-reduce       {fine}crashed (signal 11)",
        f"window creation  {fine}error: MPI_ERR_WIN: {24 * 'x'}...",
        *(f"{name:15s}  {fine}-" for name in ("put", "get", "accumulate", "fetch_and_op")),
        f"rput             {fine}hung (nothing for 15 s)",
        f"rget             {fine}-",
        "lock             ok   123 us             -       -",
        "- pinned, device (get, accumulate, fetch_and_op, rget, lock): not tried, no GPU",
        "- device (put): not tried, no window can be made",
    ]


def test_hosts_that_agree_share_a_table(here: dict[str, Any]) -> None:
    first = result(here)
    second = dataclasses.replace(first, host="b")
    third = result({**here, "host": "c"}, host_put=Outcome("wrong"))
    text = show({"world": {"ranks": 3}}, [first, second, third])
    assert text.count("all-reduce") == 2
    assert "probe of a.b/c, b: two ranks of one host, sharing one H200; measured 2026-11-21T16:45:58+0000" in text
    assert "probe of c: " in text
    assert "  UCX_TLS=all\n" in text
    assert show({"world": {"ranks": 1}}).endswith("not probed yet: mpirun -n 2 mpitrain info --probe")


def test_importing_the_probe_loads_neither_mpi_nor_cupy_nor_torch() -> None:
    code = "import sys, mpitrain.collectives.probe.cache, mpitrain.collectives.probe.child\n"
    code += "print(*sorted({'cupy', 'mpi4py', 'torch'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment("active")
    )
    assert done.stdout.strip() == ""


def test_signals_are_read_from_the_output_of_launchers() -> None:
    assert runner._cause("prterun noticed that process rank 1 exited on\nsignal 11 (Segmentation fault).", 139) == (
        "signal 11"
    )
    assert runner._cause("EXIT STRING: Segmentation fault (signal 11)", 11) == "signal 11"
    assert runner._cause("CUDA is unwell", 3) == "exit code 3"
