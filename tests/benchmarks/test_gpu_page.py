"""The page of what was measured on a GPU, from hand-made results."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

M = 2**20
GPU = {"name": "NVIDIA H200", "n_gpus": 1, "memory_gib": 139.8, "l2_mib": 60.0, "driver": "580.1"}
GPU |= {"cuda_of_driver": "13.0", "cuda_of_cupy": "13.0", "cuda_of_torch": "13.0"}


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("benchmarks.pages.gpu_page")


def keep(folder: Path, name: str, results: Any, **more: Any) -> None:
    document = {"results": results, "gpu": GPU, "machine": {"cores": 16, "processor": "a processor"}, "bars": []}
    document |= {"versions": {"cupy": "14.2.0", "torch": "2.11"}, **more}
    (folder / f"{name}.json").write_text(json.dumps(document))
    (folder / f"{name}.md").write_text(f"# {name}\n\n2026-11-21: `run {name}`\n\n```\nthe table of {name}\n```\n")


def exchanges(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    return [
        {"bytes": n, "operation": name, "mode": mode, "median_seconds": 1e-12 * n * (1 + k)}
        for n in sizes
        for k, name in enumerate(("local kernel", "exchange, ipc", "exchange, staged"))
        for mode in ("one rank", "all ranks")
    ]


def everything(folder: Path) -> None:
    rates = {"mpitrain": 4000.0, "torch": 1500.0, "cupy": 1400.0}
    kernels = [
        {"kernel": kernel, "bytes": n, "gb_per_s": rates, "limit_gb_per_s": 4200.0}
        for kernel in ("elastic_exchange", "sgd_step", "a", "b", "c")
        for n in (M, 64 * M)
    ]
    bars = [{"bar": "a bar", "ratio": 0.95, "passed": True}, {"bar": "another bar", "ratio": 2.0, "passed": False}]
    keep(folder, "gpu-kernels", kernels, bars=bars)
    keep(folder, "gpu-exchange-2", exchanges((M, 256 * M)), world={"ranks": 2, "mpi": "Open MPI 5.0"})
    keep(folder, "gpu-exchange-8", exchanges((256 * M,)), world={"ranks": 8, "mpi": "Open MPI 5.0"})
    steps = [
        {"model": model, "step": step, "median_seconds": 0.01, "of_alone": 1.02}
        for model in ("resnet20", "gpt")
        for step in ("alone", "easgd, tau 10")
    ]
    keep(folder, "gpu-training", steps, world={"ranks": 2, "mpi": "Open MPI 5.0"})


def test_the_page_has_every_part_and_its_plot(page: ModuleType, tmp_path: Path) -> None:
    everything(tmp_path)
    written = page.write(tmp_path).read_text()
    assert "1 of 2 passed" in written
    assert "**MISSED**" in written
    assert "- GPU: NVIDIA H200, 139.8 GiB" in written
    assert "cupy 14.2.0" in written
    assert "measured: 2026-11-21" in written
    for name in ("gpu-kernels", "gpu-exchange", "gpu-training"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in written
    places = [written.index(f"the table of {name}") for name in ("gpu-kernels", "gpu-exchange-2", "gpu-exchange-8")]
    assert places == sorted(places)


def test_what_was_not_measured_is_left_out(page: ModuleType, tmp_path: Path) -> None:
    everything(tmp_path)
    page.write(tmp_path)
    for path in tmp_path.glob("gpu-exchange-*"):
        path.unlink()
    written = page.write(tmp_path).read_text()
    assert "## Exchange" not in written
    assert not (tmp_path / "gpu-exchange.png").exists()


def test_the_page_of_hosts_is_without_gpus(page: ModuleType, tmp_path: Path) -> None:
    everything(tmp_path)
    keep(tmp_path, "compare-x", [])
    of_hosts = importlib.import_module("benchmarks.pages.bench")
    assert [result.name for result in of_hosts.load(tmp_path)] == ["compare-x"]
    assert len(of_hosts.load(tmp_path, on_gpu=True)) == 4
