"""Mailboxes: reads see one whole message, tags belong to their data, and no update is lost."""

import numpy as np
import pytest

from mpitrain.collectives.rma.blocks import WEIGHT_TAG
from mpitrain.collectives.topology.graphs import uniform_peer
from mpitrain.kernels import weighted_average

ALL = pytest.mark.ranks(1, 2, 3)


@pytest.fixture(scope="module", params=["one_node", "two_nodes", "windows"])
def world(request):
    """Collective. One node, and two nodes with messages or one-sided operations between them."""
    return request.getfixturevalue(request.param)


SIZES = [(300, 40), (2**19 + 1000, 2)]  # elements, rounds


@ALL
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(("n", "n_rounds"), SIZES)
def test_the_latest_is_never_a_mix(comm, n, n_rounds, slots):
    boxes = comm.mailboxes(n, np.float32, slots)
    rng = np.random.default_rng(comm.rank)
    seen = np.zeros(comm.size)
    values = np.empty(n, np.float32)
    for k in range(1, n_rounds + 1):
        values[:] = k * comm.size + comm.rank
        boxes.publish(values)
        values[:] = -1
        peer = uniform_peer(rng, comm.rank, comm.size) if comm.size > 1 else 0

        def check(box, peer=peer):
            number = box[0]
            assert np.all(box == number)
            assert number == 0 or number % comm.size == peer
            assert number >= seen[peer]  # no older than the last read
            seen[peer] = number

        boxes.latest(peer, check)
    comm.barrier()
    for peer in range(comm.size):
        boxes.latest(peer, lambda box, peer=peer: values.__setitem__(slice(None), box))
        assert np.all(values == n_rounds * comm.size + peer)


@ALL
@pytest.mark.parametrize(("n", "n_rounds"), SIZES)
def test_tags_stay_with_their_data(comm, n, n_rounds):
    boxes = comm.mailboxes(n, np.float32)
    rng = np.random.default_rng(comm.rank)

    def replace(box, tags):
        assert np.array_equal(tags, box[0] * np.arange(1, 5))
        assert box[-1] == box[0]
        number = rng.integers(1, 1000)
        box[:] = number
        tags[:] = number * np.arange(1, 5)

    for _ in range(n_rounds):
        boxes.update(int(rng.integers(comm.size)), replace)


@ALL
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(("n", "n_rounds"), SIZES)
def test_updates_of_one_box_by_all_lose_nothing(comm, n, n_rounds, slots):
    boxes = comm.mailboxes(n, np.float32, slots)
    target, slot = comm.size - 1, slots - 1

    def add_one(box, tags):
        box += 1
        tags[3] += 0.5

    for _ in range(n_rounds):
        boxes.update(target, add_one, slot)
    comm.barrier()
    found = []
    for rank in range(comm.size):
        for k in range(slots):
            boxes.update(rank, lambda box, tags: found.append((box.min(), box.max(), tags[3])), k)
    total = n_rounds * comm.size
    expected = [(0, 0, 0)] * (comm.size * slots)
    expected[target * slots + slot] = (total, total, total / 2)
    assert found == expected


@ALL
def test_a_visit_to_the_own_mailbox_is_no_exchange(comm):
    boxes = comm.mailboxes(100, np.float32)
    boxes.publish(np.ones(100, np.float32))
    boxes.update(comm.rank, lambda box, tags: None)
    boxes.latest(comm.rank, lambda box: None)
    assert (comm.statistics.n_exchanges, comm.statistics.bytes_sent) == (0, 0)
    boxes.update((comm.rank + 1) % comm.size, lambda box, tags: 7)
    others = int(comm.size > 1)
    assert (comm.statistics.n_exchanges, comm.statistics.bytes_sent) == (others, others * 400)
    assert comm.statistics.n_nonfinite == 7


@ALL
def test_receiving_counts_as_an_exchange_and_reading_does_not(comm):
    boxes = comm.mailboxes(50, np.float32, 2)
    peer, others = (comm.rank + 1) % comm.size, int(comm.size > 1)

    def fill(box, tags):
        box[:], tags[:] = comm.rank, [comm.rank, 1, 2, 3]

    boxes.update(comm.rank, fill, 1)
    comm.barrier()
    found = []

    def note(box, tags):
        found.append((set(box.tolist()), tags.tolist()))

    boxes.read(peer, note, 1)
    assert (comm.statistics.n_exchanges, comm.statistics.bytes_sent) == (0, 0)
    boxes.receive(peer, note, 1)
    assert (comm.statistics.n_exchanges, comm.statistics.bytes_sent) == (others, others * 200)
    boxes.update(peer, note, 1, pulls=True)  # both ways
    assert (comm.statistics.n_exchanges, comm.statistics.bytes_sent) == (2 * others, others * 600)
    assert found == [({float(peer)}, [peer, 1, 2, 3])] * 3
    assert boxes.peek(peer, 1).tolist() == [peer, 1, 2, 3]
    assert boxes.peek(peer, 0).tolist() == [0, 0, 0, 0]


@ALL
@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("n", [300, 2**15 + 1000])  # elements; of the larger ones, NumPy copies the vector
def test_a_posted_vector_is_averaged_with_its_weight_or_a_given_one(comm, n, is_prepared):
    boxes = comm.mailboxes(n, np.float32, 2)
    values, tags, x = np.full(n, comm.rank + 1, np.float32), np.zeros(4), np.zeros(n, np.float32)
    if is_prepared:
        boxes.prepare(values)
    values[0] = np.nan
    tags[WEIGHT_TAG] = comm.rank + 0.5
    boxes.post(values, tags, 1)
    boxes.post(None, tags + 1)
    comm.barrier()
    for peer in range(comm.size):
        for weight in (None, 0.25):
            x[:] = np.arange(n)
            used = boxes.average(peer, x, 3.0, weight, slot=1)
            assert used == (peer + 0.5 if weight is None else weight)
            expected = np.arange(n, dtype=np.float32)
            weighted_average(
                expected, np.where(np.arange(n) == 0, np.nan, peer + 1).astype(np.float32), used / (3 + used)
            )
            assert x.tobytes() == expected.tobytes()
        assert boxes.peek(peer).tolist() == [1, peer + 1.5, 1, 1]
    assert comm.statistics.n_exchanges == 2 * (comm.size - 1)
    assert comm.statistics.n_nonfinite == 2 * comm.size
    comm.barrier()


@ALL
def test_a_message_waits_for_the_owner_of_the_lock(comm):
    boxes, tags, x = comm.mailboxes(100, np.float32), np.zeros(4), np.zeros(100, np.float32)
    boxes.prepare(x)
    for number in range(1, 200):
        x[:] = number
        tags[:] = number
        boxes.post(x, tags)
        boxes.average((comm.rank + 1) % comm.size, x, 1.0, 1.0)
        assert np.all(x == x[0])
    comm.barrier()


@ALL
def test_nested_visits_in_the_order_of_ranks_do_not_deadlock(comm):
    boxes, rng, n_rounds = comm.mailboxes(300, np.float64), np.random.default_rng(comm.rank), 60
    for _ in range(n_rounds if comm.size > 1 else 0):
        first, second = sorted((comm.rank, uniform_peer(rng, comm.rank, comm.size)))

        def move(one, _, second=second):
            def both(other, _):
                assert np.all(one == one[0])
                assert np.all(other == other[0])
                one[:] += 1
                other[:] -= 1

            boxes.update(second, both)

        boxes.update(first, move)
    comm.barrier()
    found = []
    for rank in range(comm.size):
        boxes.read(rank, lambda box, _: found.append(float(box[0])))
    assert sum(found) == 0
