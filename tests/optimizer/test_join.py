"""Unequal numbers of steps inside ``optimizer.join()``: a mean is that over the ranks that still make steps.

Rank r has the loss h_r (w - b_r)^2 / 2 and makes N_STEPS[r] steps. The numbers below are the equations, in float64.
"""

import numpy as np
import pytest
import torch
from torch import nn

from mpitrain import (
    DPSGD,
    EASGD,
    AllReduceSGD,
    Average,
    DiLoCo,
    DistributedOptimizer,
    GossipSGD,
    LocalSGD,
    RobustSGD,
    SlowMo,
    StochasticGradientPush,
    UsageError,
)

pytestmark = [pytest.mark.ranks(3), pytest.mark.time_limit(180)]

ETA, MOMENTUM = 0.1, 0.9
H, B, N_STEPS = np.array([0.5, 1.0, 2.0]), np.array([1.0, -2.0, 3.0]), np.array([3, 8, 5])


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64))


def train(world, method, *, momentum=0.0, average=None, joins=True, epochs=1):
    """Return this rank's parameter and the consensus after ``N_STEPS[rank]`` steps, and the optimizer. Collective."""
    model, rank = Point(), world.rank
    base = torch.optim.SGD(model.parameters(), lr=ETA, momentum=momentum)
    optimizer = DistributedOptimizer(base, model, method, average=average)
    for _ in range(epochs):
        with optimizer.join():
            for _ in range(N_STEPS[rank]):
                optimizer.zero_grad()
                (H[rank] * (model.w - B[rank]).square().sum() / 2).backward()
                optimizer.step()
    world.barrier()
    own, consensus = float(model.w[0].detach()), float(optimizer.consensus_vector()[0])
    world.barrier()
    return own, consensus, optimizer


def active(p, t):
    """Return which of p ranks make step t = 0, 1, ..."""
    return N_STEPS[:p] > t


@pytest.mark.parametrize("node_shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_mean_gradient_is_that_of_the_ranks_that_make_the_step(world, node_shared, epochs):
    p, w, v = world.size, 0.5, 0.0
    for t in list(range(N_STEPS[:p].max())) * epochs:
        left = active(p, t)
        g = (H[:p] * (w - B[:p]))[left].mean()
        v = MOMENTUM * v + g
        w -= ETA * v
    own, consensus, optimizer = train(world, AllReduceSGD(node_shared=node_shared), momentum=MOMENTUM, epochs=epochs)
    assert own == pytest.approx(w, rel=1e-12)
    assert consensus == pytest.approx(w, rel=1e-12)
    assert world.allgather(own) == [own] * p
    optimizer.close()


@pytest.mark.parametrize("period", [2, 3])
def test_a_round_is_averaged_over_the_ranks_that_have_made_a_step_in_it(world, period):
    p = world.size
    x = np.full(p, 0.5)
    for t in range(N_STEPS[:p].max()):
        left = active(p, t)
        x[left] -= ETA * (H[:p] * (x - B[:p]))[left]
        if (t + 1) % period == 0:
            x[:] = x[N_STEPS[:p] > t + 1 - period].mean()
    own, consensus, optimizer = train(world, LocalSGD(period=period))
    assert own == pytest.approx(x[world.rank], rel=1e-12)
    assert consensus == pytest.approx(x.mean(), rel=1e-12)
    optimizer.close()


def test_outer_steps_use_the_displacements_of_the_ranks_that_have_made_a_step(world):
    """DiLoCo: b <- m*b + D;  theta <- theta - a*(D + m*b)."""
    p, period, a, m = world.size, 2, 0.7, 0.9
    x, theta, b = np.full(p, 0.5), 0.5, 0.0
    for t in range(N_STEPS[:p].max()):
        left = active(p, t)
        x[left] -= ETA * (H[:p] * (x - B[:p]))[left]
        if (t + 1) % period == 0:
            d = (theta - x)[N_STEPS[:p] > t + 1 - period].mean()
            b = m * b + d
            theta -= a * (d + m * b)
            x[:] = theta
    _, consensus, optimizer = train(world, DiLoCo(period=period, outer_learning_rate=a, outer_momentum=m))
    assert consensus == pytest.approx(theta, rel=1e-12)
    optimizer.close()


@pytest.mark.parametrize("method", [DPSGD(topology="complete"), StochasticGradientPush()], ids=["dpsgd", "sgp"])
def test_the_mean_of_gossiping_ranks_moves_by_the_gradients_of_those_that_make_steps(world, method):
    """The sum of x_i moves by -eta*g_i alone; in a complete graph all x_i are equal after each exchange."""
    p = world.size
    if method.name == "sgp" and p == 3:
        own, consensus, optimizer = train(world, method)
        assert np.isfinite([own, consensus]).all()
        optimizer.close()
        return
    x = np.full(p, 0.5)
    for t in range(N_STEPS[:p].max()):
        gradient = np.where(active(p, t), H[:p] * (x - B[:p]), 0.0)
        x = x.mean() - ETA * gradient if method.name == "dpsgd" else np.full(p, (x - ETA * gradient).mean())
    _, consensus, optimizer = train(world, method)
    assert consensus == pytest.approx(x.mean(), rel=1e-12)
    optimizer.close()


def test_a_synchronous_center_goes_on_with_ranks_that_make_no_steps(world):
    """x_i <- x_i - eta*g_i - alpha*(x_i - c), without the gradient where a rank has ended;  c <- c + alpha*sum."""
    p, alpha = world.size, 0.2
    x, c = np.full(p, 0.5), 0.5
    for t in range(N_STEPS[:p].max()):
        gradient, pull = np.where(active(p, t), H[:p] * (x - B[:p]), 0.0), alpha * (x - c)
        x, c = x - ETA * gradient - pull, c + pull.sum()
    own, consensus, optimizer = train(world, EASGD(moving_rate=alpha, period=1, synchronous=True))
    assert own == pytest.approx(x[world.rank], rel=1e-12)
    assert consensus == pytest.approx(c, rel=1e-12)
    optimizer.close()


def test_an_average_of_the_iterates_joins_with_its_method(world):
    own, consensus, optimizer = train(world, SlowMo(period=2), average=Average("moving", 0.5))
    assert np.isfinite([own, consensus]).all()
    optimizer.close()


def test_nobody_waits_for_asynchronous_ranks(world):
    own, _, optimizer = train(world, GossipSGD())
    assert np.isfinite(own)
    optimizer.close()


def test_what_cannot_leave_a_rank_out_is_refused(world):
    model = Point()
    base = torch.optim.SGD(model.parameters(), lr=ETA)
    for method in (RobustSGD(n_byzantine=0), AllReduceSGD(overlap=True)):
        with (
            DistributedOptimizer(base, model, method) as optimizer,
            pytest.raises(UsageError, match=r"is not for"),
        ):
            optimizer.join()
    with DistributedOptimizer(base, model, AllReduceSGD()) as optimizer:
        with optimizer.join():
            with pytest.raises(UsageError, match="inside another join"), optimizer.join():
                pass
            model.w.grad = torch.ones(3, dtype=torch.float64)
            with pytest.raises(UsageError, match="clip_grad_norm_ inside join"):
                optimizer.clip_grad_norm_(1.0)
        world.barrier()
