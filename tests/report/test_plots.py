"""Plots: the lines, bars, ticks and labels that are drawn, against the numbers of the runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from mpitrain.report import Run, curves, plots, style

STEPS = np.arange(1.0, 101)


def make_run(seed: int = 0, *, label: str = "run", group: str | None = None, n: int = 100, seconds: float = 0.5) -> Run:
    """Return a run of 4 ranks with n steps and an evaluation after every 20."""
    rng = np.random.default_rng(seed)
    step = STEPS[:n]
    counters = {"seconds": seconds * step, "gradients": 4 * step, "bytes": 8000 * step}
    progress = {
        **counters,
        "loss": np.exp(-step / 30 + 0.2 * rng.normal(size=n)),
        "consensus_distance": rng.uniform(1, 2, n),
        "elastic_energy": rng.uniform(5, 6, n),
    }
    evaluation = {name: column[19::20] for name, column in counters.items()}
    evaluation["test_loss"] = rng.uniform(0.2, 0.4, n // 20)
    evaluation["test_accuracy"] = rng.uniform(0.5, 0.9, n // 20)
    histogram, distance = np.zeros((2, 33)), np.zeros((2, 33))
    histogram[-1, :4], distance[-1, [0, 20, 22]] = [10, 20, 30, 40 + seed], [1, 2, 1]
    staleness = {"seconds": np.array([1.0, 2]), "histogram": histogram, "distance": distance}
    method = {"seconds": counters["seconds"], "leader": rng.integers(4, size=(n, 4)).astype(float)}
    tables = {"progress": progress, "evaluation": evaluation, "staleness": staleness, "method": method}
    return Run(label, group or label, tables, result={"shares": {"compute": 0.7, "exchange": 0.125, "waiting": 0.1}})


@pytest.fixture
def figure_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Return a function that draws a plot of runs and returns its figure."""
    figures: list[Figure] = []

    def make(*arguments, **options) -> Figure:
        figures.append(Figure(*arguments, **options))
        return figures[-1]

    for module in (curves, plots):
        monkeypatch.setattr(module, "Figure", make)

    def draw(name: str, runs: list[Run]) -> Figure:
        assert plots.DRAWINGS[name](runs, tmp_path / name)
        return figures[-1]

    return draw


def grid_of(figure: Figure, n_columns: int) -> list[list[Axes]]:
    return [list(figure.axes[k : k + n_columns]) for k in range(0, len(figure.axes), n_columns)]


def lines_of(axes: Axes) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


def running_median(y: np.ndarray, half: int) -> list[float]:
    return [float(np.median(y[max(0, k - half) : k + half + 1])) for k in range(len(y))]


def test_curves_of_several_runs_are_their_columns(figure_of) -> None:
    run = make_run()
    rows = grid_of(figure_of("curves.png", [run, make_run(1, label="other")]), 3)
    assert [row[0].get_ylabel() for row in rows] == ["training loss", "test loss", "test accuracy"]
    labels = ["time (s)", "gradients, all ranks", "sent, all ranks (kB)"]
    assert [axes.get_xlabel() for axes in rows[-1]] == labels
    for k, x in enumerate(("seconds", "gradients", "bytes")):
        progress, evaluation = run.metrics["progress"], run.metrics["evaluation"]
        raw, smooth, *_ = lines_of(rows[0][k])
        assert raw == (progress[x].tolist(), progress["loss"].tolist())
        assert smooth == (progress[x].tolist(), running_median(progress["loss"], 2))  # a twentieth of 100 rows
        assert lines_of(rows[1][k])[0] == (evaluation[x].tolist(), evaluation["test_loss"].tolist())
        assert lines_of(rows[2][k])[0] == (evaluation[x].tolist(), evaluation["test_accuracy"].tolist())


