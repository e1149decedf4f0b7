"""The world: one object per process, a partition of the ranks into nodes, parts of it, and its errors."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from support.standin_gpu import StandInGpu

import mpitrain
from mpitrain import UsageError
from mpitrain.collectives.world.fault_tolerance import ULFMFaultTolerance
from mpitrain.errors import RankFailed
from mpitrain.kernels import gpu

ALL = pytest.mark.ranks(1, 2, 3, 4, 5)


@ALL
def test_init_returns_the_same_world_every_time():
    world = mpitrain.init()
    assert mpitrain.init() is world
    assert mpitrain.init("cpu") is world
    assert world.device == "cpu"
    with pytest.raises(UsageError, match=r"already runs on cpu.*device='cuda'"):
        mpitrain.init("cuda")


@pytest.mark.ranks(2)
def test_a_device_may_be_one_of_torch():
    import torch

    assert mpitrain.init(torch.device("cpu")) is mpitrain.init()


@ALL
def test_an_unknown_transport_or_another_one_is_a_usage_error(monkeypatch):
    from mpitrain.collectives.world import launch

    mpitrain.init()
    with pytest.raises(UsageError, match=r"already uses transport auto.*transport='ipc'"):
        mpitrain.init(transport="ipc")
    monkeypatch.setattr(launch, "_world", None)
    with pytest.raises(UsageError, match="unknown transport 'nccl': it must be one of auto, ipc, cuda-aware, staged"):
        mpitrain.init(transport="nccl")


@pytest.mark.ranks(1, 2, 3)
def test_a_rank_with_a_gpu_has_a_transport_and_shared_gpus_are_reported(monkeypatch, capfd):
    from mpi4py import MPI

    from mpitrain.collectives.world import device
    from mpitrain.collectives.world.launch import create_world

    selected = []
    monkeypatch.setattr(device, "bind", lambda name, local_rank: f"{name}:{local_rank}")
    monkeypatch.setattr(device, "select_gpu", lambda name: selected.append(name) or 0)
    monkeypatch.setattr(gpu, "_current", StandInGpu())
    made = create_world(MPI.COMM_WORLD.Dup(), "cuda", "staged")
    assert selected == [made.device] == [f"cuda:{made.local_rank}"]
    assert made.gpu is gpu.current()
    assert made.transport == made.split(0).transport
    assert "page-locked" in made.describe()["transport"]["vectors on GPUs, shared"]
    said = capfd.readouterr().err
    shared = f"mpitrain: ranks {', '.join(map(str, range(made.size)))} share one GPU" in said
    assert shared == (made.rank == 0 and made.size > 1)


@pytest.mark.ranks(1, 2)
def test_one_rank_without_cupy_is_a_usage_error_on_all(monkeypatch):
    from mpi4py import MPI

    from mpitrain.collectives.world import device
    from mpitrain.collectives.world.launch import create_world

    monkeypatch.setattr(device, "bind", lambda name, local_rank: "cuda:0")
    monkeypatch.setattr(device, "select_gpu", lambda name: 0)
    alone = MPI.COMM_WORLD.Get_rank() == 0
    monkeypatch.setattr(gpu, "_current", None if alone else StandInGpu())
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UsageError, match=r"need CuPy .*pip install 'mpitrain\[gpu\]'"):
        create_world(MPI.COMM_WORLD.Dup(), "cuda")


@ALL
def test_nodes_are_a_partition_of_the_ranks(world):
    assert sorted(rank for ranks in set(map(tuple, world.comm.allgather(world.node_ranks))) for rank in ranks) == list(
        range(world.size)
    )
    assert world.node_ranks == [rank for rank in range(world.size) if world.nodes[rank] == world.node]
    assert set(world.nodes) == set(range(world.n_nodes))
    assert world.nodes[world.rank] == world.node
    assert len(world.hosts) == world.size


@ALL
def test_local_ranks_number_the_ranks_of_a_node(world):
    assert world.node_ranks[world.local_rank] == world.rank
    assert (world.local_rank, world.local_size) == (world.node_comm.rank, world.node_comm.size)
    assert world.local_size == len(world.node_ranks)


@ALL
def test_a_rail_joins_one_rank_of_each_node(world):
    from mpi4py import MPI

    sizes = [world.nodes.count(node) for node in range(world.n_nodes)]
    assert world.n_rails == min(sizes)
    if world.local_rank >= world.n_rails:
        assert world.rail_comm == MPI.COMM_NULL
    else:
        assert world.rail_comm.size == world.n_nodes
        assert world.rail_comm.rank == world.node
        assert world.rail_comm.allgather(world.local_rank) == [world.local_rank] * world.n_nodes


@ALL
def test_emulated_nodes_differ_by_at_most_one_rank(two_nodes):
    assert two_nodes.n_nodes == min(2, two_nodes.size)
    sizes = [two_nodes.nodes.count(node) for node in range(two_nodes.n_nodes)]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == two_nodes.size


@ALL
@pytest.mark.parametrize("n_nodes", [1, 2])
def test_cores_are_shared_by_the_ranks_of_the_machine_that_may_run_on_them(monkeypatch, n_nodes):
    from mpi4py import MPI

    from mpitrain.collectives.world.launch import create_world
    from mpitrain.collectives.world.ranks import EMULATED_NODES

    monkeypatch.setenv(EMULATED_NODES, str(n_nodes))
    rank, size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    bound, first = range(8 * rank, 8 * rank + 8), range(2)
    for cores, share in ((bound, 8.0), (first, 2 / size), ({rank}, 1.0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(cores))
        made = create_world(MPI.COMM_WORLD.Dup(), "cpu")
        part = made.split(made.rank % 2)
        assert made.cores == part.cores == share
        part.free()
        if made.progress_thread is not None:
            made.progress_thread.stop()


@ALL
def test_a_shared_array_is_one_memory(world):
    array = world.shared_array((world.local_size, 3), np.int64)
    assert array.shape == (world.local_size, 3)
    assert not array.any()
    world.node_barrier()
    array[world.local_rank] = world.rank + 1
    world.node_barrier()
    assert np.array_equal(array, np.outer(np.array(world.node_ranks) + 1, [1, 1, 1]))


@ALL
def test_a_shared_array_is_zero_in_reused_memory(world):
    for n in (1, 10, 100, 4000):
        used = [np.full(n, 255, np.uint8) for _ in range(4)]
        del used
        assert not world.shared_array((n,), np.uint8).any()
    assert world.shared_array((0, 5), np.float32).shape == (0, 5)


@ALL
def test_a_shared_array_that_does_not_fit_is_a_usage_error(world):
    with pytest.raises(UsageError, match="shared memory"):
        world.shared_array((2**50,), np.float32)


@ALL
@pytest.mark.parametrize("text", ["x", "0", "-1", "", "1.5"])
def test_an_invalid_number_of_emulated_nodes_is_a_usage_error(monkeypatch, text):
    from mpi4py import MPI

    from mpitrain.collectives.world.launch import create_world
    from mpitrain.collectives.world.ranks import EMULATED_NODES

    monkeypatch.setenv(EMULATED_NODES, text)
    with pytest.raises(UsageError, match=rf"{EMULATED_NODES} must be .* not '{text}'"):
        create_world(MPI.COMM_WORLD, "cpu")


@ALL
def test_an_unknown_device_is_a_usage_error():
    from mpi4py import MPI

    from mpitrain.collectives.world.launch import create_world

    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        create_world(MPI.COMM_WORLD, "tpu")


@ALL
def test_a_world_describes_itself(world):
    described = world.describe()
    assert described["ranks"] == world.size
    assert sum(described["ranks_of_node"]) == world.size
    assert described["nodes"] == len(described["ranks_of_node"]) == world.n_nodes
    assert described["threads"] == "multiple"
    assert described["progress thread"] == (world.n_nodes > 1)
    assert described["mpi"].startswith(("Open MPI", "MPICH")) or os.environ.get("VIRTUAL_ENV") is None


@pytest.mark.ranks(1)
def test_an_unknown_path_between_nodes_is_refused(monkeypatch):
    from mpi4py import MPI

    from mpitrain import UsageError
    from mpitrain.collectives.world.launch import BETWEEN_NODES, create_world

    monkeypatch.setenv(BETWEEN_NODES, "pigeons")
    with pytest.raises(UsageError, match=f"unknown {BETWEEN_NODES} 'pigeons': it must be one of messages, windows"):
        create_world(MPI.COMM_WORLD.Dup(), "cpu")


@pytest.mark.ranks(2, 3)
def test_the_path_between_nodes_is_described(two_nodes, windows, one_node):
    paths = [world.describe()["transport"]["between nodes"] for world in (two_nodes, windows, one_node)]
    assert "messages" in paths[0]
    assert "RMA window" in paths[1]
    assert paths[2] == "not used"


@pytest.mark.ranks(4, 5)
def test_parts_of_parts_number_dead_ranks_as_their_own(world, monkeypatch):
    words = np.isin(np.arange(world.size), (2, 3)).astype(np.int64)
    detector = SimpleNamespace(dead=frozenset({2, 3}), dead_words=words, leaves_no_survivors=False)
    monkeypatch.setattr(world, "fault_tolerance", ULFMFaultTolerance(world.comm, detector))
    odd = world.split(world.rank % 2)
    last = odd.split(odd.rank == odd.size - 1)
    others = world.split(world.rank in (1, 3))
    members = {part: part.comm.allgather(world.rank) for part in (odd, last, others)}
    for part, ranks in members.items():
        assert part.dead == {k for k, rank in enumerate(ranks) if rank in (2, 3)}
        if part.dead:
            with pytest.raises(RankFailed, match=", ".join(str(rank) for rank in ranks if rank in (2, 3))):
                part.require_all()
    for part in (last, odd, others):
        part.free()


# What the last rank is started with, unlike the others.
OTHER_STARTS = {
    "device": ({"device": "cuda"}, {}, "", "the device differs between ranks: cpu on FIRST, cuda on LAST"),
    "transport": ({"transport": "staged"}, {}, "", "the transport differs between ranks: auto on FIRST, staged on"),
    "version": ({}, {}, "9.9", "the version of mpitrain differs between ranks: .* on FIRST, 9.9 on LAST"),
    "path": (
        {},
        {"MPITRAIN_BETWEEN_NODES": "windows"},
        "",
        "MPITRAIN_BETWEEN_NODES differs between ranks: messages on",
    ),
    "nodes": ({}, {"MPITRAIN_EMULATED_NODES": "2"}, "", "MPITRAIN_EMULATED_NODES differs between ranks: 1 on FIRST, 2"),
}


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize(("arguments", "environment", "version", "line"), OTHER_STARTS.values(), ids=OTHER_STARTS)
def test_a_rank_that_is_started_differently_is_named_on_all(world, monkeypatch, arguments, environment, version, line):
    from mpitrain.collectives.world import launch

    last = world.rank == world.size - 1
    for name in ("MPITRAIN_BETWEEN_NODES", "MPITRAIN_EMULATED_NODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items() if last else ():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "__version__", version if last and version else launch.__version__)
    first = {2: "rank 0", 3: "ranks 0, 1"}[world.size]
    comm = world.comm.Dup()
    pattern = line.replace("FIRST", first).replace("LAST", f"rank {world.size - 1}")
    remedy = "install the same version on every node" if version else "start all ranks with the same settings"
    with pytest.raises(UsageError, match=f"^{pattern}.*; {remedy}$") as caught:
        launch.create_world(comm, **(arguments if last else {}))
    assert caught.value.on_all_ranks
    comm.Free()
