"""The benchmarks of ranks on a GPU: each is run once on real ranks with stand-in GPUs, and its bars are judged."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support.on_ranks import ranks
from support.standin_gpu import StandInGpu, install

pytestmark = [pytest.mark.ranks(1, 2), pytest.mark.time_limit(120)]  # what imports these scripts starts MPI

M = 2**20


@pytest.fixture
def exchange(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks.gpu.exchange")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> StandInGpu:
    """This rank's GPU; worlds that ask for one get it."""
    from mpitrain.collectives.world import device as module
    from mpitrain.kernels import gpu

    device = install(monkeypatch, StandInGpu())
    monkeypatch.setattr(module, "bind", lambda wanted, local_rank: wanted)
    monkeypatch.setattr(module, "select_gpu", lambda name: 0)
    monkeypatch.setattr(gpu, "use", lambda index: device)
    return device


@pytest.fixture
def whole(device: StandInGpu) -> Iterator[Any]:
    """Collective. The ranks, with a GPU that torch does not know."""
    from mpitrain.collectives.world.launch import create_world

    with ranks(1) as comm:
        yield create_world(comm.world.comm.Dup(), "cuda:0", "staged")


def test_the_exchange_is_measured_by_every_transport(exchange: ModuleType, whole: Any) -> None:
    worlds, refused = exchange.worlds_of(whole, ["ipc", "staged"])
    assert refused == {}
    assert [world.wanted_transport for world in worlds.values()] == ["ipc", "staged"]
    measured = exchange.bench(whole, worlds, [4096, 16384], 2, None)
    assert measured["left_out"] == []
    rows = measured["results"]
    one = ["copy", "local kernel", "exchange, ipc", "exchange, staged"]
    run_on_survivors = [
        "copy",
        "local kernel",
        "exchange, ipc",
        "all-reduce, ipc",
        "exchange, staged",
        "all-reduce, staged",
    ]
    modes = {"one rank": [] if whole.rank else one, "all ranks": run_on_survivors}
    wanted = [(n, mode, name) for n in (4096, 16384) for mode, names in modes.items() for name in names]
    assert [(row["bytes"], row["mode"], row["operation"]) for row in rows] == wanted
    references = {row["operation"]: row["reference"] for row in rows if row["mode"] == "all ranks"}
    assert references["exchange, ipc"] == references["exchange, staged"] == "local kernel"
    assert references["all-reduce, staged"] == "all-reduce, ipc"
    assert all(row["median_seconds"] > 0 for row in rows)
    assert exchange.verdicts(rows, whole.size) == []


