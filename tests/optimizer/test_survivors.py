"""The conditions under which ranks can continue after the death of another one."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from mpitrain import DPSGD, EASGD, AllReduceSGD, RobustSGD, UsageError
from mpitrain.collectives.rma.window import Window
from mpitrain.optimizer.survivors import Survivors, check_on_failure, prepare_for_deaths


def world(size=4, *, survives=True, n_nodes=1, gpu=None, service=None):
    ends = []
    tolerance = SimpleNamespace(leave_no_survivors=lambda: ends.append(True), ends=ends)
    facts = {"survives_failures": survives, "n_nodes": n_nodes, "gpu": gpu, "service": service}
    return SimpleNamespace(size=size, fault_tolerance=tolerance, **facts)


def between_nodes():
    return world(n_nodes=2, service=object())


@pytest.mark.parametrize(
    "ranks",
    [world(survives=False), world(gpu=object())],
    ids=["without ulfm", "on GPUs"],
)
def test_ranks_that_end_with_the_dead_cannot_continue(ranks):
    check_on_failure("stop", AllReduceSGD(), ranks)
    with pytest.raises(UsageError, match=r"on_failure=continue needs .* mpirun --with-ft ulfm") as error:
        check_on_failure("continue", AllReduceSGD(), ranks)
    assert error.value.on_all_ranks


def test_windows_between_nodes_do_not_survive_a_death():
    check_on_failure("continue", AllReduceSGD(), between_nodes())
    with pytest.raises(UsageError, match=r"MPITRAIN_BETWEEN_NODES=windows is set: remove it, or use stop") as error:
        check_on_failure("continue", AllReduceSGD(), world(n_nodes=2))
    assert error.value.on_all_ranks


@pytest.mark.parametrize(
    ("method", "options", "ends"),
    [
        pytest.param(AllReduceSGD(), {"on_failure": "stop"}, True, id="all-reduce, stop"),
        pytest.param(AllReduceSGD(), {"on_failure": "continue"}, False, id="all-reduce, continue"),
        pytest.param(EASGD(), {"on_failure": "stop"}, False, id="EASGD"),
        pytest.param(EASGD(), {"on_failure": "stop", "replica_size": 2}, True, id="EASGD of replica groups"),
    ],
)
def test_a_death_ends_all_ranks_of_several_nodes_where_ranks_wait_for_each_other(method, options, ends):
    ranks, node = between_nodes(), world()
    prepare_for_deaths(method=method, world=ranks, **options)
    prepare_for_deaths(method=method, world=node, **options)
    assert ranks.fault_tolerance.ends == [True] * ends
    assert not node.fault_tolerance.ends


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


@pytest.mark.parametrize("succeeded", [True, False])
def test_a_rank_whose_exchange_failed_releases_the_others_before_it_agrees(succeeded):
    """A rank may wait for it on a node or a rail without a dead rank, and would never come to the agreement."""
    events = []
    comms = {
        name: SimpleNamespace(Revoke=lambda name=name: events.append(name))
        for name in ("comm", "node_comm", "rail_comm")
    }
    tolerance = SimpleNamespace(agree=lambda value: events.append("agree") or value)
    part = SimpleNamespace(fault_tolerance=tolerance, waiting=lambda what: nullcontext(), **comms)
    vectors = SimpleNamespace(x=Window.__new__(Window), g=Window.__new__(Window))
    survivors = Survivors(SimpleNamespace(world=part, statistics=None, size=4), vectors, "float32")
    assert survivors.agree(succeeded) == succeeded
    assert events == ([] if succeeded else [*comms]) + ["agree"]
