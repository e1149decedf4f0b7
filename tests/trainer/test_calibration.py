"""Fits of the simulator to a run whose constants are known."""

import json
import os
import socket

import numpy as np
import pytest
from support.quadratic import simulate

from mpitrain.algorithms import AllReduceSGD
from mpitrain.cli.main import main
from mpitrain.errors import UsageError
from mpitrain.records.metrics import MetricsWriter
from mpitrain.simulation.compute import ComputeTime
from mpitrain.simulation.network import Network
from mpitrain.simulation.network_time import NetworkTime
from mpitrain.trainer.calibration import calibrated, measured, simulated, simulated_staleness, total_variation
from mpitrain.trainer.metrics import tables


def write_run(folder, *, ranks_of_node=(4,), algorithm="downpour", histogram=None, host=None, **facts):
    """A run with 1000 steps and exchanges of each rank and a model of 1000 parameters.

    The facts are the seconds of the run, the shares of their time, the CPU time of an undisturbed gradient, and for all
    ranks or each rank, the CPU time of an undisturbed exchange and that of serving, and the bytes that crossed
    the network.
    """
    p = sum(ranks_of_node)
    seconds, shares = facts.get("seconds", 20.0), facts.get("shares", (0.6, 0.3, 0.1))
    of_ranks = {
        "exchanges": 1000,
        "bytes": 8e6,
        "wire_bytes": facts.get("wire_bytes", 0 if len(ranks_of_node) == 1 else 8e6),
        "exchange_cpu": facts.get("exchange_cpu", 3e-3),
        "serving_cpu": facts.get("serving_cpu", 0.0),
        "gradient_cpu": facts.get("gradient_cpu", 6e-3),
    }
    folder.mkdir()
    with MetricsWriter(folder / "metrics.h5", tables(p, ())) as metrics:
        metrics.append("progress", exchanges=1000 * p)
        metrics.append("progress", seconds=seconds)  # as at an evaluation: the other columns are NaN
        metrics.append("staleness", seconds=seconds, histogram=np.zeros(33) if histogram is None else histogram)
    document = {
        "algorithm": algorithm,
        "settings": {"period": 1, "push_period": None, "fetch_period": None} if algorithm == "downpour" else {},
        "seconds": seconds,
        "steps_of_ranks": [1000] * p,
        "parameters": 1000,
        "of_ranks": {name: np.broadcast_to(values, p).tolist() for name, values in of_ranks.items()},
        "shares": dict(zip(("compute", "exchange", "waiting"), shares, strict=True)),
        "world": {"ranks_of_node": list(ranks_of_node), "hosts": [host or socket.gethostname()]},
    }
    (folder / "result.json").write_text(json.dumps(document))
    return folder


def test_gradients_take_the_computing_share_of_a_step_or_their_cpu_time_on_shared_cores(tmp_path):
    run = write_run(tmp_path / "run")
    assert calibrated(run, 8)["step_seconds"] == pytest.approx(0.02 * 0.6)
    shared = calibrated(run, 2)
    assert shared["step_seconds"] == 6e-3
    assert shared["node_bandwidth"] == pytest.approx(4 * 1000 / 3e-3)
    assert calibrated(run)["cores"] == len(os.sched_getaffinity(0))


def test_exchanges_without_waiting_give_the_bandwidth_of_the_memory_or_of_the_network(tmp_path):
    alone, apart = write_run(tmp_path / "alone"), write_run(tmp_path / "apart", ranks_of_node=(2, 2))
    assert calibrated(alone, 8)["node_bandwidth"] == pytest.approx(4 * 1000 / (0.02 * 0.3))
    assert "bandwidth" not in calibrated(alone, 8)
    assert calibrated(apart, 8)["bandwidth"] == pytest.approx(8 * 1000 / (0.02 * 0.3))  # there and back
    assert calibrated(apart, 8)["workers_per_node"] == 2
    assert measured(apart).nodes == (0, 0, 1, 1)
    summed = write_run(tmp_path / "summed", ranks_of_node=(2, 2), algorithm="allreduce")
    assert calibrated(summed, 8)["bandwidth"] == pytest.approx(4 * 1000 / (0.02 * 0.3))


def test_ranks_near_and_far_from_the_center_tell_memory_from_network(tmp_path):
    facts = {
        "wire_bytes": [0, 0, 8e6, 8e6],
        "exchange_cpu": [1e-3, 1e-3, 5e-3, 5e-3],
        "serving_cpu": [2.0, 1.0, 0.5, 0.5],
    }
    found = calibrated(write_run(tmp_path / "run", ranks_of_node=(2, 2), **facts), 1)
    assert found["node_bandwidth"] == pytest.approx(4 * 1000 / 1e-3)
    assert found["bandwidth"] == pytest.approx(8 * 1000 / 5e-3)
    assert found["service"] == pytest.approx(4 / 2000 / 4)  # of 2000 visits, two requests each, at both ends


