"""The command that makes all benchmarks on a GPU: what it runs, in which environment, and what a failure leaves."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.launching import ROOT, environment

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delenv("MPIRUN", raising=False)
    return importlib.import_module("benchmarks.gpu.run")


@pytest.fixture
def runs(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str]]]:
    """Runs the command with parts that are only noted; some of them fail."""

    def run(*parts: str, failing: dict[str, str] | None = None) -> tuple[int, list[str]]:
        names: list[str] = []

        def start(one: Any, mpirun: str | None) -> str | None:
            names.append(one.name)
            return (failing or {}).get(one.name)

        def finished(command: Any, environment: Any, one: Any) -> str | None:
            names.append(one.name)
            return (failing or {}).get(one.name)

        monkeypatch.setattr(bench, "finished", finished)
        return bench.main(parts, lambda: None, start), names

    return run


def test_all_parts_come_in_order_and_then_the_page(runs: Callable[..., tuple[int, list[str]]]) -> None:
    code, names = runs()
    assert code == 0
    assert names == ["gpu-kernels", "gpu-exchange-2", "gpu-exchange-4", "gpu-exchange-8", "gpu-training", "gpu-page"]


def test_parts_can_be_chosen(runs: Callable[..., tuple[int, list[str]]]) -> None:
    assert runs("training", "kernels") == (0, ["gpu-kernels", "gpu-training", "gpu-page"])


def test_a_failure_does_not_stop_the_others_and_is_named(
    runs: Callable[..., tuple[int, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, names = runs(failing={"gpu-kernels": "exit code 3", "gpu-page": "exit code 2"})
    assert code == 1
    assert len(names) == 6
    assert capsys.readouterr().err == "failed: gpu-kernels (exit code 3); the page (exit code 2)\n"


def test_without_a_gpu_nothing_begins(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def start(*_: Any) -> None:
        raise AssertionError("began")

    assert bench.main([], lambda: "there is no GPU", start) == 2
    assert capsys.readouterr().err == "bench-gpu: there is no GPU\n"


def test_make_bench_gpu_needs_a_gpu_and_nothing_else() -> None:
    env = environment("active", {"CUDA_VISIBLE_DEVICES": ""})
    command = ["make", "--no-print-directory", "bench-gpu", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode != 0
    assert done.stdout == ""  # no set-up, no part
    first, *others = done.stderr.splitlines()
    assert first.startswith("bench-gpu: there is no NVIDIA GPU")
    assert all(line.startswith("make") for line in others)


def test_an_unknown_part_is_named(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["kernels", "speed"], lambda: None)
    assert "no part speed: choose from kernels, exchange, training" in capsys.readouterr().err


def test_all_limits_together_are_below_ten_minutes(bench: ModuleType) -> None:
    assert sum(run.limit_seconds for runs in bench.PARTS.values() for run in runs) < 600


def test_the_scripts_are_there(bench: ModuleType) -> None:
    for run in [run for runs in bench.PARTS.values() for run in runs]:
        command = bench.command_of(run)
        (module,) = [word for word in command if word.startswith("benchmarks.")]
        assert importlib.util.find_spec(module) is not None
        assert all((BENCHMARKS.parent / word).exists() for word in command if word.startswith("jobs/"))
        assert (command[0] == "jobs/local.sh") == (run.n_ranks > 0)


def program(folder: Path) -> Path:
    folder.mkdir(parents=True)
    path = folder / "mpirun"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_mpirun_is_the_one_asked_for(bench: ModuleType, tmp_path: Path) -> None:
    wanted, other = program(tmp_path / "a" / "bin"), program(tmp_path / "b" / "bin")
    path = str(other.parent)
    assert bench.find_mpirun({"MPIRUN": str(wanted), "PATH": path}) == str(wanted)
    assert bench.find_mpirun({"MPIRUN": "mpirun", "PATH": path}) == str(other)
    for wrong in (tmp_path / "nosuch" / "bin" / "mpirun", program(tmp_path / "c")):
        with pytest.raises(FileNotFoundError, match="MPIRUN="):
            bench.find_mpirun({"MPIRUN": str(wrong), "PATH": path})


def test_mpirun_is_looked_for_beside_python_and_then_on_the_path(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path = program(tmp_path / "a" / "bin")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "b" / "bin" / "python"))
    assert bench.find_mpirun({"PATH": str(on_path.parent)}) == str(on_path)
    beside = program(tmp_path / "b" / "bin")
    assert bench.find_mpirun({"PATH": str(on_path.parent)}) == str(beside)
    assert bench.find_mpirun({"MPIRUN": "", "PATH": str(on_path.parent)}) == str(beside)


def test_ranks_find_mpitrain_and_the_chosen_mpirun(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    environment = bench.environment_of(bench.PARTS["training"][0], str(tmp_path / "bin" / "mpirun"))
    assert environment["VIRTUAL_ENV"] == str(tmp_path)
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(BENCHMARKS.parent), "/elsewhere"]


def test_ranks_need_mpirun(bench: ModuleType) -> None:
    assert "no mpirun" in bench.record(bench.PARTS["training"][0], None)


def test_what_ends_well_has_no_reason(bench: ModuleType) -> None:
    run = bench.Run("a", 0, (), 60)
    assert bench.finished([sys.executable, "-c", ""], os.environ, run) is None
    assert bench.finished([sys.executable, "-c", "raise SystemExit(3)"], os.environ, run) == "exit code 3"


def test_what_takes_too_long_is_ended_with_its_children(bench: ModuleType, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    apart = "start_new_session=False, process_group=0"  # as mpirun starts its ranks
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], {apart})"
    assert "more than 15 s" in bench.finished([sys.executable, "-c", parent], os.environ, bench.Run("a", 0, (), 15))
    pid = int(note.read_text())
    for _ in range(2000):
        if not Path(f"/proc/{pid}/stat").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text():
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the child lives on")