def test_a_single_run_has_its_losses_in_one_panel_and_its_accuracy_in_another(figure_of) -> None:
    run = make_run()
    loss, accuracy = figure_of("curves.png", [run]).axes
    progress, evaluation = run.metrics["progress"], run.metrics["evaluation"]
    gradients = evaluation["gradients"].tolist()
    raw, smooth, test = lines_of(loss)
    assert raw == (progress["gradients"].tolist(), progress["loss"].tolist())
    assert smooth == (progress["gradients"].tolist(), running_median(progress["loss"], 2))
    assert test == (gradients, evaluation["test_loss"].tolist())
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training loss", "test loss"]
    assert lines_of(accuracy) == [(gradients, evaluation["test_accuracy"].tolist())]
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss", "test accuracy")
    assert loss.get_xlabel() == accuracy.get_xlabel() == "gradients, all ranks"


def test_the_time_of_a_single_run_is_above_its_gradients(figure_of) -> None:
    run = make_run()
    uneven = np.where(STEPS <= 50, STEPS, 50 + 3 * (STEPS - 50)) / 2  # three times as slow in the second half
    run.metrics["progress"]["seconds"] = uneven
    figure = figure_of("curves.png", [run])
    figure.canvas.draw()
    (above,) = figure.axes[0].child_axes
    assert above.get_xlabel() == "time (s)"
    bottom = figure.axes[0].transData
    for seconds, gradients in ((12.5, 100), (25, 200), (55, 280), (100, 400)):
        x = above.transData.transform((seconds, 0))[0]
        assert bottom.inverted().transform((x, 0))[0] == pytest.approx(gradients, abs=0.01)


def test_the_losses_of_a_figure_have_one_kind_of_scale(figure_of) -> None:
    """The training losses vary by more than a factor of 5, the test losses by less than 2."""
    rows = grid_of(figure_of("curves.png", [make_run(), make_run(1, label="other")]), 3)
    assert [row[0].get_yscale() for row in rows] == ["log", "log", "linear"]
    run = make_run()
    run.metrics["progress"]["elastic_energy"] = np.geomspace(100, 1, 100)
    assert [axes.get_yscale() for axes in figure_of("consensus.png", [run]).axes] == ["log", "log"]


@pytest.mark.parametrize(
    ("facts", "title"),
    [
        ([("easgd", "digits", "mlp", 4)], "easgd on digits, mlp, 4 ranks"),
        ([("easgd", "/home/a/x.h5", "mlp", 1)], "easgd on x.h5, mlp, 1 rank"),
        ([("easgd", "digits", "mlp", 4), ("gossip", "digits", "mlp", 4)], "2 runs on digits, mlp, 4 ranks"),
        ([("easgd", "digits", "mlp", 4), ("easgd", "digits", "mlp", 8)], "easgd on digits, mlp"),
        ([("easgd", "digits", "mlp", 4), ("gossip", "x.h5", "cnn7", 8)], "2 runs"),
    ],
)
def test_the_title_says_what_the_runs_have_in_common(facts, title) -> None:
    runs = [
        Run(str(k), str(k), {}, {"ranks": ranks}, {"algorithm": name, "config": {"data": data, "model": model}})
        for k, (name, data, model, ranks) in enumerate(facts)
    ]
    assert style.title_of(runs) == title


def test_every_plot_has_the_title(figure_of) -> None:
    run = make_run()
    run.config.update(algorithm="easgd", ranks=4, config={"data": "digits", "model": "mlp"})
    for name in plots.DRAWINGS:
        assert figure_of(name, [run]).get_suptitle() == "easgd on digits, mlp, 4 ranks", name


