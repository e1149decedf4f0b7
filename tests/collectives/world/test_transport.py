"""The choice of a transport from what the GPUs and MPI can do. The ranks are real, the GPUs are fakes."""

import numpy as np
import pytest
from support.on_gpus import gpus
from support.standin_gpu import StandInGpu

from mpitrain import UsageError
from mpitrain.collectives.rma.device_window import DeviceWindow
from mpitrain.collectives.world.transport import TRANSPORTS, Transport, mapping_problem

ranks = pytest.mark.ranks(1, 3)
YES, NO = (True, True), (False, False)


def chosen(n_nodes, wanted, **can):
    with gpus(n_nodes, wanted, **can) as comm:
        return comm.world.transport, comm.world.n_nodes


@ranks
@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize(
    ("wanted", "maps", "proved", "expected"),
    [
        # maps, sums, windows; there are windows where ranks of the node are not mapped, and between nodes
        ("auto", True, NO, (True, False, False)),
        ("auto", True, YES, (True, True, "between")),
        ("auto", False, NO, (False, False, False)),
        ("auto", False, YES, (False, True, True)),
        ("auto", False, (True, False), (False, True, False)),
        ("ipc", True, YES, (True, False, False)),
        ("cuda-aware", True, YES, (False, True, True)),
        ("cuda-aware", True, (True, False), (False, True, False)),
        ("staged", True, YES, (False, False, False)),
    ],
)
def test_auto_uses_the_best_that_works_and_other_choices_are_obeyed(world, n_nodes, wanted, maps, proved, expected):
    # A single rank has no other memory to map.
    transport, n_nodes = chosen(n_nodes, wanted, maps=maps, proved=proved)
    windows = n_nodes > 1 if expected[2] == "between" else expected[2]
    assert (transport.maps, transport.sums, transport.windows) == (*expected[:2], windows)
    assert transport.in_place == (windows or (transport.maps and n_nodes == 1))
    assert all(isinstance(text, str) and text for text in transport.describe().values())


@ranks
def test_a_transport_that_does_not_work_is_refused_on_all_ranks(world):
    with pytest.raises(UsageError, match=r"--transport ipc does not work here: rank 0: .*cudaErrorNotSupported"):
        chosen(1, "ipc", maps=False)
    with pytest.raises(UsageError, match="mpitrain info --probe"):
        chosen(1, "cuda-aware", proved=(False, True))


@ranks
def test_a_mapping_with_wrong_bytes_is_refused(world, monkeypatch):
    with gpus(1, "staged") as comm:
        assert mapping_problem(comm.world.ranks, comm.world.gpu) is None
        right = StandInGpu.mapped
        monkeypatch.setattr(StandInGpu, "mapped", lambda self, handle, n, dtype: right(self, handle, n, dtype)[::-1])
        problem = mapping_problem(comm.world.ranks, comm.world.gpu)
        assert problem is None if comm.size == 1 else "reads wrong bytes in the memory of rank" in problem


@ranks
def test_a_part_of_the_ranks_has_windows_only_if_needed(world):
    whole = Transport(maps=True, sums=True, windows=True, n_nodes=2, why="a test")
    part = whole.of_part(1)
    assert not part.windows
    assert part.in_place
    assert Transport(False, True, True, 2, "a test").of_part(1).windows


@ranks
@pytest.mark.parametrize("wanted", TRANSPORTS[1:])
def test_memory_is_freed(world, wanted):
    with gpus(1, wanted) as comm:
        device, n_locked = comm.world.gpu, len(comm.world.gpu.page_locked_memory)
        vectors = [DeviceWindow(comm.world, 100, np.float32, mirrored=True) for _ in range(2)]
        peers = [vector.of(rank) for vector in vectors for rank in range(comm.size) if rank != comm.rank]
        assert all((peer is not None) == (wanted == "ipc") for peer in peers)
        for vector in vectors:
            vector.free()
        assert len(device.page_locked_memory) == n_locked
        assert all(peer is None or peer.size == 0 for peer in peers)
