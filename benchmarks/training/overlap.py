"""Measure training steps on a slow link, with exchanges in the foreground and in the background.

Two models with the same number of parameters, a ResNet-20's:

    resnet20    the network itself, on so small a batch that an exchange comes as often as anybody would want it
    made up     products of matrices for some milliseconds, so few that an exchange takes a good part of tau steps

Each is measured beside the same step without any exchange (alone) and, as the limit, beside that one while plain
sockets move as many bytes in the background: what the network costs by itself on the cores that also compute.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.micro.timing import slowest
from benchmarks.network import tcp
from benchmarks.training.steps import CLASSES, SHAPE, Step, sgd, step_of
from mpitrain import EASGD, DistributedOptimizer, models
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.collectives.mpi import MPICommunicator
from mpitrain.collectives.world.world import World
from mpitrain.kernels import sgd_step

if TYPE_CHECKING:
    from benchmarks.network.between import Pair

TAU = 10
RESNET, BATCH, TURNS_OF_RESNET = "resnet20", 8, 24
MADE_UP, STEP_SECONDS, TURNS_OF_MADE_UP = "made up", 0.016, 12
N_PARAMETERS = 269_722  # of a ResNet-20
ALONE, BY_SOCKETS = "alone", "as many bytes by sockets"
CALIBRATION_SECONDS = 0.5
SIDE = 300  # of the matrices

METHODS = {
    ALONE: EASGD(period=10**9),  # the next exchange is far away
    f"easgd, tau {TAU}, overlap": EASGD(period=TAU, overlap=True),  # follows what it is compared with
    f"easgd, tau {TAU}": EASGD(period=TAU),
}


@contextmanager
def resnet(world: World) -> Iterator[dict[str, Step]]:
    """Return steps of a ResNet-20 with torch.optim.SGD and momentum. Collective."""
    generator = torch.Generator().manual_seed(world.rank)
    batches = [(torch.randn(BATCH, *SHAPE, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator))]
    steps, optimizers = {}, []
    for name, method in METHODS.items():
        network = models.build(RESNET, shape=SHAPE, n_classes=CLASSES, seed=0)
        optimizers.append(DistributedOptimizer(sgd(network), network, method, world=world))
        steps[name] = step_of(network, optimizers[-1], batches)
    yield steps
    for optimizer in optimizers:
        optimizer.close()


@contextmanager
def made_up(world: World) -> Iterator[dict[str, Step]]:
    """Return steps that compute for ``STEP_SECONDS`` and change as many parameters as a ResNet-20 has. Collective."""
    a = np.ones((SIDE, SIDE), np.float32)
    product = np.empty_like(a)
    world.barrier()
    seconds, end = [], time.perf_counter() + CALIBRATION_SECONDS
    while time.perf_counter() < end:
        began = time.perf_counter()
        np.matmul(a, a, out=product)
        seconds.append(time.perf_counter() - began)
    n_products = world.comm.bcast(max(round(STEP_SECONDS / min(seconds)), 1))  # other threads may just be starting

    def step_with(method: EASGD) -> Step:
        x, g = (comm.vector(N_PARAMETERS, np.float32) for _ in range(2))
        worker, group_slices = method.worker(Replica(comm, x, g)), [ParamGroupSlice(slice(0, N_PARAMETERS), 0.0)]

        def local_update() -> None:
            for _ in range(n_products):
                np.matmul(a, a, out=product)
            sgd_step(x.local, g.local, 0.0, 0.0)

        return lambda: worker.step(group_slices, local_update)

    comm = MPICommunicator(world)
    steps = {name: step_with(method) for name, method in METHODS.items()}
    yield steps
    comm.free()


def measure(pair: Pair) -> list[dict[str, Any]]:
    """Measure each step of both models and return the rows. Collective."""
    torch.set_num_threads(1)
    rows = []
    for model, candidates, n_turns in ((RESNET, resnet, TURNS_OF_RESNET), (MADE_UP, made_up, TURNS_OF_MADE_UP)):
        with candidates(pair.world) as steps:
            for name, seconds, of_alone in turns(pair, steps, n_turns):
                rows.append({"model": model, "step": name, "median_seconds": seconds, "of_alone": of_alone})
    return rows


def turns(pair: Pair, steps: dict[str, Step], n_turns: int) -> list[tuple[str, float, float]]:
    """Time steps by name: the slowest rank's median seconds, and the median share of the time alone in the same turn.

    Collective. What sockets cost is added to the steps.
    """
    world = pair.world
    seconds = np.zeros((len(steps) + 1, n_turns))
    with pair.connected() as connection:
        n_bytes = 4 * N_PARAMETERS * world.size // world.n_nodes  # what leaves a node in an exchange of all its ranks
        by_sockets = tcp.Exchanges(connection, n_bytes) if connection else None
        t = itertools.count()

        def beside_sockets() -> None:
            if by_sockets and next(t) % TAU == 0:
                by_sockets.start()
            steps[ALONE]()

        candidates = {**steps, BY_SOCKETS: beside_sockets}
        for turn in range(-1, n_turns):  # the first warms up
            for row, step in zip(seconds, candidates.values(), strict=True):
                world.barrier()
                began = time.perf_counter()
                for _ in range(TAU):
                    step()
                row[max(turn, 0)] = (time.perf_counter() - began) / TAU
        if by_sockets:
            by_sockets.stop()
    seconds = slowest(world, seconds)
    of_alone = np.median(seconds / seconds[0], axis=1)  # of a turn: its steps follow each other closely
    return [*zip(candidates, np.median(seconds, axis=1).tolist(), of_alone.tolist(), strict=True)]
