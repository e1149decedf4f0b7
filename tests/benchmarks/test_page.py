"""The page of all results: what is read, in which order, what the table of bars says, and which plots are drawn."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

K, M = 2**10, 2**20
COLLECTIVES = ("local pass", "exchange", "Get/Put, Allocate", "Get/Put, Create", "all-reduce", "MPI_Allreduce", "gloo")
FORMS = ("tree reduce + broadcast", "MPI_Reduce + Bcast", "gossip", "MPI_Sendrecv + NumPy")
MPI_NAMES = {"openmpi": "Open MPI 5.0", "mpich": "MPICH 5.0"}


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("benchmarks.pages.bench")


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("benchmarks.pages.plots")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("benchmarks.pages.results")


def document(results: Any, mpi: str = "openmpi", ranks: int = 2, **more: Any) -> dict[str, Any]:
    machine = {"cores": 2, "processor": "a processor"}
    versions = {"mpitrain": "0.1", "torch": "2.13"}
    return {
        "results": results,
        "world": {"mpi": MPI_NAMES[mpi], "ranks": ranks},
        "machine": machine,
        "versions": versions,
    } | more


def keep(folder: Path, name: str, kept: dict[str, Any], *, markdown: bool = True) -> None:
    (folder / f"{name}.json").write_text(json.dumps(kept))
    if markdown:
        (folder / f"{name}.md").write_text(f"# {name}\n\n2026-11-21: `run {name}`\n\n```\nthe table of {name}\n```\n")


def rows(operations: tuple[str, ...], sizes: tuple[int, ...] = (4 * K, 4 * M)) -> list[dict[str, Any]]:
    return [
        {"bytes": n, "operation": name, "median_seconds": 1e-9 * n * (1 + k)}
        for n in sizes
        for k, name in enumerate(operations)
    ]


def everything(folder: Path) -> None:
    """A result of each benchmark, of both MPIs where both are measured."""
    moves = tuple(f"{move}, {kind}" for kind in ("Allocate", "Create") for move in ("put", "get", "accumulate"))
    kernel = {f"{kind}_gb_per_s": 10.0 for kind in ("mpitrain", "limit", "numpy", "torch")}
    keep(
        folder,
        "kernels",
        {"results": [{"kernel": name, **kernel} for name in "abc"], "hardware": {"cpu": "x", "cores": 2}},
    )
    for mpi in MPI_NAMES:
        keep(folder, f"collectives-{mpi}", document(rows((*COLLECTIVES, *FORMS)), mpi))
        windows = {"transfers": rows(("local copy", "local sum", *moves)), "exchanges": rows(COLLECTIVES[:4])}
        keep(folder, f"windows-{mpi}", document(windows, mpi))
        steps = [{"model": "mlp", "step": s, "median_seconds": 0.02, "of_alone": 1.0} for s in ("alone", "allreduce")]
        keep(folder, f"steps-{mpi}", document(steps, mpi))
    keep(folder, "collectives-mpich-8", document(rows((*COLLECTIVES, *FORMS)), "mpich", 8))
    keep(folder, "stragglers-openmpi", document([{"method": "easgd", "retained_fraction": 0.98}], factor=4.0))
    row = {"seconds_to_target": None, "gradients_per_second": 2000.0, "bytes_per_gradient": 1e5}
    keep(folder, "compare", document([], rows=[{"algorithm": "easgd", **row}], target_accuracy=0.95))


def test_results_come_benchmark_by_benchmark(kept: ModuleType, tmp_path: Path) -> None:
    for name in (
        "steps-openmpi",
        "collectives-mpich-4",
        "collectives-mpich",
        "collectives-openmpi",
        "kernels",
        "other",
    ):
        mpi = "mpich" if "mpich" in name else "openmpi"
        keep(tmp_path, name, document([], mpi, 4 if name.endswith("-4") else 2))
    names = [result.name for result in kept.load(tmp_path)]
    collectives = ["collectives-openmpi", "collectives-mpich", "collectives-mpich-4"]
    assert names == ["kernels", *collectives, "steps-openmpi", "other"]


@pytest.mark.parametrize(
    ("name", "mpi", "told"),
    [
        ("collectives-mpich-4", "openmpi", "mpich"),  # the name is what record.py was told
        ("compare", "mpich", "mpich"),
        ("compare", "openmpi", "openmpi"),
    ],
)
def test_the_mpi_of_a_result(kept: ModuleType, name: str, mpi: str, told: str) -> None:
    assert kept.Result(name, document([], mpi), "").mpi == told


def test_kernels_need_no_mpi(kept: ModuleType) -> None:
    result = kept.Result("kernels", {"results": []}, "")
    assert (result.mpi, result.ranks, result.benchmark) == (None, None, "kernels")


@pytest.mark.parametrize(
    ("bar", "told"),
    [
        ({"ratio": 1.04567}, "1.046"),
        ({"seconds": 3.4567}, "3.46 s"),
        ({"text": "91 %", "value": 0.91}, "91 %"),
        ({}, "-"),
    ],
)
def test_figures_of_bars(page: ModuleType, bar: dict[str, Any], told: str) -> None:
    assert page.figure_of(bar) == told


def test_every_bar_has_its_line(page: ModuleType, kept: ModuleType, tmp_path: Path) -> None:
    bars = [{"bar": "fast", "ratio": 2.0, "passed": True}, {"bar": "faster", "ratio": 1.0, "passed": False}]
    keep(tmp_path, "collectives-mpich", document([], "mpich", bars=bars))
    keep(tmp_path, "kernels", {"results": [], "bars": [{"bar": "near", "ratio": 0.95, "passed": True}]})
    _, _, *lines = page.table_of_bars(kept.load(tmp_path))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["kernels", "-", "near", "0.950", "PASS"],
        ["collectives-mpich", "MPICH", "fast", "2.000", "PASS"],
        ["collectives-mpich", "MPICH", "faster", "1.000", "**MISSED**"],
    ]


def test_the_page_has_every_table_and_plot(page: ModuleType, kept: ModuleType, tmp_path: Path) -> None:
    everything(tmp_path)
    written = page.write(tmp_path)
    text = written.read_text()
    for result in kept.load(tmp_path):
        assert f"### {result.name}\n" in text
        assert f"the table of {result.name}\n" in text
    assert "- measured: 2026-11-21\n" in text
    assert "- MPI: Open MPI 5.0, MPICH 5.0\n" in text
    for name in page.PLOTS:
        assert f"]({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_what_was_not_measured_is_not_drawn(page: ModuleType, tmp_path: Path) -> None:
    keep(tmp_path, "collectives-mpich-8", document(rows(COLLECTIVES), "mpich", 8), markdown=False)
    (tmp_path / "bench-steps.png").write_bytes(b"of an earlier run")
    text = page.write(tmp_path).read_text()
    assert "](" not in text
    assert [path.name for path in tmp_path.glob("*.png")] == []
    assert "0 of 0 passed" in text


def ranks_drawn(figure: Any) -> list[list[float]]:
    """The numbers of ranks at which each line of the first panel has a point."""
    return [list(line.get_xdata()) for line in figure.axes[0].lines]


def test_the_plots_over_ranks_have_every_number_of_them(kept: ModuleType, plots: ModuleType) -> None:
    def measured(ranks: int, operations: tuple[str, ...], sizes: tuple[int, ...] = (4 * K, 4 * M)) -> Any:
        return kept.Result(f"collectives-mpich-{ranks}", document(rows(operations, sizes), "mpich", ranks), "")

    without_gloo = (*COLLECTIVES[:-1], *FORMS)
    results = [
        measured(2, (*COLLECTIVES, *FORMS), (K, 4 * K, 4 * M)),
        measured(4, (*COLLECTIVES, *FORMS)),
        measured(8, without_gloo),
    ]
    figure = plots.draw_ranks(results)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["vectors of 4 KiB", "vectors of 4 MiB"]
    assert ranks_drawn(figure) == [[2, 4, 8], [2, 4, 8], [2, 4], *3 * [[2, 4, 8]]]  # the third is gloo
    assert ranks_drawn(plots.draw_ranks(results, plots.FORMS)) == 4 * [[2, 4, 8]]
    two_and_eight = [measured(2, COLLECTIVES), *results[1:]]
    assert ranks_drawn(plots.draw_ranks(two_and_eight, plots.FORMS)) == 4 * [[4, 8]]
    assert plots.draw_ranks([measured(2, COLLECTIVES), results[2]], plots.FORMS) is None


def test_sets_of_operations_that_were_not_measured_have_no_column(kept: ModuleType, plots: ModuleType) -> None:
    def columns(operations: tuple[str, ...]) -> list[str]:
        result = kept.Result("collectives-openmpi", document(rows(operations)), "")
        figure = plots.draw_collectives([result])
        return [axes.get_title(loc="left") for axes in figure.axes[: len(figure.axes) // 2]]

    assert columns(COLLECTIVES) == ["All-reduce", "Exchange with the center"]
    assert columns((*COLLECTIVES, *FORMS)) == ["All-reduce", "Exchange with the center", "Tree and gossip"]


@pytest.mark.parametrize(("n_bytes", "name"), [(8, "8"), (1024, "1K"), (4 * M, "4M"), (2**30, "1G")])
def test_short_sizes(plots: ModuleType, n_bytes: int, name: str) -> None:
    assert plots.short(n_bytes) == name


def test_points_rise_with_the_size(kept: ModuleType, plots: ModuleType) -> None:
    measured = rows(("ours", "theirs"), (4 * M, 4 * K))
    assert plots.sized(kept.Result("x", {}, ""), measured, "theirs")[0] == [4 * K, 4 * M]
