"""Which GPU a rank gets, decided without one."""

import os

import pytest
import torch

from mpitrain import UsageError
from mpitrain.collectives.world import device


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(n)`: this machine has n of them."""
    return lambda n: monkeypatch.setattr(device, "gpu_names", lambda: ["a GPU"] * n)


def test_the_cpu_is_everybodys():
    assert [device.bind("cpu", r) for r in range(3)] == ["cpu"] * 3


@pytest.mark.parametrize("name", ["tpu", "gpu", "cuda:x", "cuda:-1", "cpu:0", ""])
def test_an_unknown_device_is_a_usage_error(name):
    with pytest.raises(UsageError, match=f"unknown device '{name}'"):
        device.bind(name, 0)


def test_a_gpu_that_is_not_there_is_a_usage_error(gpus):
    gpus(0)
    with pytest.raises(UsageError, match=r"run with --device cpu, in a script mpitrain.init\(device='cpu'\)"):
        device.bind("cuda", 0)
    gpus(3)
    with pytest.raises(UsageError, match=r"no cuda:3: .* 3 GPU"):
        device.bind("cuda:3", 0)


def test_local_rank_r_takes_gpu_r_modulo_their_number(gpus):
    gpus(3)
    assert [device.bind("cuda", r) for r in range(5)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]


def test_a_gpu_asked_for_by_number_is_taken(gpus):
    gpus(3)
    assert [device.bind("cuda:2", r) for r in range(2)] == ["cuda:2", "cuda:2"]


def test_shared_gpus_are_told_of():
    places = [("a", "0000:01"), ("a", "0000:02"), ("b", "0000:01"), ("a", "0000:01"), ("b", "0000:01")]
    first, second = device.shared_gpus(places)
    assert first.startswith("ranks 0, 3 share one GPU (0000:01 of a)")
    assert second.startswith("ranks 2, 4 share one GPU (0000:01 of b)")
    assert not list(device.shared_gpus(places[:3]))


@pytest.fixture
def threads(monkeypatch):
    """`threads(cores, before)`: torch has so many threads on so many cores; the list shows what it is given then."""
    given = []

    def of(cores, before):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(torch, "get_num_threads", lambda: before)
        monkeypatch.setattr(torch, "set_num_threads", given.append)
        return given

    return of


@pytest.mark.parametrize(("n_ranks", "before", "share"), [(2, 16, 8), (4, 8, 4), (3, 16, 5), (32, 16, 1), (5, 16, 3)])
def test_ranks_share_the_cores_of_their_node(threads, n_ranks, before, share):
    given = threads(16, before)
    device.share_cores(16 / n_ranks)
    assert given == [share]


@pytest.mark.parametrize(("n_ranks", "before"), [(4, 7), (4, 1), (4, 4), (1, 8), (1, 16), (2, 8)])
def test_who_has_chosen_a_number_of_threads_keeps_it(threads, n_ranks, before):
    given = threads(16, before)
    device.share_cores(16 / n_ranks)
    assert given == []


def test_the_environment_decides_about_threads(threads, monkeypatch):
    given = threads(16, 16)
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    device.share_cores(4)
    assert given == []
