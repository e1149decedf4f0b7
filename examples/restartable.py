"""A training script that a batch job can interrupt and continue: jobs/script.sbatch runs it.

    RUN=runs/own sbatch --nodes=2 --ntasks-per-node=4 jobs/script.sbatch examples/restartable.py --epochs 20
    RUN=runs/own jobs/local.sh 4 python examples/restartable.py           # without a batch system

SIGUSR1 makes it save and end with exit code 3; started again with the same RUN, it continues. Every rank saves its own
part of the state, and an all-reduce makes all ranks stop after the same step.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits

import mpitrain

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--save-every", type=int, default=50, help="steps")
options = parser.parse_args()
run = Path(os.environ["RUN"])
checkpoints = run / "checkpoints"

asked_to_stop = False


def ask_to_stop(*_) -> None:
    global asked_to_stop
    asked_to_stop = True


signal.signal(signal.SIGUSR1, ask_to_stop)  # before init(), which takes a while

world = mpitrain.init()
digits = load_digits()
images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
torch.manual_seed(0)  # equal weights on all ranks
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)).to(world.device)
base = torch.optim.SGD(model.parameters(), lr=0.1)
order = torch.Generator().manual_seed(world.rank)
n_steps = options.epochs * len(images) // (32 * world.size)


def save(step: int) -> None:
    """Save this rank's part; the checkpoint counts once rank 0 has given it its name. Collective."""
    partial = checkpoints / f".step-{step:06d}"
    partial.mkdir(parents=True, exist_ok=True)
    state = {"optimizer": optimizer.state_dict(), "order": order.get_state(), "step": step}
    torch.save(state, partial / f"rank-{world.rank}.pt")
    world.barrier()
    if world.rank == 0:
        partial.rename(checkpoints / f"step-{step:06d}")
    world.barrier()


with mpitrain.DistributedOptimizer(base, model, mpitrain.AllReduceSGD()) as optimizer:
    saved = sorted(checkpoints.glob("step-*"))
    first = 0
    if saved:
        state = torch.load(saved[-1] / f"rank-{world.rank}.pt", weights_only=False)
        optimizer.load_state_dict(state["optimizer"])
        order.set_state(state["order"])
        first = state["step"]
    for step in range(first, n_steps):
        batch = torch.randint(len(images), (32,), generator=order)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[batch].to(world.device)), labels[batch].to(world.device))
        loss.backward()
        optimizer.step(loss)
        stop = world.comm.allreduce(asked_to_stop) > 0  # the signal reaches the ranks at different steps
        if stop or (step + 1) % options.save_every == 0:
            save(step + 1)
        if stop:
            sys.exit(3)
    if world.rank == 0:
        with optimizer.consensus(), torch.no_grad():
            accuracy = (model(images.to(world.device)).argmax(1).cpu() == labels).float().mean().item()
        result = {"train_accuracy": accuracy, "steps": n_steps, "resumed_at": first}
        run.mkdir(parents=True, exist_ok=True)
        (run / "result.json").write_text(json.dumps(result) + "\n")
        print(result)
