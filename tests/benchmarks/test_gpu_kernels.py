"""The benchmark of the kernels on a GPU: its peers compute what the kernels do, and it runs, with a stand-in GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.standin_gpu import StandInGpu, install

M = 2**20
TORCH = ("torch", "torch in place", "torch.optim")


@pytest.fixture
def kernels(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks.gpu.kernels")


@pytest.fixture
def timing(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks.gpu.timing")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> StandInGpu:
    return install(monkeypatch, StandInGpu())


def bench(kernels: ModuleType, timing: ModuleType, device: StandInGpu, *peers: str) -> Any:
    return kernels.Bench(device, timing.ClockTimer(device.synchronize), "cpu", peers or TORCH, n_repeats=2)


def test_every_chosen_kernel_has_its_peers_written_by_hand(kernels: ModuleType) -> None:
    assert {kernel.name for kernel in kernels.CHOSEN} <= kernels.EAGER.keys() & kernels.IN_PLACE.keys()


@pytest.mark.parametrize("k", range(8))
@pytest.mark.parametrize(
    ("table", "library"), [("EAGER", np.asarray), ("EAGER", torch.from_numpy), ("IN_PLACE", torch.from_numpy)]
)
def test_peers_have_the_equations(
    kernels: ModuleType, k: int, table: str, library: Callable[[np.ndarray], Any]
) -> None:
    kernel = kernels.CHOSEN[k]
    rng = np.random.default_rng(k)
    arrays = [rng.random(50) for _ in kernel.equations.arrays]
    scalars = rng.random(len(kernel.equations.scalars)).tolist()
    peers = [library(array.copy()) for array in arrays]
    getattr(kernels, table)[kernel.name](*peers, *scalars)
    kernel.reference(*arrays, *scalars)
    for name, found, wanted in zip(kernel.equations.arrays, peers, arrays, strict=True):
        np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-13, atol=1e-15, err_msg=name)


@pytest.mark.parametrize("name", ["sgd_step", "torch_momentum_step", "torch_nesterov_step"])
def test_the_fused_optimizer_has_the_equations(kernels: ModuleType, name: str) -> None:
    kernel = next(kernel for kernel in kernels.kernels.library() if kernel.name == name)
    scalars = {"eta": 0.1, "delta": 0.9, "decay": 0.01}
    x, g = (torch.linspace(1, 2, 40, dtype=torch.float64) * k for k in (1, 2))
    momentum = {} if name == "sgd_step" else {"v": np.zeros(40)}
    ours = {"x": x.numpy().copy(), **momentum, "g": g.numpy()}
    tensors = [x, *map(torch.from_numpy, momentum.values()), g]
    optimizer = kernels._optimizer(tensors, scalars, kernels.OPTIMIZERS[name](scalars))
    for _ in range(3):
        optimizer.step()
        kernel.reference(*ours.values(), *[scalars[s] for s in kernel.equations.scalars])
    assert any(group["fused"] for group in optimizer.param_groups)
    np.testing.assert_allclose(x.detach().numpy(), ours["x"], rtol=1e-13)


def test_it_measures_all_chosen_kernels(kernels: ModuleType, timing: ModuleType, device: StandInGpu) -> None:
    measured = kernels.measure(bench(kernels, timing, device), kernels.CHOSEN, [4096, 8192], lambda: 2**40)
    rows = measured["results"]
    assert [(row["bytes"], row["kernel"]) for row in rows] == [
        (n, kernel.name) for n in (4096, 8192) for kernel in kernels.CHOSEN
    ]
    for row in rows:
        names = {"mpitrain", "copy", "torch", "torch in place"}
        assert row["seconds"].keys() == names | ({"torch.optim"} if row["kernel"] in kernels.OPTIMIZERS else set())
        assert row["gb_per_s"]["mpitrain"] == pytest.approx(
            row["bytes"] / 4 * row["bytes_per_element"] / row["seconds"]["mpitrain"] / 1e9
        )
        best = max(other["gb_per_s"]["copy"] for other in rows if other["bytes"] == row["bytes"])
        assert row["of_copy"] == pytest.approx(row["gb_per_s"]["mpitrain"] / best)
        assert row["left_out"] == {}
    assert [row["kernel"] for row in measured["launches"]] == [kernel.name for kernel in kernels.CHOSEN]
    assert measured["bars"] == []  # nothing is as large as the bars want it
    shown = kernels.show(measured | {"peers": TORCH}, "a GPU")
    assert shown.count("mean_momentum_step_2") == 3


def test_kernels_are_really_run_on_all_sets_in_turn(
    kernels: ModuleType, timing: ModuleType, device: StandInGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "ROTATED_BYTES", 2 * 3 * 4096)
    of_all = bench(kernels, timing, device)
    made: list[Any] = []

    def zeros(_: Any, n: int, seed: int) -> Any:
        made.append(device.zeros(n, np.float32))
        return made[-1]

    monkeypatch.setattr(type(of_all), "_random", zeros)
    operations, _ = of_all._operations(kernels.kernels.elastic_exchange, 4096)
    x, c = made[:2]
    assert len(x) == 3 * 1024
    x.fill(1.0)
    for _ in range(2):
        operations["mpitrain"]()
    device.synchronize()
    moved = x.host.reshape(3, 1024) != 1.0
    np.testing.assert_array_equal(moved.all(axis=1), [True, True, False])
    assert not moved[2].any()
    assert (c.host.reshape(3, 1024)[:2] != 0).all()


def test_a_peer_that_cannot_do_it_is_named_and_left_out(
    kernels: ModuleType, timing: ModuleType, device: StandInGpu
) -> None:
    of_all = bench(kernels, timing, device, "cupy", "torch")  # stand-in arrays have no arithmetic
    row = of_all.row(kernels.kernels.elastic_exchange, 4096)
    assert row["seconds"].keys() == {"mpitrain", "copy", "torch"}
    assert "TypeError" in row["left_out"]["cupy"]


def test_what_has_no_room_is_left_out(kernels: ModuleType, timing: ModuleType, device: StandInGpu) -> None:
    of_all, kernel = bench(kernels, timing, device), kernels.kernels.scale
    rooms = iter([of_all.needed_bytes(kernel, 4096), 1000])
    measured = kernels.measure(of_all, [kernel], [4096, 8192], lambda: next(rooms))
    assert [row["bytes"] for row in measured["results"]] == [4096]
    (left,) = measured["no_room"]
    assert (left["kernel"], left["bytes"]) == ("scale", 8192)
    assert "1000 B are free" in left["why"]


def row(kernel: str, n_bytes: int, of_copy: float = 0.95, of_torch: float | None = 3.0, n_updated: int = 2) -> Any:
    return {"kernel": kernel, "bytes": n_bytes, "of_copy": of_copy, "of_torch": of_torch, "n_updated": n_updated}


def test_bars_are_for_large_vectors_and_fused_kernels(kernels: ModuleType) -> None:
    assert kernels.verdicts([row("elastic_exchange", 63 * M, 0.1), row("scale", 64 * M, 0.1, n_updated=1)]) == []
    bars = kernels.verdicts([row("elastic_exchange", 64 * M, 0.9, 2.5), row("other", 64 * M, of_torch=1.0)])
    assert [bar["passed"] for bar in bars] == [True, True, True]  # against torch only the elastic exchange


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"of_copy": 0.89}, "elastic_exchange from 64 MiB up at least 90% of a copy"),
        ({"of_torch": 2.4}, "elastic_exchange from 64 MiB up at least 2.5 x faster than torch"),
    ],
)
def test_each_bar_can_be_missed_and_names_its_worst(kernels: ModuleType, changes: dict[str, float], told: str) -> None:
    rows = [row("elastic_exchange", 64 * M), row("elastic_exchange", 4096 * M, **changes)]
    missed = [bar for bar in kernels.verdicts(rows) if not bar["passed"]]
    assert len(missed) == 1
    assert told in missed[0]["bar"]
    assert "least: elastic_exchange at 4 GiB" in missed[0]["bar"]
    assert missed[0]["ratio"] == next(iter(changes.values()))


def test_the_others_have_the_bar_of_the_copy(kernels: ModuleType) -> None:
    (bar,) = kernels.verdicts([row("a", 64 * M), row("b", 64 * M, 0.5, None)])
    assert (bar["ratio"], bar["missed_by"], bar["passed"]) == (0.5, ["b"], False)


def test_candidates_take_turns(timing: ModuleType) -> None:
    calls: list[str] = []

    class Counting:
        def seconds(self, operation: Callable[[], object], n_calls: int) -> float:
            for _ in range(n_calls):
                operation()
            return float(len(calls))

    operations = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = timing.medians(operations, Counting(), 3, 2)
    assert "".join(calls) == "aabb" + "aabb" * 3
    assert found == {"a": 10.0, "b": 12.0}


def test_the_clock_stops_when_the_gpu_is_done(timing: ModuleType, device: StandInGpu) -> None:
    to, source = (device.zeros(100, np.float32) for _ in range(2))
    source.fill(7.0)
    assert timing.ClockTimer(device.synchronize).seconds(lambda: device.copy(to, source), 3) > 0
    assert (to.host == 7.0).all()  # and not only begun


@pytest.mark.parametrize("n", [1, 7, 8, 9, 50])
def test_random_vectors_are_a_block_and_its_copies(
    timing: ModuleType, device: StandInGpu, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    monkeypatch.setattr(timing, "RANDOM_ELEMENTS", 8)
    found = timing.fill(device, device.zeros(n, np.float32), seed=3).get()
    block = np.random.default_rng(3).random(min(n, 8), np.float32)
    np.testing.assert_array_equal(found, np.resize(block, n))


def test_small_vectors_are_called_more_often(timing: ModuleType) -> None:
    assert [timing.calls_of(n) for n in (1, M, 64 * M, 4096 * M)] == [20, 20, 4, 1]
