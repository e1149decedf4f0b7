"""Forecasts of `mpitrain plan` against closed forms."""

import pytest

from mpitrain.algorithms import EASGD, AllReduceSGD, Downpour, GossipSGD, LocalSGD
from mpitrain.errors import UsageError
from mpitrain.simulation.network import Network
from mpitrain.trainer import forecast as module
from mpitrain.trainer.forecast import Forecast, forecast, forecasts, recommendation
from mpitrain.trainer.forecast_config import ForecastConfig

FREE = {"latency": 0.0, "bandwidth": float("inf"), "node_latency": 0.0, "node_bandwidth": float("inf"), "jitter": 0.0}
SMALL = {"samples": 3200, "batch_size": 32, "step_seconds": 0.25, "ranks": 4, "parameters": 1000}


@pytest.mark.parametrize("method", [AllReduceSGD(), EASGD(period=2), GossipSGD()], ids=lambda method: method.name)
def test_an_epoch_without_communication_is_its_gradients(method):
    found = forecast(method, ForecastConfig(**SMALL, **FREE))
    assert found.epoch_seconds == pytest.approx(100 * 0.25 / 4)
    assert found.communication_share == pytest.approx(0)


@pytest.mark.parametrize("parameters", [1000, 4096 * 50])
def test_a_step_of_allreduce_is_a_gradient_and_the_allreduce_of_the_whole_model(parameters):
    network = Network(latency=0.01, bandwidth=1e6)
    config = ForecastConfig(**{**SMALL, **FREE, "parameters": parameters, "latency": 0.01, "bandwidth": 1e6})
    found = forecast(AllReduceSGD(), config)
    step = 0.25 + network.allreduce(4 * parameters, range(4))
    assert found.epoch_seconds == pytest.approx(25 * step)
    assert found.communication_share == pytest.approx(1 - 0.25 / step)
    assert found.bytes_per_step == pytest.approx(2 * 3 / 4 * 4 * parameters, rel=1e-3)


def test_local_steps_divide_the_communication_by_the_period():
    config = ForecastConfig(**{**SMALL, **FREE, "latency": 0.01})
    every, seldom = (forecast(LocalSGD(period=period), config) for period in (1, 10))
    assert (every.epoch_seconds - 6.25) / (seldom.epoch_seconds - 6.25) == pytest.approx(10, rel=1e-6)


@pytest.mark.parametrize("method", [EASGD(period=1), GossipSGD(), Downpour()], ids=lambda method: method.name)
def test_a_shorter_vector_on_a_slower_network_takes_the_same_time(method, monkeypatch):
    config = ForecastConfig(**{**SMALL, "parameters": 4096 * 64, "latency": 0.001, "bandwidth": 1e7, "jitter": 0.1})
    found = forecast(method, config)
    monkeypatch.setattr(module, "ELEMENTS", 4096 * 64)
    assert found.epoch_seconds == pytest.approx(forecast(method, config).epoch_seconds, rel=0.03)


def test_a_straggler_delays_all_ranks_or_itself():
    config = ForecastConfig(**SMALL, **FREE, straggler=((1, 4.0),))
    assert forecast(AllReduceSGD(), config).epoch_seconds == pytest.approx(25 * 1.0)
    assert forecast(GossipSGD(), config).epoch_seconds == pytest.approx(100 * 0.25 / (3 + 1 / 4))


def test_methods_come_by_the_time_of_their_epoch_with_their_settings_and_warnings():
    config = ForecastConfig(
        **{**SMALL, "ranks": 64, "bandwidth": 1e6}, methods=("allreduce", "easgd", "downpour"), settings={"period": "4"}
    )
    found = forecasts(config)
    assert [one.epoch_seconds for one in found] == sorted(one.epoch_seconds for one in found)
    by_name = {one.algorithm: one for one in found}
    assert by_name["easgd"].settings["period"] == by_name["downpour"].settings["period"] == 4
    assert by_name["downpour"].warnings == tuple(Downpour(period=4).warnings(64, 0.05))
    assert (by_name["easgd"].is_stable, by_name["downpour"].is_stable) == (True, False)


def made(algorithm, seconds, *, is_synchronous, warnings=()):
    return Forecast(algorithm, {}, is_synchronous, seconds, 1.0, 0.0, 0.0, warnings)


@pytest.mark.parametrize(
    ("found", "picked"),
    [
        ([made("gossip", 1.0, is_synchronous=False), made("allreduce", 1.2, is_synchronous=True)], "allreduce"),
        ([made("gossip", 1.0, is_synchronous=False), made("allreduce", 1.3, is_synchronous=True)], "gossip"),
        ([made("gossip", 1.0, is_synchronous=False), made("localsgd", 1.2, is_synchronous=True)], "localsgd"),
        (
            [made("downpour", 1.0, is_synchronous=False, warnings=("x",)), made("easgd", 9, is_synchronous=False)],
            "easgd",
        ),
        ([made("downpour", 1.0, is_synchronous=False, warnings=("x",))], None),
    ],
    ids=["close", "not close", "local steps", "unstable is left out", "none is stable"],
)
def test_the_fastest_stable_method_is_picked_unless_a_synchronous_one_is_close(found, picked):
    text = recommendation(found)
    assert text.startswith(f"Pick {picked}:" if picked else "No method is inside its stability region")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ranks": 0}, "--ranks"),
        ({"parameters": 0}, "--parameters"),
        ({"straggler": ((16, 2.0),)}, "a rank from 0 to 15"),
        ({"uplink": 1e9}, "--uplink needs --rack-nodes"),
    ],
)
def test_impossible_clusters_are_refused(options, told):
    with pytest.raises(UsageError, match=told):
        ForecastConfig(**options)


def test_a_setting_that_no_method_has_is_refused():
    with pytest.raises(UsageError, match="none of allreduce has this setting"):
        forecasts(ForecastConfig(methods=("allreduce",), settings={"period": "3"}))