def test_a_simulation_of_the_run_takes_as_long_as_the_run(tmp_path):
    facts = {"wire_bytes": [0, 0, 8e6, 8e6], "exchange_cpu": [3e-4, 3e-4, 1e-3, 1e-3], "serving_cpu": 0.2}
    for seconds in (20.0, 24.0):
        run = write_run(tmp_path / str(seconds), ranks_of_node=(2, 2), seconds=seconds, **facts)
        found = calibrated(run, 1)
        again, _ = simulated(measured(run), {"time_slice": 3e-3, "jitter": 0.0, **found})
        assert again == pytest.approx(seconds / 1000, rel=0.03)
    assert "sharing" not in calibrated(run, 2)
    fast = write_run(tmp_path / "fast", ranks_of_node=(2, 2), seconds=5.0, **facts)
    assert calibrated(fast, 1)["sharing"] == 0


@pytest.mark.parametrize(("slice_seconds", "jitter", "other"), [(4e-4, 0.3, 1e-2), (1e-2, 0.1, 4e-4)])
def test_time_slice_and_jitter_reproduce_the_staleness(tmp_path, slice_seconds, jitter, other):
    facts = {"seconds": 1.0, "gradient_cpu": 4e-4, "exchange_cpu": 5e-5}
    truth = measured(write_run(tmp_path / "truth", **facts))
    cluster = calibrated(tmp_path / "truth", 2)
    histogram = simulated_staleness(truth, cluster, slice_seconds, jitter)
    found = calibrated(write_run(tmp_path / "run", histogram=1000 * histogram, **facts), 2)
    again = simulated_staleness(truth, found, found["time_slice"], found["jitter"])
    assert total_variation(histogram, again) < 0.15
    assert total_variation(histogram, simulated_staleness(truth, cluster, other, jitter)) > 0.15


def test_a_run_without_staleness_leaves_slice_and_jitter_as_they_are(tmp_path):
    assert {"time_slice", "jitter"}.isdisjoint(calibrated(write_run(tmp_path / "run"), 2))


def test_idle_cores_of_a_synchronous_method_are_waiting_for_its_ranks_to_wake_up(tmp_path):
    run = write_run(tmp_path / "run", algorithm="allreduce", gradient_cpu=5e-3)  # 2*(5 + 3) of 20 ms
    found = calibrated(run, 2)
    assert found["wake_up"] == pytest.approx(0.004)
    network = Network(node_bandwidth=found["node_bandwidth"])
    clock = NetworkTime(
        ComputeTime([found["step_seconds"]] * 4), network, [0] * 4, cores=2, slice_seconds=1.0, wake_up=found["wake_up"]
    )
    simulation = simulate(AllReduceSGD(), 4, start=np.ones(500), eta=0.1, schedule=clock)  # 8 bytes an element
    simulation.run(10)
    np.testing.assert_allclose(clock.clocks, 10 * 0.02, rtol=1e-3)


def test_ranks_with_cores_of_their_own_and_asynchronous_ones_do_not_wait_to_wake_up(tmp_path):
    assert "wake_up" not in calibrated(write_run(tmp_path / "alone", algorithm="allreduce"), 4)
    assert "wake_up" not in calibrated(write_run(tmp_path / "free"), 2)


def test_cores_of_another_machine_must_be_given(tmp_path):
    run = write_run(tmp_path / "run", host="elsewhere")
    with pytest.raises(UsageError, match="on another machine, so give the --cores"):
        calibrated(run)
    assert calibrated(run, 4)["cores"] == 4


@pytest.mark.parametrize(
    ("one", "other", "distance"), [([1, 0], [1, 0], 0), ([1, 0], [0, 1], 1), ([1, 0], [0.5, 0.5], 0.5)]
)
def test_total_variation(one, other, distance):
    assert total_variation(one, other) == distance


def test_a_simulation_takes_the_fitted_options_that_are_not_given(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    words = ["simulate", "--algorithm", "allreduce", "--workers", "1", "--gradients", "5", "--json", "--cores", "8"]
    for more, seconds in (([], 0.012), (["--step-seconds", "0.5"], 0.5)):
        assert main([*words, "--calibrate", str(run), *more]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["seconds"] == pytest.approx(5 * seconds)


@pytest.mark.parametrize("name", ["result.json", "metrics.h5"])
def test_an_unfinished_run_is_refused_in_one_line(tmp_path, capsys, name):
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    assert main(["simulate", "--calibrate", str(run), "--cores", "2"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
