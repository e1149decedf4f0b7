"""The HTML page: the numbers in its plots, names that are no HTML, no other file; and that a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from report.test_plots import make_run

from mpitrain.cli.main import main
from mpitrain.report import page, summarise
from mpitrain.report.style import series_of

EVIL = "<script>document.title='evil'</script>%{x}&amp;"


def written(tmp_path: Path, runs: list) -> str:
    path = tmp_path / "report.html"
    page.write_page(runs, {"runs": [summarise(run) for run in runs]}, path)
    return path.read_text()


def without_library(text: str) -> str:
    """Return the page without the source of plotly."""
    return text.replace(page.get_plotlyjs(), "")


def figures_of(text: str) -> list[list[dict]]:
    """Return the traces of each plot of the page, as the browser reads them."""
    decoder = json.JSONDecoder()
    starts = [found.end() for found in re.finditer(r"Plotly\.newPlot\(\s*\"[\w-]+\",\s*", without_library(text))]
    return [decoder.raw_decode(without_library(text), start)[0] for start in starts]


def test_the_plots_have_the_columns_of_the_run(tmp_path: Path) -> None:
    run = make_run()
    curves, shares, staleness, consensus = figures_of(written(tmp_path, [run]))
    progress, evaluation = run.metrics["progress"], run.metrics["evaluation"]
    for trace, (table, y) in zip(
        curves, ((progress, "loss"), (evaluation, "test_loss"), (evaluation, "test_accuracy")), strict=True
    ):
        np.testing.assert_array_equal(trace["x"], table["gradients"])
        np.testing.assert_array_equal(trace["y"], table[y])
    assert {trace["name"]: trace["x"] for trace in shares} == {"compute": [0.7], "exchange": [0.125], "waiting": [0.1]}
    np.testing.assert_allclose(staleness[0]["y"], [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_array_equal(consensus[0]["y"], progress["consensus_distance"])


def test_the_menu_changes_the_axis_of_every_line() -> None:
    run = make_run()
    figure = page._curves(series_of([run, make_run(1, label="other")]))
    (menu,) = figure.layout.updatemenus
    assert [button.label for button in menu.buttons] == ["gradients, all ranks", "time (s)", "bytes sent, all ranks"]
    values, _ = menu.buttons[1].args
    assert len(values["x"]) == len(figure.data) == 6
    np.testing.assert_array_equal(values["x"][0], run.metrics["progress"]["seconds"])
    np.testing.assert_array_equal(values["y"][0], run.metrics["progress"]["loss"])


def test_a_name_is_text_and_never_html(tmp_path: Path) -> None:
    run = make_run(label=EVIL)
    run.config.update(algorithm=EVIL, config={"data": EVIL, "model": EVIL})
    text = without_library(written(tmp_path, [run]))
    assert "<script>document" not in text
    assert "&lt;script&gt;document.title=&#x27;evil&#x27;&lt;/script&gt;%{x}&amp;amp;" in text


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    text = without_library(written(tmp_path, [make_run()]))
    assert not re.findall(r"(?:src|href)\s*=", text)
    assert "http" not in re.sub(r'"https?://[^"]*"', "", text)  # plotly's own settings name its site


def test_runs_without_metrics_have_a_table_only(tmp_path: Path) -> None:
    run = make_run(n=0)
    run.metrics.clear()
    run.result.clear()
    text = written(tmp_path, [run])
    assert figures_of(text) == []
    assert "<table>" in text


def test_a_missing_plotly_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(page, "go", None)
    (tmp_path / "config.json").write_text("{}")
    assert main(["report", str(tmp_path), "--html"]) == 2
    assert "pip install 'mpitrain[html]'" in capsys.readouterr().err


def test_the_command_names_the_page(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["report", str(tmp_path), "--html"]) == 0
    assert f"wrote {tmp_path / 'report.html'}" in capsys.readouterr().out
    assert main(["report", str(tmp_path), "--html", "--scaling"]) == 2


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 500])  # no window of Chromium is narrower
def test_a_browser_draws_every_plot_within_the_window(tmp_path: Path, width: int) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium is not None, "Chromium is not installed: leave out --also browser"
    written(tmp_path, [make_run(), make_run(1, label=EVIL)])
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    finished = subprocess.run(
        [
            chromium,
            *options,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},2000",
            "--virtual-time-budget=10000",
            "--dump-dom",
            f"file://{tmp_path / 'report.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=400,
        check=True,
    )
    dom = finished.stdout
    assert "<title>2 runs</title>" in dom
    assert dom.count('class="main-svg"') >= 4
    assert dom.count('class="trace scatter') >= 8  # 2 runs in 3 panels, and their distances
    widths = [float(found) for found in re.findall(r'class="main-svg"[^>]* width="([\d.]+)"', dom)]
    assert widths
    assert max(widths) <= width
