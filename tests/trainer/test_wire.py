"""Training between two nodes with compressed vectors on the wire."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.on_ranks import ranks
from torch import nn

from mpitrain import EASGD, AllReduceSGD, DistributedOptimizer
from mpitrain.cli.main import main
from mpitrain.errors import UsageError
from mpitrain.kernels.native.wire import FORMATS
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.loop import train

pytestmark = pytest.mark.time_limit(180)


@pytest.mark.ranks(3)  # two on one node, one on the other
@pytest.mark.parametrize(("name", "wire"), [("easgd", "int8"), ("allreduce", "bfloat16")])
def test_the_digits_are_learned(name, wire, mpi_tmp_path):
    folder = Path(mpi_tmp_path) / "run"
    config = TrainConfig(name, wire=wire, epochs=4, batch_size=16, out=str(folder), quiet=True)
    with ranks(2) as comm:
        result = train(config, comm.world)
    assert result["test_accuracy"] >= 0.9
    assert result["n_nonfinite"] == 0
    assert result["wire"] == wire
    assert json.loads((folder / "config.json").read_text())["config"]["wire"] == wire


def step(optimizer, model, rank):
    optimizer.zero_grad()
    model(torch.full((1, 8), float(rank + 1))).square().sum().backward()
    optimizer.step()


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("wire", FORMATS)
def test_ranks_in_step_stay_equal(wire, monkeypatch):
    from mpitrain.collectives.topology import allreduce_cost

    monkeypatch.setattr(allreduce_cost, "choose", lambda *_: "ring")
    with ranks(2) as comm:
        model = nn.Linear(8, 30)
        base = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        with DistributedOptimizer(base, model, AllReduceSGD(), world=comm.world, wire=wire) as optimizer:
            for _ in range(5):
                step(optimizer, model, comm.rank)
            found = torch.cat([p.detach().ravel() for p in model.parameters()]).numpy().tobytes()
            assert len(set(comm.world.comm.allgather(found))) == 1
            on_rail = comm.world.local_rank < comm.world.n_rails
            assert (optimizer.statistics.wire_bytes > 0) == on_rail


@pytest.mark.ranks(2, 3)
def test_a_state_that_is_loaded_owes_nothing():
    """Residuals that were not sent belong to the previous center."""
    with ranks(2) as comm:
        model = nn.Linear(8, 30)
        base = torch.optim.SGD(model.parameters(), lr=1e-3)
        with DistributedOptimizer(base, model, EASGD(period=1), world=comm.world, wire="int8") as optimizer:
            residuals = optimizer._parts.replica.worker._center.vector._blocks.residuals
            for _ in range(3):
                step(optimizer, model, comm.rank)
            comm.barrier()
            state, center = optimizer.state_dict(), optimizer.consensus_vector().copy()
            assert sum(comm.world.comm.allgather(sum(int(left.any()) for left in residuals.values())))
            comm.barrier()
            step(optimizer, model, comm.rank)
            optimizer.load_state_dict(state)
            after = optimizer.consensus_vector().copy()
            comm.barrier()
        assert not residuals
        np.testing.assert_array_equal(after, center)  # to the bit, whatever travels


def test_a_format_that_does_not_exist_is_refused(capsys):
    with pytest.raises(UsageError, match="fp8"):
        TrainConfig(wire="fp8")
    with pytest.raises(SystemExit):
        main(["train", "--wire", "fp8"])
    assert "--wire" in capsys.readouterr().err
