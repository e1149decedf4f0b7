"""The simulated world: its collectives, its memory, and the errors of collectives that cannot complete."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.errors import RankFailed
from mpitrain.simulation.schedules import RandomOrder, Scripted, VirtualTime
from mpitrain.simulation.world import SimulatedWorld


@given(st.integers(1, 5), st.integers(0, 2**16))
def test_collectives_match_numpy_in_any_order(size, seed):
    values = np.random.default_rng(seed).normal(size=(size, 7))

    def program(comm):
        world.scheduler.give_way()
        total, mean = comm.vector(7, np.float64), comm.vector(7, np.float64)
        total.local[...], mean.local[...] = values[comm.rank], values[comm.rank]
        comm.allreduce(total)
        comm.allreduce(mean, mean=True)
        seeded, reduced = values[comm.rank].copy(), values[comm.rank].copy()
        comm.broadcast(seeded, root=size - 1)
        comm.reduce(reduced, root=size - 1)
        comm.barrier()
        return total.local, mean.local, seeded, reduced, comm.gather([comm.rank, comm.size])

    world = SimulatedWorld(size, RandomOrder(seed), interleave_locks=True)
    for rank, (total, mean, seeded, reduced, gathered) in enumerate(world.run(program)):
        np.testing.assert_allclose(total, values.sum(0), atol=1e-14)
        np.testing.assert_allclose(mean, values.mean(0), atol=1e-14)
        assert seeded.tolist() == values[-1].tolist()
        if rank == size - 1:
            np.testing.assert_allclose(reduced, values.sum(0), atol=1e-14)
        assert gathered.tolist() == [[i, size] for i in range(size)]


def test_a_read_sees_the_vector_of_that_peer():
    def program(comm):
        mine = comm.vector(3, np.float64)
        mine.local[...] = comm.rank
        comm.barrier()
        seen = []
        for peer in range(comm.size):
            comm.read(mine, peer, lambda array: seen.append(array[0]))
        return seen

    assert SimulatedWorld(3).run(program) == [[0, 1, 2]] * 3


def test_results_are_ordered_by_rank():
    assert SimulatedWorld(4, RandomOrder(3)).run(lambda comm: comm.rank) == [0, 1, 2, 3]


@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_waiting_for_a_worker_that_has_returned_is_reported(leaver):
    def program(comm):
        if comm.rank != leaver:
            comm.barrier()

    waiting = sorted({0, 1, 2} - {leaver})
    with pytest.raises(RuntimeError, match=r"workers \[{}, {}\] wait in a collective".format(*waiting)):
        SimulatedWorld(3).run(program)


def test_collective_outside_a_run_is_reported():
    world = SimulatedWorld(2)
    with pytest.raises(RuntimeError, match=r"SimulatedWorld\.run"):
        world.communicators[0].barrier()
    world.run(lambda comm: comm.barrier())
    with pytest.raises(RuntimeError, match=r"SimulatedWorld\.run"):
        world.communicators[1].barrier()


def test_a_world_can_run_again_after_an_interrupted_run():
    world = SimulatedWorld(2, Scripted([0]))
    world.run(lambda comm: comm.gather([9.0]))  # worker 0 waits; the script ends
    world.schedule = RandomOrder(0)
    assert [found.tolist() for found in world.run(lambda comm: comm.gather([comm.rank]))] == [[[0], [1]]] * 2

    def fail(comm):
        if comm.rank == 1:
            raise KeyError("worker 1")
        comm.barrier()

    with pytest.raises(KeyError, match="worker 1"):
        world.run(fail)
    assert [found.tolist() for found in world.run(lambda comm: comm.gather([comm.rank]))] == [[[0], [1]]] * 2


def test_a_world_has_at_least_one_worker():
    with pytest.raises(ValueError, match="at least 1 worker"):
        SimulatedWorld(0)


def test_workers_give_way_before_locks_when_locks_are_interleaved():
    def visits(**world):
        seen = []

        def program(comm):
            vector = comm.shared_vector(6, np.float64)
            comm.barrier()
            vector.update(lambda part, _: seen.append((comm.rank, part.start)))

        SimulatedWorld(2, largest_shard=2, **world).run(program)
        return seen

    alone, mixed = visits(), visits(interleave_locks=True)
    assert sorted(alone) == sorted(mixed)
    assert [rank for rank, _ in alone] in ([0] * 3 + [1] * 3, [1] * 3 + [0] * 3)
    assert [rank for rank, _ in mixed] == [0, 1] * 3


@given(st.integers(1, 6), st.integers(0, 2**16))
def test_split_communicators_have_collectives_of_their_own(size, seed):
    def program(comm):
        part = comm.split(comm.rank % 2)
        inner = part.split(part.rank % 2)
        total = part.vector(2, np.float64)
        for _ in range(part.rank + 1 if part.size == 1 else 3):  # the parts need not make the same number
            total.local[...] = comm.rank
            part.allreduce(total)
        assert part.nodes == [comm.nodes[rank] for rank in range(comm.rank % 2, size, 2)]
        assert inner.gather([comm.rank])[inner.rank, 0] == comm.rank
        shared = part.shared_vector(4, np.float64)
        shared.update(lambda _, c: c.__iadd__(1) is None)
        part.barrier()
        c = np.zeros(4)
        shared.read(c)
        comm.barrier()
        return part.rank, part.size, total.local[0], c[0], part.statistics is comm.statistics

    world = SimulatedWorld(size, RandomOrder(seed), interleave_locks=True, nodes=[rank // 2 for rank in range(size)])
    for rank, found in enumerate(world.run(program)):
        members = range(rank % 2, size, 2)
        assert found == (rank // 2, len(members), sum(members), len(members), True)


def test_other_workers_run_while_one_waits_for_a_condition():
    order, arrived = [], []

    def program(comm):
        if comm.rank == 0:
            comm.wait_until(lambda: len(arrived) == 2)
        else:
            for _ in range(comm.rank):
                comm.end_step()
            arrived.append(comm.rank)
        order.append(comm.rank)

    SimulatedWorld(3).run(program)
    assert order == [1, 2, 0]


def test_waiting_for_a_condition_that_never_holds_is_reported():
    def program(comm):
        if comm.rank == 1:
            comm.wait_until(lambda: False)
        elif comm.rank == 2:
            comm.barrier()

    with pytest.raises(RuntimeError, match=r"\[2\] wait in a collective .*; workers \[1\] wait for a condition"):
        SimulatedWorld(3).run(program)


def test_a_waiting_worker_advances_to_the_clock_of_the_worker_it_waits_for():
    done = []

    def program(comm):
        if comm.rank == 0:
            comm.wait_until(lambda: bool(done))
        else:
            comm.end_step()
            comm.end_step()
            done.append(True)

    world = SimulatedWorld(2, VirtualTime([1.0, 2.5]))
    world.run(program)
    assert world.schedule.clocks.tolist() == [5.0, 5.0]


def test_a_started_allreduce_averages_the_vectors_at_its_start():
    def program(comm):
        vector = comm.vector(3, np.float64)
        vector.local[...] = comm.rank + 1
        pending = comm.start_allreduce(vector, mean=True)
        for _ in range(comm.rank):
            comm.end_step()
        pending.wait()
        return vector.local.tolist()

    assert SimulatedWorld(3, RandomOrder(1)).run(program) == [[2.0] * 3] * 3


def test_each_worker_has_a_node():
    with pytest.raises(ValueError, match="3 workers have 3 nodes, not 2"):
        SimulatedWorld(3, nodes=[0, 1])


def test_a_mailbox_belongs_to_the_worker_that_is_named():
    def program(comm):
        boxes = comm.mailboxes(2, np.float64, slots=2)
        comm.barrier()
        peer = (comm.rank + 1) % comm.size

        def write(box, tags):
            box[...], tags[0] = 10 * comm.rank + peer, comm.rank

        boxes.update(peer, write, slot=1)
        comm.barrier()
        seen = []
        boxes.update(comm.rank, lambda box, tags: seen.extend([*box, tags[0]]), slot=1)
        boxes.update(comm.rank, lambda box, tags: seen.extend(box), slot=0)
        return seen

    found = SimulatedWorld(4, RandomOrder(0), interleave_locks=True).run(program)
    senders = [3, 0, 1, 2]
    assert found == [[10 * sender + rank] * 2 + [sender, 0, 0] for rank, sender in enumerate(senders)]


def test_the_workers_of_a_node_share_its_vector_and_divide_it():
    nodes = [0, 1, 0, 1, 1]

    def program(comm):
        vector = comm.node_vector(90, np.float64)
        mine = comm.slice_of(90)
        vector.local[mine] += comm.rank + 1
        comm.barrier()
        of_peers = []
        for peer in range(comm.size):
            comm.read(vector, peer, lambda array: of_peers.append(array.tolist()))
        return vector.local.tolist(), of_peers

    # 6 blocks of 16 elements, the last one of 10
    of_node = {0: [1.0] * 48 + [3.0] * 42, 1: [2.0] * 32 + [4.0] * 32 + [5.0] * 26}
    for node, (own, of_peers) in zip(nodes, SimulatedWorld(5, nodes=nodes).run(program), strict=True):
        assert own == of_node[node]
        assert of_peers == [of_node[other] for other in nodes]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_an_allreduce_sends_the_bytes_of_a_ring(size):
    def program(comm):
        vector = comm.vector(30, np.float32)
        comm.allreduce(vector)
        comm.allreduce(vector, part=slice(5, 15))
        comm.reduce_slices(vector, lambda part, addends: None)
        return comm.statistics.n_exchanges, comm.statistics.bytes_sent

    sent = 2 * (2 * (size - 1) * 120 // size) + 2 * (size - 1) * 40 // size
    assert SimulatedWorld(size).run(program) == [(3, sent)] * size


@pytest.mark.parametrize("wait", ["collective", "condition"])
def test_waiting_for_a_worker_that_dies_raises(wait):
    def program(comm):
        if comm.rank == 1:
            comm.end_step()
            world.kill(1)
            comm.end_step()
            raise AssertionError("a dead worker runs")
        with pytest.raises(RankFailed, match="rank 1 died"):
            comm.barrier() if wait == "collective" else comm.wait_until(lambda: False)
        return sorted(comm.dead)

    world = SimulatedWorld(3)
    assert world.run(program) == [[1], None, [1]]
    assert world.dead == {1}


def test_a_collective_of_a_part_takes_the_time_of_its_workers_only():
    def program(comm):
        part = comm.split(comm.rank % 2)
        comm.end_step()
        part.barrier()

    world = SimulatedWorld(4, VirtualTime([1.0, 10.0, 4.0, 30.0]))
    world.run(program)
    assert world.schedule.clocks.tolist() == [4, 30, 4, 30]


def test_split_communicators_number_the_dead_by_their_own_ranks():
    parts = []

    def program(comm):
        parts.append(comm.split(comm.rank % 2))

    world = SimulatedWorld(5)
    world.run(program)
    world.kill(3)
    assert sorted((part.size, sorted(part.dead)) for part in parts) == [(2, [1])] * 2 + [(3, [])] * 3


def test_the_rows_of_a_shared_vector_are_vectors_of_their_own():
    def program(comm):
        center = comm.shared_vector(5, np.float64, rows=2)

        def add(part, rows):
            assert rows.shape == (2, part.stop - part.start)
            rows[0] += comm.rank + 1
            rows[1] -= np.arange(part.start, part.stop)

        center.update(add)
        comm.barrier()
        out = np.zeros((2, 5))
        for row in range(2):
            center.read(out[row], row)
        return out.tolist()

    world = SimulatedWorld(3, largest_shard=2)
    assert world.run(program) == [[[6.0] * 5, [0.0, -3.0, -6.0, -9.0, -12.0]]] * 3


def test_a_condition_on_a_block_is_checked_when_the_block_changes():
    checks = []

    def program(comm):
        boxes = comm.mailboxes(1, np.float64)
        if comm.rank == 0:

            def is_there():
                checks.append(0)
                return boxes.peek(0)[1] == 1

            comm.wait_until(is_there)
            return
        for _ in range(50):
            boxes.update(comm.rank, lambda box, tags: None)
            comm.end_step()
        boxes.update(0, lambda box, tags: tags.__setitem__(1, 1.0))

    SimulatedWorld(2).run(program)
    assert len(checks) <= 5
