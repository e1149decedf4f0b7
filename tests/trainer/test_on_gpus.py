"""A run with vectors in device memory: metrics, checkpoints, result and resume."""

import json

import numpy as np
import pytest
from support.on_gpus import gpus

from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.loop import train

pytestmark = [pytest.mark.ranks(2), pytest.mark.time_limit(180)]


@pytest.mark.parametrize(
    ("algorithm", "transport"),
    [
        ("easgd", "ipc"),
        ("downpour", "staged"),
        ("gossip", "ipc"),
        ("slowmo", "staged"),
    ],
)
def test_a_run_is_written_and_resumed(world, mpi_tmp_path, algorithm, transport):
    out = mpi_tmp_path / f"{algorithm}-{transport}"
    more = {"data": "synthetic", "algorithm": algorithm, "quiet": True, "out": str(out), "checkpoint_every": 4}
    with gpus(1, transport) as comm:
        result = train(TrainConfig(steps=8, evaluate_every=4, **more), comm.world)
        assert result["complete"]
        assert np.isfinite(result["test_loss"])
        assert type(result["n_nonfinite"]) is int
        if comm.rank == 0:
            assert json.loads((out / "result.json").read_text())["complete"]
            assert "vectors on GPUs, shared" in (out / "config.json").read_text()
        comm.world.barrier()
        again = train(TrainConfig.of_run(out, settings={}, steps=12), comm.world, resume=out)
    assert again["steps"] == 12
    assert np.isfinite(again["test_loss"])
