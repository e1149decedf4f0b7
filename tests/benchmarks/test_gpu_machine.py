"""Whether a GPU can be measured, and what is said of it."""

from __future__ import annotations

import ctypes
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.launching import ROOT, environment

H200 = {"name": "NVIDIA H200", "n_gpus": 1, "memory_gib": 139.8, "l2_mib": 60.0, "driver": "580.1"}
H200 |= {"cuda_of_driver": "13.0", "cuda_of_cupy": "13.0", "cuda_of_torch": "13.0"}


@pytest.fixture
def machine(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks.gpu.machine")


def driver(monkeypatch: pytest.MonkeyPatch, *, code: int = 0, n_gpus: int = 1) -> None:
    """NVIDIA's library, as far as it is asked."""

    def count(found: Any) -> int:
        found._obj.value = n_gpus
        return 0

    library = SimpleNamespace(cuInit=lambda flags: code, cuDeviceGetCount=count)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)


def test_without_a_driver_there_is_no_gpu(machine: ModuleType) -> None:
    assert "there is no NVIDIA GPU here" in machine.problem(driver="libnosuch.so.1")


def test_a_driver_that_fails_is_told_by_its_code(machine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, code=100)
    assert "error 100" in machine.problem()


def test_hidden_gpus_are_not_there(machine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, n_gpus=0)
    assert "CUDA_VISIBLE_DEVICES" in machine.problem()


def test_what_python_lacks_is_named(machine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch)
    assert machine.problem(["numpy"]) is None
    told = machine.problem(["numpy", "nosuchpackage"])
    assert "lacks nosuchpackage" in told
    assert "PYTHON=" in told
    assert "\n" not in told


def test_cuda_versions_are_read(machine: ModuleType) -> None:
    assert [machine.version_of(n) for n in (13000, 12090)] == ["13.0", "12.9"]


def test_the_line_of_a_gpu_has_what_decides(machine: ModuleType) -> None:
    assert machine.line(H200) == ("NVIDIA H200, 139.8 GiB, L2 60 MiB, driver 580.1, CUDA 13.0 (CuPy 13.0, torch 13.0)")
    assert machine.line(H200 | {"n_gpus": 2}).startswith("2 x NVIDIA H200")


def test_a_machine_without_nvidia_smi_has_an_unknown_driver(
    machine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", absent)
    assert machine.driver_version() == "unknown"


EACH = """
import os, runpy, sys

for name in ("run", "kernels", "exchange", "training"):  # in turn, because each imports torch
    pid = os.fork()
    if not pid:
        sys.argv = [name]
        runpy.run_module(f"benchmarks.gpu.{name}", run_name="__main__", alter_sys=True)
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=sys.stderr, flush=True)
"""


def test_without_a_gpu_each_script_ends_with_one_line() -> None:
    env = environment("active", {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)})
    command = [sys.executable, "-c", f"import torch\n{EACH}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 8, done.stderr
    for name, said, code in zip(("run", "kernels", "exchange", "training"), lines[::2], lines[1::2]):
        assert "there is no NVIDIA GPU" in said
        assert code.split()[0] == name
        assert code.split()[1] != "0"


def test_the_page_of_results_needs_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page = importlib.import_module("benchmarks.pages.gpu_page")
    monkeypatch.setattr(sys, "argv", ["gpu_page.py", "--results", str(tmp_path)])
    assert page.main() == 2
    assert "make bench-gpu" in capsys.readouterr().err
