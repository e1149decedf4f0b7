"""Reports of finished, running and killed runs: files, tables and numbers."""

import argparse
import json
import os
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot

from mpitrain.cli import report
from mpitrain.errors import UsageError
from mpitrain.log import logger
from mpitrain.records.metrics import MetricsWriter
from mpitrain.report import Run, curves, load_run, load_runs, markdown, plots, style, summarise, temporal_efficiency

TABLES = {
    "progress": (
        *("seconds", "step", "gradients", "samples", "bytes", "loss", "learning_rate", "samples_per_second"),
        *("compute_share", "exchange_share", "waiting_share", "n_nonfinite", "consensus_distance", "elastic_energy"),
        *("exchanges", "lock_wait_seconds"),
    ),
    "evaluation": ("seconds", "step", "gradients", "bytes", "epoch", "test_loss", "test_accuracy"),
    "staleness": ("seconds", ("histogram", (33,)), ("distance", (33,))),
    "method": ("seconds", ("leader", (4,))),
}
RESULT = {
    "algorithm": "easgd",
    "settings": {"moving_rate": 0.225, "period": 5, "rho": None},
    "ranks": 4,
    "test_accuracy": 0.9,
    "test_loss": 0.3,
    "seconds": 50.0,
    "steps": 1000,
    "gradients": 4000,
    "bytes_sent": 8_000_000,
    "shares": {"compute": 0.7, "exchange": 0.2, "waiting": 0.1},
}


