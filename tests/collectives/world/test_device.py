"""The device of a rank and its share of the cores, decided without a GPU."""

import os

import pytest
import torch

from mpitrain import UsageError
from mpitrain.collectives.world import device


@pytest.fixture
def gpus(monkeypatch):
    """Return `gpus(n)`, which makes torch see n GPUs."""
    return lambda n: monkeypatch.setattr(device, "gpu_names", lambda: ["a GPU"] * n)


def test_all_ranks_may_use_the_cpu():
    assert [device.bind("cpu", r) for r in range(3)] == ["cpu"] * 3


@pytest.mark.parametrize("name", ["tpu", "gpu", "cuda:x", "cuda:-1", "cpu:0", ""])
def test_an_unknown_device_is_a_usage_error(name):
    with pytest.raises(UsageError, match=f"unknown device '{name}'"):
        device.bind(name, 0)


def test_an_absent_gpu_is_a_usage_error(gpus):
    gpus(0)
    with pytest.raises(UsageError, match=r"run with --device cpu, in a script mpitrain.init\(device='cpu'\)"):
        device.bind("cuda", 0)
    gpus(3)
    with pytest.raises(UsageError, match=r"no cuda:3: .* 3 GPU"):
        device.bind("cuda:3", 0)


def test_local_rank_r_uses_gpu_r_modulo_their_number(gpus):
    gpus(3)
    assert [device.bind("cuda", r) for r in range(5)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]


def test_a_gpu_given_by_number_is_used(gpus):
    gpus(3)
    assert [device.bind("cuda:2", r) for r in range(2)] == ["cuda:2", "cuda:2"]


def test_shared_gpus_are_reported():
    places = [("a", "0000:01"), ("a", "0000:02"), ("b", "0000:01"), ("a", "0000:01"), ("b", "0000:01")]
    first, second = device.shared_gpus(places)
    assert first.startswith("ranks 0, 3 share one GPU (0000:01 of a)")
    assert second.startswith("ranks 2, 4 share one GPU (0000:01 of b)")
    assert not list(device.shared_gpus(places[:3]))


@pytest.fixture
def threads(monkeypatch):
    """Return `threads(cores, before)`, which fakes cores and torch's threads, and returns the numbers set later."""
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
def test_a_number_of_threads_chosen_by_the_user_stays(threads, n_ranks, before):
    given = threads(16, before)
    device.share_cores(16 / n_ranks)
    assert given == []


def test_omp_num_threads_decides(threads, monkeypatch):
    given = threads(16, 16)
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    device.share_cores(4)
    assert given == []
