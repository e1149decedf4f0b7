"""The board: every rank reads what every rank has written, also while it is written."""

import numpy as np
import pytest

ALL = pytest.mark.ranks(1, 2, 3, 4, 5)


@pytest.fixture
def board(world):
    from mpitrain.collectives.rma.scoreboard import Scoreboard

    made = Scoreboard(world, ["step", "loss"])
    yield made
    world.comm.Barrier()
    made.free()


@ALL
def test_everybody_reads_all_numbers(world, board):
    assert {name: list(row) for name, row in board.read().items()} == {
        "step": [0] * world.size,
        "loss": [0] * world.size,
    }
    world.barrier()
    board.write(step=world.rank + 1)
    board.write(loss=-0.5 * world.rank)
    world.barrier()
    numbers = board.read()
    assert np.array_equal(numbers["step"], np.arange(world.size) + 1)
    assert np.array_equal(numbers["loss"], -0.5 * np.arange(world.size))


@ALL
def test_several_numbers_go_by_one_name(world):
    from mpitrain.collectives.rma.scoreboard import Scoreboard

    board = Scoreboard(world, ["step", ("histogram", 3), "loss"])
    board.write(step=world.rank, histogram=[world.rank, 1, 2], loss=0.5)
    world.barrier()
    numbers = board.read()
    assert numbers["histogram"].tolist() == [[rank, 1, 2] for rank in range(world.size)]
    assert numbers["step"].tolist() == list(range(world.size))
    last = world.size - 1
    assert board.read_rank(last) == {"step": last, "histogram": [last, 1, 2], "loss": 0.5}
    world.barrier()
    board.free()


@pytest.mark.ranks(2, 3, 4, 5)
def test_the_numbers_of_other_nodes_are_on_their_way_together(monkeypatch, two_nodes):
    from mpitrain.collectives.rma.scoreboard import Scoreboard

    board, calls = Scoreboard(two_nodes, ["step"]), []
    for name in ("get", "flush"):
        original = getattr(board._window, name)
        monkeypatch.setattr(board._window, name, lambda *args, f=original, name=name: (calls.append(name), f(*args)))
    board.write(step=two_nodes.rank + 1)
    two_nodes.barrier()
    assert board.read()["step"].tolist() == list(range(1, two_nodes.size + 1))
    remote = two_nodes.size - two_nodes.local_size
    assert calls == ["get"] * remote + ["flush"] * remote
    two_nodes.barrier()
    board.free()


@ALL
def test_what_was_read_stays_as_it_was(world, board):
    before = board.read()
    world.barrier()
    board.write(step=9)
    world.barrier()
    board.read()
    assert not before["step"].any()


@ALL
def test_reading_while_others_write_sees_whole_numbers_in_their_order(world, board):
    last = np.zeros(world.size)
    for k in range(1, 201):
        board.write(step=2.0**k)
        steps = board.read()["step"]
        assert np.all(np.isin(steps, [0.0, *2.0 ** np.arange(1, 201)]))
        assert np.all(steps >= last)
        assert steps[world.rank] == 2.0**k
        last = steps
