"""The scoreboard: every rank reads the values of all ranks, also during writes."""

import numpy as np
import pytest

ALL = pytest.mark.ranks(1, 2, 3, 5)


@pytest.fixture
def scoreboard(world):
    from mpitrain.collectives.rma.scoreboard import Scoreboard

    made = Scoreboard(world, ["step", "loss"])
    yield made
    world.comm.Barrier()
    made.free()


@ALL
def test_all_ranks_read_all_values(world, scoreboard):
    assert {name: list(row) for name, row in scoreboard.read().items()} == {
        "step": [0] * world.size,
        "loss": [0] * world.size,
    }
    world.barrier()
    scoreboard.write(step=world.rank + 1)
    scoreboard.write(loss=-0.5 * world.rank)
    world.barrier()
    numbers = scoreboard.read()
    assert np.array_equal(numbers["step"], np.arange(world.size) + 1)
    assert np.array_equal(numbers["loss"], -0.5 * np.arange(world.size))


@ALL
def test_a_name_may_have_several_values(world):
    from mpitrain.collectives.rma.scoreboard import Scoreboard

    scoreboard = Scoreboard(world, ["step", ("histogram", 3), "loss"])
    scoreboard.write(step=world.rank, histogram=[world.rank, 1, 2], loss=0.5)
    world.barrier()
    numbers = scoreboard.read()
    assert numbers["histogram"].tolist() == [[rank, 1, 2] for rank in range(world.size)]
    assert numbers["step"].tolist() == list(range(world.size))
    last = world.size - 1
    assert scoreboard.read_rank(last) == {"step": last, "histogram": [last, 1, 2], "loss": 0.5}
    world.barrier()
    scoreboard.free()


@pytest.mark.ranks(2, 3, 5)
def test_the_values_of_other_nodes_are_fetched_concurrently(monkeypatch, two_nodes):
    from mpitrain.collectives.rma.scoreboard import Scoreboard

    scoreboard, calls = Scoreboard(two_nodes, ["step"]), []
    for name in ("get", "flush"):
        original = getattr(scoreboard._window, name)
        monkeypatch.setattr(
            scoreboard._window, name, lambda *args, f=original, name=name: (calls.append(name), f(*args))
        )
    scoreboard.write(step=two_nodes.rank + 1)
    two_nodes.barrier()
    assert scoreboard.read()["step"].tolist() == list(range(1, two_nodes.size + 1))
    remote = two_nodes.size - two_nodes.local_size
    assert calls == ["get"] * remote + ["flush"] * remote
    two_nodes.barrier()
    scoreboard.free()


@ALL
@pytest.mark.parametrize("where", ["one_node", "two_nodes"])
def test_a_value_of_another_rank_is_written_in_its_place(where, request):
    from mpitrain.collectives.rma.scoreboard import Scoreboard

    world = request.getfixturevalue(where)
    scoreboard = Scoreboard(world, ["step", ("histogram", 3), "loss", "signal"])
    scoreboard.write(step=world.rank, histogram=[1, 2, 3], loss=0.5)
    world.barrier()
    scoreboard.write_to((world.rank + 1) % world.size, signal=10 + world.rank)
    world.barrier()
    found = scoreboard.read()
    assert found["signal"].tolist() == [10 + (rank - 1) % world.size for rank in range(world.size)]
    assert found["step"].tolist() == list(range(world.size))
    assert found["histogram"].tolist() == [[1, 2, 3]] * world.size
    assert found["loss"].tolist() == [0.5] * world.size
    world.barrier()
    scoreboard.free()


@ALL
def test_a_result_is_a_copy(world, scoreboard):
    before = scoreboard.read()
    world.barrier()
    scoreboard.write(step=9)
    world.barrier()
    scoreboard.read()
    assert not before["step"].any()


@ALL
def test_concurrent_reads_see_whole_values_in_order(world, scoreboard):
    last = np.zeros(world.size)
    for k in range(1, 201):
        scoreboard.write(step=2.0**k)
        steps = scoreboard.read()["step"]
        assert np.all(np.isin(steps, [0.0, *2.0 ** np.arange(1, 201)]))
        assert np.all(steps >= last)
        assert steps[world.rank] == 2.0**k
        last = steps