def test_ticks_are_labelled_in_the_unit_of_the_axis(figure_of) -> None:
    figure = figure_of("curves.png", [make_run(seconds=30.0), make_run(1, label="b", seconds=30.0)])
    figure.canvas.draw()  # 3,000 s, 400 gradients, 800 kB
    time, gradients, sent = grid_of(figure, 3)[-1]
    assert time.get_xlabel() == "time (min)"
    for axes, factor in ((time, 60), (gradients, 1), (sent, 1000)):
        ticks = axes.get_xticks()
        assert len(ticks) >= 3
        assert [label.get_text() for label in axes.get_xticklabels()] == [f"{tick / factor:g}" for tick in ticks]
        assert all(float(label.get_text()) % 1 == 0 for label in axes.get_xticklabels())  # whole minutes, not 50 s
        assert axes.get_xlim() == (0, {60: 3000, 1: 400, 1000: 800_000}[factor] * 1.02)
    accuracy = grid_of(figure, 3)[-1][0]
    percents = [label.get_text() for label in accuracy.get_yticklabels()]
    assert all(text.endswith("%") for text in percents)
    np.testing.assert_allclose([float(text[:-1]) for text in percents], 100 * accuracy.get_yticks(), atol=0.05)


@pytest.mark.parametrize(
    ("quantity", "end", "label", "factor"),
    [
        (style.SECONDS, 2.0, "time (s)", 1),
        (style.SECONDS, 179.0, "time (s)", 1),
        (style.SECONDS, 180.0, "time (min)", 60),
        (style.SECONDS, 10_799.0, "time (min)", 60),
        (style.SECONDS, 10_800.0, "time (h)", 3600),
        (style.GRADIENTS, 2_999.0, "gradients, all ranks", 1),
        (style.GRADIENTS, 3_000.0, "thousand gradients, all ranks", 1e3),
        (style.GRADIENTS, 3e6, "million gradients, all ranks", 1e6),
        (style.BYTES, 2_999.0, "sent, all ranks (bytes)", 1),
        (style.BYTES, 3e3, "sent, all ranks (kB)", 1e3),
        (style.BYTES, 3e6, "sent, all ranks (MB)", 1e6),
        (style.BYTES, 3e9, "sent, all ranks (GB)", 1e9),
        (style.BYTES, 3e12, "sent, all ranks (TB)", 1e12),
    ],
)
def test_the_unit_is_the_largest_of_which_there_are_three(quantity, end: float, label: str, factor: float) -> None:
    axes = Figure().subplots()
    style.scale_x(axes, quantity, [end / 2, end])
    assert axes.get_xlabel() == label
    assert axes.xaxis.get_major_formatter()(2.5 * factor) == "2.5"
    assert axes.get_xscale() == "linear"


def test_bytes_that_differ_by_a_factor_of_ten_have_a_logarithmic_axis() -> None:
    for ends, scale in (([1e6, 9e6], "linear"), ([1e6, 1e7], "log")):
        axes = Figure().subplots()
        style.scale_x(axes, style.BYTES, ends)
        assert axes.get_xscale() == scale
        assert axes.xaxis.get_major_formatter()(2e6) == "2"


def test_several_seeds_are_their_median_in_a_band_of_all(figure_of) -> None:
    runs = [make_run(seed, group="easgd", seconds=0.5 + 0.1 * seed) for seed in range(3)]
    (axes, *_), *_ = grid_of(figure_of("curves.png", runs), 3)[1:]
    (line,) = lines_of(axes)
    curves = [(run.metrics["evaluation"]["seconds"], run.metrics["evaluation"]["test_loss"]) for run in runs]
    grid = np.linspace(max(x[0] for x, _ in curves), np.median([x[-1] for x, _ in curves]), style.N_POINTS)
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    np.testing.assert_allclose(line, (grid, np.median(values, axis=0)), rtol=1e-12)
    (band,) = [c for c in axes.collections if isinstance(c, PolyCollection)]
    corners = band.get_paths()[0].vertices
    for edge in (values.min(axis=0), values.max(axis=0)):
        for point in zip(grid[::50], edge[::50]):
            assert np.isclose(corners, point, rtol=1e-12).all(axis=1).any()


