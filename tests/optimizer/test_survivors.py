"""The conditions under which ranks can continue after the death of another one."""

from types import SimpleNamespace

import pytest

from mpitrain import DPSGD, EASGD, AllReduceSGD, RobustSGD, UsageError
from mpitrain.optimizer.survivors import check_on_failure


def world(size=4, *, survives=True, n_nodes=1, gpu=None):
    return SimpleNamespace(size=size, survives_failures=survives, n_nodes=n_nodes, gpu=gpu)


@pytest.mark.parametrize(
    "ranks",
    [world(survives=False), world(n_nodes=2), world(gpu=object())],
    ids=["without ulfm", "two nodes", "on GPUs"],
)
def test_ranks_that_end_with_the_dead_cannot_continue(ranks):
    check_on_failure("stop", AllReduceSGD(), ranks)
    with pytest.raises(UsageError, match=r"on_failure=continue needs .* mpirun --with-ft ulfm") as error:
        check_on_failure("continue", AllReduceSGD(), ranks)
    assert error.value.on_all_ranks


def test_asynchronous_methods_and_single_ranks_accept_it_anywhere():
    check_on_failure("continue", EASGD(), world(survives=False))
    check_on_failure("continue", AllReduceSGD(), world(1, survives=False))


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        pytest.param(DPSGD(topology="torus:2x2"), "torus", id="a graph of 4"),
        pytest.param(RobustSGD(rule="krum", n_byzantine=1), "among 4 workers", id="1 of 5 Byzantine"),
    ],
)
def test_what_fits_this_number_of_workers_only_is_refused(method, reason):
    with pytest.raises(UsageError, match=f"on_failure=continue is not possible here: .*{reason}.*; use stop"):
        check_on_failure("continue", method, world(4 if method.name == "dpsgd" else 5))
