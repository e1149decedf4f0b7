"""The steps of the all-reduce algorithms: every send meets its receive, and their number is that of the papers."""

import math

import pytest

from mpitrain.collectives.topology.allreduce_steps import ALGORITHMS, buffer_size

SIZES = (1, 2, 3, 4, 5, 7, 8, 12, 33, 64, 100)


def length(part):
    return part.stop - part.start


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_messages_between_two_ranks_are_sent_and_received_in_the_same_order(algorithm, size):
    n = 1000
    steps = {rank: list(ALGORITHMS[algorithm](rank, size, n)) for rank in range(size)}
    sent, received = {}, {}
    for rank, of_rank in steps.items():
        for step in of_rank:
            if step.target is not None:
                sent.setdefault((rank, step.target), []).append(step.sent)
            if step.source is not None:
                received.setdefault((step.source, rank), []).append(step.received)
                assert not step.adds or length(step.received) <= buffer_size(algorithm, size, n)
    assert sent == received
    assert all(one != other for one, other in sent)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100, 1000, 1024])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_rank_makes_as_many_steps_and_sends_as_many_elements_as_the_papers_say(algorithm, size):
    n = 16 * 1024 * 15  # parts are equal up to an alignment of 16 elements
    core, k = 2 ** int(math.log2(size)), int(math.log2(size))
    around = 2 * (core < size)
    n_steps = {"ring": 2 * (size - 1), "doubling": k + around, "halving": 2 * k + around}[algorithm]
    elements = {
        "ring": 2 * n * (size - 1) / size,
        "doubling": n * k + n * (core < size),
        "halving": 2 * n * (core - 1) / core + n * (core < size),
    }[algorithm]
    of_ranks = [list(ALGORITHMS[algorithm](rank, size, n)) for rank in {0, 1, size // 2, size - 1} if rank < size]
    assert max(map(len, of_ranks)) == n_steps
    assert max(sum(length(step.sent) for step in steps) for steps in of_ranks) == pytest.approx(
        elements, abs=16 * n_steps
    )