def make_run(folder: Path, *, result: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """Write a run of 4 ranks with 100 steps of 0.5 s, 2 kB sent per gradient, and 5 evaluations."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    with MetricsWriter(folder / "metrics.h5", TABLES) as metrics:
        for step in range(1, 101):
            loss = float(np.exp(-step / 30 + 0.2 * rng.normal()))
            counters = {"seconds": step / 2, "step": step, "gradients": 4 * step, "bytes": 8000 * step}
            shares = {"compute_share": 0.6, "exchange_share": 0.1, "waiting_share": 0.2 if step > 50 else 0.4}
            metrics.append("progress", **counters, **shares, loss=loss, consensus_distance=1 / step)
            metrics.append("progress", **counters, elastic_energy=2 / step, exchanges=4 * step, lock_wait_seconds=0.25)
            metrics.append("method", seconds=step / 2, leader=[step // 30] * 4)
            if step % 20 == 0:
                metrics.append("evaluation", **counters, test_loss=loss, test_accuracy=0.5 + 0.1 * np.sin(step))
                metrics.append(
                    "staleness", seconds=step / 2, histogram=step * (np.arange(33) < 4), distance=np.ones(33)
                )
    config = {"algorithm": "easgd", "settings": {"period": 10}, "config": {"data": "digits", "model": "mlp"}}
    (folder / "config.json").write_text(json.dumps(config))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def report_command(*words: object) -> int:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([str(word) for word in words]))


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


# ---- the command -------------------------------------------------------------------------------------------


def test_one_run_is_reported_into_its_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", result=RESULT)
    assert report_command(run, "--json") == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = ["curves.png", "shares.png", "staleness.png", "consensus.png", "method.png", "report.md"]
    assert document["files"] == [str(run / name) for name in names]
    assert all(min(png_size(run / name)) > 200 for name in names[:-1])
    text = (run / "report.md").read_text()
    assert all(f"]({name})" in text for name in names[:-1])
    cells = [cell.strip() for cell in text.splitlines()[4].split("|")]
    for cell in (
        "easgd",
        "digits",
        "mlp",
        "moving_rate=0.225, period=5",
        "90.00%",
        "50.0 s",
        "4,000",
        "80",
        "2 kB",
        "10.0%",
    ):
        assert cell in cells


def test_several_runs_are_compared_and_unfinished_ones_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / "a", result=RESULT), make_run(tmp_path / "b")]
    report_command(*runs, "--out", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "b (unfinished)" in text
    assert "b has no result" in text
    assert "a has no result" not in text
    assert "Temporal efficiency of a over b (test accuracy): 1.000. It is the ratio" in text  # the same evaluations
    assert text.splitlines()[2] in capsys.readouterr().out


def test_the_table_of_a_report_is_well_formed(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, result=RESULT if name == "a" else None) for name in "abc"]
    lines = markdown.table([summarise(run) for run in load_runs(runs)])
    assert len(lines) == 5
    assert {len(line) for line in lines} == {len(lines[0])}
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_runs_of_the_same_name_are_labelled_by_their_paths(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "run") for name in "ab"]
    assert [run.label for run in load_runs(runs)] == ["a/run", "b/run"]


def test_a_run_without_metrics_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"algorithm": "sgd"}')
    report_command(tmp_path, "--json")
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["files"] == [str(tmp_path / "report.md")]
    assert document["runs"][0]["algorithm"] == "sgd"
    assert document["runs"][0]["gradients"] is None


# ---- numbers -----------------------------------------------------------------------------------------------


def test_a_finished_run_is_summarised_by_its_result(tmp_path: Path) -> None:
    summary = summarise(load_run(make_run(tmp_path / "run", result=RESULT)))
    assert summary["finished"]
    assert summary["gradients_per_second"] == 4000 / 50
    assert summary["bytes_per_gradient"] == 2000
    assert summary["waiting_share"] == 0.1
    assert summary["best_test_accuracy"] == 0.9


def test_an_unfinished_run_is_summarised_by_its_metrics(tmp_path: Path) -> None:
    summary = summarise(load_run(make_run(tmp_path / "run")))
    accuracies = [0.5 + 0.1 * np.sin(step) for step in (20, 40, 60, 80, 100)]
    assert not summary["finished"]
    assert (summary["seconds"], summary["gradients"], summary["bytes_per_gradient"]) == (50, 400, 2000)
    assert summary["test_accuracy"] == accuracies[-1]
    assert summary["best_test_accuracy"] == max(accuracies)
    assert summary["waiting_share"] == pytest.approx(0.3)  # 25 s at 0.4, 25 s at 0.2


def test_a_curve_is_finite_and_sorted() -> None:
    columns = {"seconds": np.array([3.0, 1, np.nan, 2]), "loss": np.array([30.0, 10, 5, np.inf])}
    x, y = Run("a", "a", {"progress": columns}).curve("progress", "seconds", "loss")
    assert (x.tolist(), y.tolist()) == ([1, 3], [10, 30])


def test_temporal_efficiency_matches_closed_forms() -> None:
    rng = np.random.default_rng(3)

    def curve(n: int, end: float) -> tuple[np.ndarray, np.ndarray]:
        return np.sort(rng.uniform(0.1, end, n)), rng.uniform(0.1, 1, n)

    for n_a, n_b in [(1, 1), (1, 7), (5, 9), (40, 3)]:
        a, b = curve(n_a, 10), curve(n_b, 15)
        assert temporal_efficiency(a, a) == pytest.approx(1, abs=1e-12)
        assert temporal_efficiency(a, b) * temporal_efficiency(b, a) == pytest.approx(1, abs=1e-12)
        stretched = temporal_efficiency((7 * a[0], a[1]), (7 * b[0], b[1]))
        assert stretched == pytest.approx(temporal_efficiency(a, b), abs=1e-12)
    assert temporal_efficiency(([1, 9], [0.8, 0.8]), ([2, 5, 6], [0.5, 0.5, 0.5])) == pytest.approx(1.6, abs=1e-12)
    # By hand: m = 2; a is t/2 from 1/2 at 1 with f(0) = 1/2: area 1/2 + 3/4; b is 1: area 2.
    assert temporal_efficiency(([1, 3], [0.5, 1.5]), ([2], [1])) == pytest.approx(1.25 / 2, abs=1e-12)


def test_temporal_efficiency_is_undefined_for_some_curves() -> None:
    with pytest.raises(ValueError, match="at least one"):
        temporal_efficiency(([], []), ([1], [1]))
    with pytest.raises(ValueError, match="above 0"):
        temporal_efficiency(([1], [1]), ([1], [0]))


def test_the_running_median_removes_spikes_and_keeps_lines() -> None:
    x = np.arange(3000.0)
    y = np.where(x % 7 == 0, 1e9, x)
    a, b = curves.running_median(x, y)
    assert len(a) <= style.N_POINTS
    assert np.abs(b - a).max() < 3000 / 20
    assert all(len(curves.running_median(x[:n], x[:n])[0]) == n for n in range(4))


# ---- plots -------------------------------------------------------------------------------------------------


@pytest.fixture
def three_seeds(tmp_path: Path) -> list[Run]:
    return [replace(load_run(make_run(tmp_path / str(seed), seed=seed)), group="easgd") for seed in range(3)]


def test_seeds_of_one_method_are_one_line_in_a_band(three_seeds: list[Run], tmp_path: Path) -> None:
    (series,) = style.series_of(three_seeds)
    assert (series.label, len(series.runs)) == ("easgd", 3)
    for name, draw in plots.DRAWINGS.items():
        assert draw(three_seeds, tmp_path / name)
        png_size(tmp_path / name)


def test_methods_have_distinct_styles() -> None:
    series = style.series_of([Run(str(i), str(i), {}) for i in range(20)])
    assert len({(one.colour, one.dash) for one in series}) == 20


def test_plots_without_data_are_not_drawn(tmp_path: Path) -> None:
    sparse = Run("a", "a", {"progress": {"seconds": np.array([1.0]), "loss": np.array([np.nan])}})
    silent = Run("b", "b", {"progress": {k: np.array([1.0, 2]) for k in ("seconds", "gradients", "loss")}})
    for runs in ([], [sparse]):
        assert not any(draw(runs, tmp_path / name) for name, draw in plots.DRAWINGS.items())
    assert not list(tmp_path.iterdir())
    assert [name for name, draw in plots.DRAWINGS.items() if draw([sparse, silent], tmp_path / name)] == ["curves.png"]


def test_drawing_leaves_no_global_figures(three_seeds: list[Run], tmp_path: Path) -> None:
    curves.draw_curves(three_seeds, tmp_path / "curves.png")
    assert pyplot.get_fignums() == []


# ---- mistakes of users -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: run / "nowhere", "not a folder"),
        (lambda run: run / "metrics.h5", "not a folder"),
        (lambda run: run.parent, "holds no run"),
        (lambda run: (run / "metrics.h5").write_bytes(b"no HDF5") and run, "damaged"),
        (lambda run: (run / "result.json").write_text("{") and run, r"result\.json is damaged"),
        (lambda run: (run / "result.json").write_text("[]") and run, "JSON object"),
    ],
)
def test_a_mistake_is_reported_in_one_line(tmp_path: Path, spoil: Any, says: str) -> None:
    folder = spoil(make_run(tmp_path / "run"))
    with pytest.raises(UsageError, match=says) as caught:
        report_command(folder)
    assert "\n" not in str(caught.value)


def test_a_repeated_run_and_an_unusable_out_are_mistakes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(UsageError, match="twice"):
        report_command(run, run)
    with pytest.raises(UsageError, match="--out"):
        report_command(run, "--out", run / "config.json" / "out")


@pytest.fixture
def _fresh_matplotlib(monkeypatch):
    """Nothing of matplotlib is loaded, as in a process that has just finished a run."""
    ours = [f"mpitrain.report.{name}" for name in ("curves", "plots", "style")]
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib" or name in ours]:
        monkeypatch.delitem(sys.modules, name)
    for name in ours:
        monkeypatch.delattr(name, raising=False)


@pytest.mark.usefixtures("_fresh_matplotlib")
def test_the_backend_of_a_notebook_does_not_matter(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MPLBACKEND", "module://no_such_package.backend")
    folder = make_run(tmp_path / "run", result=RESULT)
    document = markdown.write_report([load_run(folder)], folder)
    assert str(folder / "curves.png") in document["files"]
    assert os.environ["MPLBACKEND"] == "module://no_such_package.backend"  # children of the user's own may need it
    assert not caplog.records


@pytest.mark.parametrize("name", ["c$5_{x$", "a\\b", "_hidden", "två", b"\xff\xfe".decode(errors="surrogateescape")])
def test_any_name_of_a_folder_is_drawn_as_it_is(tmp_path, name, caplog):
    folder = make_run(tmp_path / name, result=RESULT)
    document = markdown.write_report([load_run(folder)], folder)
    assert {Path(file).name for file in document["files"]} >= {"curves.png", "method.png", "shares.png", "report.md"}
    assert not caplog.records
    assert name.encode(errors="backslashreplace").decode() in (folder / "report.md").read_text("utf-8")


def test_a_plot_that_cannot_be_drawn_is_one_warning(tmp_path, monkeypatch, caplog):
    def fail(*_: Any) -> bool:
        raise RuntimeError("latex could\nnot be found")

    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setitem(plots.DRAWINGS, "shares.png", fail)
    folder = make_run(tmp_path / "run", result=RESULT)
    document = markdown.write_report([load_run(folder)], folder)
    assert [record.getMessage() for record in caplog.records] == [
        "shares.png is missing (latex could not be found); the result is not affected"
    ]
    assert "shares.png" not in (folder / "report.md").read_text()
    assert str(folder / "curves.png") in document["files"]
