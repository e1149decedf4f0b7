"""The peers that a method draws, and the worker that saves for all, when some workers have died."""

from types import SimpleNamespace

import numpy as np
import pytest
from support.quadratic import simulate

from mpitrain.algorithms import ADPSGD, GoSGD, GossipSGD
from mpitrain.algorithms.base.peers import alive_ranks, draw_peer, saves_shared_state

P, SEED, VICTIM, ALIVE, STEPS = 5, 7, 2, [0, 1, 3, 4], 12


def worker(rank, size, dead=()):
    return SimpleNamespace(rank=rank, size=size, dead=frozenset(dead))


@pytest.mark.parametrize(
    ("size", "dead", "saver"), [(1, (), 0), (4, (), 0), (4, (1, 3), 0), (4, (0,), 1), (5, (0, 1, 3), 2)]
)
def test_the_first_alive_worker_saves_the_shared_state(size, dead, saver):
    alive = [rank for rank in range(size) if rank not in dead]
    for rank in alive:
        comm = worker(rank, size, dead)
        assert alive_ranks(comm) == alive
        assert saves_shared_state(comm) == (rank == saver)


@pytest.mark.parametrize("rank", [0, 1, 3, 4])
def test_a_draw_is_the_nth_of_the_other_alive_workers(rank):
    others = [other for other in ALIVE if other != rank]
    drawn, again = np.random.default_rng(3), np.random.default_rng(3)
    peers = [draw_peer(worker(rank, P, [VICTIM]), drawn) for _ in range(200)]
    assert peers == [others[int(again.integers(len(others)))] for _ in range(200)]
    assert set(peers) == set(others)


def test_the_last_alive_worker_draws_no_peer():
    rng = np.random.default_rng(0)
    assert draw_peer(worker(1, 3, [0, 2]), rng) is None
    assert draw_peer(worker(0, 1), rng) is None


def others_of(rank, alive):
    return [other for other in alive if other != rank]


def ring_neighbours(rank, alive):
    return [other for other in sorted({(rank - 1) % P, (rank + 1) % P}) if other in alive]


@pytest.mark.parametrize(
    ("method", "hook", "candidates", "tosses"),
    [
        (GossipSGD(direction="pull"), "average_with", others_of, None),
        (GossipSGD(direction="push"), "average_with", others_of, None),
        (GoSGD(probability=0.6), "push_to", others_of, 0.6),
        (ADPSGD(topology="ring"), "average_with", ring_neighbours, None),
        (ADPSGD(topology="complete"), "average_with", others_of, None),
    ],
    ids=["pull", "push", "gosgd", "adpsgd-ring", "adpsgd-complete"],
)
def test_exactly_the_drawn_peer_is_addressed_before_and_after_a_death(method, hook, candidates, tosses):
    simulation = simulate(method, P, start=np.ones((P, 3)), eta=0.1, seed=SEED)
    addressed = {rank: [] for rank in range(P)}
    for rank, one in enumerate(simulation.workers):
        original = getattr(one, hook)

        def note(peer, rank=rank, original=original):
            addressed[rank].append((peer, VICTIM in simulation.world.dead))
            original(peer)

        setattr(one, hook, note)

    def kill(simulation, rank):
        if rank == VICTIM and simulation.workers[rank].t == 4:
            simulation.world.kill(VICTIM)

    simulation.run(STEPS, kill)
    for rank in ALIVE:
        rng, steps = np.random.default_rng([SEED, rank]), iter(addressed[rank])
        # In turn, ranks below the victim have made one more step than it has when it dies, those above it have not.
        alive_steps = 4 if rank < VICTIM else 3
        for step in range(STEPS):
            if tosses is not None and rng.random() >= tosses:
                continue
            dead = step >= alive_steps
            peers = candidates(rank, ALIVE if dead else list(range(P)))
            assert next(steps) == (peers[int(rng.integers(len(peers)))], dead)
        assert next(steps, None) is None