def test_exchanges_and_sums_are_made(
    exchange: ModuleType, whole: Any, device: StandInGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def ones(_: Any, array: Any, seed: int) -> Any:
        array.fill(1.0 + whole.rank)
        made.append(array)
        return array

    monkeypatch.setattr(exchange, "fill", ones)
    worlds, _ = exchange.worlds_of(whole, ["ipc", "staged"])
    measured = exchange.Exchanges(worlds, 1000, collective=True, gloo_device=None)
    x, own, summed, staged = made
    measured.operations["local kernel"]()
    np.testing.assert_array_equal([x.host, own.host], 1.0 + whole.rank)
    whole.barrier()
    if whole.rank == 0:
        measured.operations["exchange, ipc"]()
        np.testing.assert_allclose(x.host, 1.0 - exchange.RATE * 1.0, rtol=1e-6)  # towards a center of zeros
        measured.operations["exchange, ipc"]()
        center = exchange.RATE * 1.0
        np.testing.assert_allclose(x.host, 0.9 - exchange.RATE * (0.9 - center), rtol=1e-6)
    for name in ("all-reduce, ipc", "all-reduce, staged"):
        measured.operations[name]()
    np.testing.assert_array_equal([summed.host, staged.host], (1 + whole.size) / 2)
    measured.free()


@pytest.mark.ranks(2)  # a rank alone maps nothing
def test_a_transport_that_does_not_work_is_named(exchange: ModuleType, whole: Any, device: StandInGpu) -> None:
    device.maps = False
    worlds, refused = exchange.worlds_of(whole, ["ipc", "staged"])
    assert list(worlds) == ["staged"]
    assert "ipc does not work here" in refused["ipc"]


def test_a_transport_without_room_is_left_out_alone(
    exchange: ModuleType, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpitrain.collectives.mpi import MPICommunicator
    from mpitrain.errors import UsageError

    make = MPICommunicator.vector

    def vector(self: Any, n: int, dtype: Any) -> Any:
        if self.world.wanted_transport == "staged":
            raise UsageError("no room")
        return make(self, n, dtype)

    monkeypatch.setattr(MPICommunicator, "vector", vector)
    worlds, _ = exchange.worlds_of(whole, ["ipc", "staged"])
    measured = exchange.bench(whole, worlds, [4096], 2, None)
    assert measured["left_out"] == [{"bytes": 4096, "name": "all ranks, staged", "why": "no room"}]
    of_all = [row["operation"] for row in measured["results"] if row["mode"] == "all ranks"]
    assert of_all == ["copy", "local kernel", "exchange, ipc", "all-reduce, ipc"]


def row(mode: str, ratio: float, n_bytes: int = 256 * M, operation: str = "exchange, ipc") -> dict[str, Any]:
    return {"bytes": n_bytes, "operation": operation, "mode": mode, "ratio": ratio}


def test_the_bar_of_the_exchange_is_for_two_ranks_ipc_and_256_mib(exchange: ModuleType) -> None:
    rows = [row("one rank", 1.2), row("all ranks", 1.21), row("one rank", 9.0, M)]
    rows += [row("one rank", 9.0, operation="exchange, staged")]
    bars = exchange.verdicts(rows, 2)
    assert [(bar["ratio"], bar["passed"]) for bar in bars] == [(1.2, True), (1.21, False)]
    assert "256 MiB, all ranks" in bars[1]["bar"]
    assert exchange.verdicts(rows, 4) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sizes", "much"], "much"),
        (["--transports", "ipc,pigeon"], "pigeon"),
        (["--repeats", "0"], "--repeats"),
    ],
)
def test_options_of_the_exchange_are_checked(exchange: ModuleType, words: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        exchange.options_of(words)


def test_the_default_sizes_hold_that_of_the_bar(exchange: ModuleType) -> None:
    sizes, transports, _ = exchange.options_of([])
    assert exchange.BAR_BYTES in sizes
    assert exchange.BAR_TRANSPORT in transports


@pytest.fixture
def training(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks.gpu.training")


@pytest.fixture
def on_host(device: StandInGpu) -> Iterator[Callable[[str], Any]]:
    """Collective. Makes ranks whose vectors lie in the stand-in's memory, and whose torch computes on the host."""
    from mpitrain.collectives.world import transport

    with ranks(1) as comm:

        def make(wanted: str) -> Any:
            comm.world.gpu = device
            comm.world.transport = transport.choose(comm.world.ranks, wanted, device)
            return comm.world

        yield make


@pytest.mark.parametrize(("model", "transport"), [("resnet20", "ipc"), ("gpt", "staged")])
def test_training_is_measured(
    training: ModuleType, on_host: Callable[[str], Any], transport: str, model: str, device: StandInGpu
) -> None:
    world = on_host(transport)
    models = importlib.import_module("benchmarks.gpu.models")
    small = models.resnet20(2) if model == "resnet20" else models.gpt(2, 8, 1, 8, 2)
    measured = training.Training(world, small, device.synchronize, periods=(1, 2), n_steps=2)
    seconds = measured.measure(2)
    measured.close()
    steps = ["alone", "alone, again", "allreduce", "gossip, tau 1", "gossip, tau 2", "easgd, tau 1", "easgd, tau 2"]
    assert list(seconds) == steps
    assert all((of_one > 0).all() for of_one in seconds.values())
    rows = training.rows_of(model, small.n_samples, seconds)
    assert [row["step"] for row in rows] == steps
    assert rows[0]["of_alone"] == 1.0
    assert rows[0]["samples_per_second"] == pytest.approx(2 / np.median(seconds["alone"]))
    assert len(training.table(rows, world.size)) == 2 + len(steps)


def test_the_bar_of_training_is_for_two_ranks_and_tau_10(training: ModuleType) -> None:
    alone = np.array([1.0, 2.0, 4.0])
    rows = training.rows_of("gpt", 32, {"alone": alone, "easgd, tau 10": 1.04 * alone, "allreduce": 2 * alone})
    (bar,) = training.verdicts(rows, 2)
    assert bar["ratio"] == pytest.approx(1.04)  # of each turn to the same turn alone
    assert not bar["passed"]
    assert "gpt: easgd, tau 10" in bar["bar"]
    (bar,) = training.verdicts(training.rows_of("gpt", 32, {"alone": alone, "easgd, tau 10": 1.03 * alone}), 2)
    assert bar["passed"]
    assert training.verdicts(rows, 4) == []


def test_options_of_the_training_are_checked(training: ModuleType) -> None:
    for words, told in ((["--models", "resnet20,vgg"], "vgg"), (["--repeats", "0"], "--repeats")):
        with pytest.raises(ValueError, match=told):
            training.options_of(words)
    assert training.options_of([])[0] == ["resnet20", "gpt"]
