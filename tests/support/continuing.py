"""Run on ranks, by test_continuing.py: several synchronous methods in turn, and ranks are killed between two of them.

    continuing.py VICTIM:STEP,VICTIM:STEP N_STEPS

Rank i minimizes h_i (x - b_i)^2 / 2. In its step number STEP (from 0), rank VICTIM is killed after the step of the
first method. Each survivor prints a JSON document with the parameters of each method and what it knows of the others.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import numpy as np
import torch

import mpitrain
from mpitrain import DistributedOptimizer
from mpitrain.algorithms import Method
from mpitrain.trainer.compiler import do_without_compiler

H, B = [0.5, 1.0, 2.0, 0.8], [1.0, -2.0, 0.5, 3.0]
ETA, MOMENTUM, N = 0.1, 0.9, 8
METHODS: dict[str, Method] = {
    "allreduce": mpitrain.AllReduceSGD(),
    "localsgd": mpitrain.LocalSGD(period=4),
    "slowmo": mpitrain.SlowMo(period=4),
    "dpsgd": mpitrain.DPSGD(),
    "sgp": mpitrain.StochasticGradientPush(),
}


def main() -> None:
    kills = [tuple(map(int, kill.split(":"))) for kill in sys.argv[1].split(",")]
    n_steps = int(sys.argv[2])
    world = mpitrain.init()
    do_without_compiler()  # its import takes a second on every rank
    models, optimizers = {}, {}
    for name, method in METHODS.items():
        models[name] = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(N, dtype=torch.float64))])
        base = torch.optim.SGD(models[name].parameters(), lr=ETA, momentum=MOMENTUM)
        optimizers[name] = DistributedOptimizer(base, models[name], method, on_failure="continue")
    for t in range(n_steps):
        for name, optimizer in optimizers.items():
            if (world.rank, t) in kills and name == "localsgd":
                os.kill(os.getpid(), signal.SIGKILL)
            x = models[name][0]
            x.grad = H[world.rank] * (x.detach() - B[world.rank])
            optimizer.step()
    found = {}
    for name, optimizer in optimizers.items():
        state = optimizer.state_dict()
        found[name] = {
            "x": models[name][0].tolist(),
            "members": optimizer.members,
            "saved": [state["rank"], state["ranks"]],
        }
        optimizer.finalize()
        found[name]["consensus"] = np.asarray(optimizer.consensus_vector()).tolist()
        optimizer.close()
    world.barrier()
    print(json.dumps({"rank": world.rank, "dead": sorted(world.dead), "methods": found}), flush=True)


if __name__ == "__main__":
    main()
