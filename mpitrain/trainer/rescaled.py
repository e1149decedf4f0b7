"""The trainer's state with which q ranks continue from a checkpoint of p ranks (see ``optimizer.rescaled_state``).

gradients        the total stays the same, and is divided evenly between the ranks
position         in the data and in the budget: gradients/q for a budget of all ranks (epochs, gradients), else the
                 mean of the ranks' positions (steps, minutes)
step             that of rank 0, so that the numbers in the names of checkpoints keep growing
counters         the total stays the same: rank 0 continues with it, and the other ranks with 0
buffers          the mean of the ranks' floating-point buffers
random numbers   new generators, with other seeds than at the start of the run
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mpitrain.collectives.world.survivor_collectives import broadcast
from mpitrain.collectives.world.world import World
from mpitrain.data.sampler import torch_seed
from mpitrain.records.checkpoint import Parts
from mpitrain.trainer.config import TrainConfig

SUMMED = ("compute_seconds", "exchange_seconds", "cpu_seconds", "serving_cpu_seconds")
OF_THE_LEAD = ("points", "snapshots", "module_states", "has_evaluated_end")


class OptimizerStates(Sequence[dict[str, Any]]):
    """The optimizer's states in the parts of a checkpoint, without those of dead ranks.

    If a rank was dead when the checkpoint was written, its part is a copy of another rank's part. Such parts are left
    out.

    Args:
        parts: The parts.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._ranks = [rank for rank, part in enumerate(parts) if part["optimizer"]["rank"] == rank]

    def __len__(self) -> int:
        return len(self._ranks)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        state = self._parts[self._ranks[index]]["optimizer"]
        return {**state, "rank": index, "ranks": len(self)}


def load(parts: Parts, config: TrainConfig, world: World) -> dict[str, Any]:
    """Return the state from which this rank continues. Collective; rank 0 reads the parts.

    On rank 0, the entry ``optimizer`` contains the states of all former ranks. On other ranks, it is empty.
    """
    own: dict[str, Any] = {"optimizer": ()}

    def make() -> dict[str, Any]:
        own["optimizer"] = OptimizerStates(parts)
        own.update({name: parts[0][name] for name in OF_THE_LEAD})
        return merge(parts, of_all_ranks=config.epochs is not None or config.gradients is not None, size=world.size)

    merged = broadcast(world, make)
    total = merged.pop("total_gradients")
    own["gradients"] = total // world.size + (world.rank < total % world.size)
    if world.rank != 0:
        merged |= dict.fromkeys(SUMMED, 0.0)
        merged["statistics"] = {name: value * 0 for name, value in merged["statistics"].items()}
    own["seed"] = torch_seed((config.seed * 100_003 + world.rank) * 1_000_003 + 1 + total)
    return {**merged, **own}


def merge(parts: Sequence[dict[str, Any]], *, of_all_ranks: bool, size: int) -> dict[str, Any]:
    """Return the state of the trainer from which all ranks continue. Local.

    Args:
        parts: The parts of all former ranks.
        of_all_ranks: Whether the budget counts the gradients of all ranks.
        size: The new number of ranks.
    """
    first, n = parts[0], len(parts)
    total = sum(int(part["gradients"]) for part in parts)
    position = total // size if of_all_ranks else sum(int(part["position"]) for part in parts) // n
    losses = [part["loss"] for part in parts if np.isfinite(part["loss"])]
    return {
        "options": first["options"],
        "step": first["step"],
        "position": position,
        "total_gradients": total,
        "seconds": first["seconds"],
        "passes": first.get("passes", {}),
        "loss": float(np.mean(losses)) if losses else float("nan"),
        "statistics": {name: sum(part["statistics"][name] for part in parts) for name in first["statistics"]},
        **{name: sum(part[name] for part in parts) for name in SUMMED},
        "buffers": dict(_mean_of_buffers(parts)),
    }


def _mean_of_buffers(parts: Sequence[dict[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, buffer in parts[0]["buffers"].items():
        if buffer.is_floating_point():
            mean = sum(part["buffers"][name].double() for part in parts) / len(parts)
            yield name, torch.as_tensor(mean).to(buffer.dtype)
        else:
            yield name, buffer