def test_consensus_shows_distance_and_energy_against_gradients(figure_of) -> None:
    run = make_run()
    distance, energy = figure_of("consensus.png", [run]).axes
    progress = run.metrics["progress"]
    assert (distance.get_ylabel(), energy.get_ylabel()) == ("distance of the workers", "elastic energy")
    assert energy.get_xlabel() == "gradients, all ranks"
    for axes, name in ((distance, "consensus_distance"), (energy, "elastic_energy")):
        assert lines_of(axes) == [(progress["gradients"].tolist(), progress[name].tolist())]


def test_shares_are_stacked_bars_that_fill_the_whole(figure_of) -> None:
    mixed = Run("b", "b", {}, result={"shares": {"compute": 0.25, "exchange": 0.25, "waiting": 0.25}})
    (axes,) = figure_of("shares.png", [make_run(label="a"), mixed]).axes
    bars = [(round(bar.get_y() + bar.get_height() / 2), bar.get_x(), bar.get_width()) for bar in axes.patches]
    expected = [(0, 0.7), (0, 0.125), (0, 0.1), (0, 0.075), (1, 0.25), (1, 0.25), (1, 0.25), (1, 0.25)]
    assert [row for row, _, _ in bars] == [row for row, _ in expected]
    np.testing.assert_allclose([width for *_, width in bars], [share for _, share in expected], atol=1e-12)
    np.testing.assert_allclose([x for _, x, _ in bars], [0, 0.7, 0.825, 0.925, 0, 0.25, 0.5, 0.75], atol=1e-12)
    assert [text.get_text() for text in axes.texts] == ["70%", "12%", "10%", "8%", *["25%"] * 4]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_staleness_is_the_share_of_each_bin(figure_of) -> None:
    runs = [make_run(seed, group="easgd") for seed in range(2)]  # 10, 20, 30, 40 and 10, 20, 30, 41
    figure = figure_of("staleness.png", runs)
    figure.canvas.draw()
    updates, moves = figure.axes
    heights = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in updates.patches}
    assert {round(x): y for x, y in heights.items() if y} == pytest.approx(
        {0: 20 / 201, 1: 40 / 201, 2: 60 / 201, 3: 81 / 201}
    )
    assert updates.get_title(loc="left") == "easgd: median 2, 95 % at most 3"
    moved = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in moves.patches if bar.get_height()}
    assert moved == pytest.approx({18: 0.25, 20: 0.5, 22: 0.25})  # no move is drawn beside the smallest one
    assert moves.get_title(loc="left") == "median below 0.1"  # bin 20: distances from 2^-4 to 2^-3
    named = {label.get_text(): tick for tick, label in zip(moves.get_xticks(), moves.get_xticklabels())}
    assert named == {"0": 18, "0.06": 20, "0.2": 22}
    assert plots.bin_name(32) == "32+"


def test_metrics_of_the_method_are_a_line_for_each_worker(figure_of) -> None:
    run = make_run()
    (axes,) = figure_of("method.png", [run]).axes
    columns = run.metrics["method"]
    assert axes.get_title(loc="left") == "run: leader"
    assert axes.get_xlabel() == "seconds"
    assert lines_of(axes) == [(columns["seconds"].tolist(), columns["leader"][:, k].tolist()) for k in range(4)]
    assert [line.get_label() for line in axes.lines] == [f"worker {k}" for k in range(4)]


def test_an_accuracy_axis_leaves_out_the_initial_climb() -> None:
    axes = Figure().subplots()
    values = np.array([0.1, *np.linspace(0.88, 0.92, 19)])
    axes.plot(values)
    style.scale_y(axes, "test_accuracy", values)
    bottom, top = axes.get_ylim()
    assert 0.8 < bottom < 0.88
    assert 0.92 < top <= 1.005


@pytest.mark.parametrize(("largest", "scale"), [(4.0, "linear"), (60.0, "log")])
def test_values_over_a_factor_of_five_have_a_logarithmic_axis(largest: float, scale: str) -> None:
    axes = Figure().subplots()
    values = np.linspace(1, largest, 100)
    axes.plot(values)
    style.scale_y(axes, "loss", values)
    assert axes.get_yscale() == scale
