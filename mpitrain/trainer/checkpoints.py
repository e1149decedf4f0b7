"""The hook that saves a run, and continues one from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mpitrain.collectives.world.phases import CHECKPOINT
from mpitrain.collectives.world.survivor_collectives import gather
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError
from mpitrain.log import logger
from mpitrain.optimizer.phase import phase_of
from mpitrain.records import checkpoint
from mpitrain.records.checkpoint_writer import CheckpointWriter
from mpitrain.trainer import rescaled
from mpitrain.trainer.agreement import deciding_options, require_options_of_checkpoint
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.evaluation import Evaluations
from mpitrain.trainer.run import Hook, Run


class Checkpoints(Hook):
    """The checkpoints of a run.

    Each rank writes its part: the state of the optimizer and of the random generators, the counters and the
    evaluations. All ranks stop for a snapshot, and continue while it is written to disk.

    Args:
        evaluations: The hook that evaluates the run.
        saved_at: This rank's step in the checkpoint from which the run continues; None in a new run.
    """

    def __init__(self, evaluations: Evaluations, saved_at: int | None = None) -> None:
        self._evaluations, self._saved_at = evaluations, saved_at
        self._last: dict[str, Any] | None = None  # the state before the last exchange, to be written at the end
        self._writer: CheckpointWriter | None = None

    def is_due(self, run: Run) -> bool:
        """Return whether a checkpoint follows this rank's step. Local."""
        return run.folder is not None and run.calendar.checkpoint_is_due(run.position)

    def save(self, run: Run) -> None:
        """Stop all ranks and the clock for a snapshot, and start to write it. Collective."""
        with run.clock.paused(), phase_of(CHECKPOINT):
            run.optimizer.wait()
            run.world.barrier()
            self._write(run, _state_of(run))

    def on_step(self, run: Run) -> None:
        """End the run if this rank's part of a checkpoint could not be written. Local."""
        if self._writer is not None:
            self._writer.check()

    def on_last_step(self, run: Run) -> None:
        """Copy the state before the last exchange, so that the run can continue with a longer budget. Collective."""
        has_any_moved = bool(gather(run.world, [run.step != self._saved_at]).any())
        if run.folder is not None and run.is_complete and run.calendar.saves and has_any_moved:
            self._last = _state_of(run)

    def on_end(self, run: Run) -> None:
        """Write the state from before the last exchange, with consensus and evaluation from after it. Collective."""
        if self._last is not None:
            if run.is_leader:
                self._last["consensus"] = run.optimizer.consensus_vector().copy()
            self._write(run, self._last)
            self._last = None
        self._complete(run)

    def close(self) -> None:
        """Abandon a checkpoint that is still being written, after an error. Local."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, run: Run, state: dict[str, Any]) -> None:
        """Start to write this rank's part with the evaluations so far. Collective."""
        assert run.folder is not None
        self._complete(run)
        if self._writer is None:
            self._writer = CheckpointWriter(run.folder / "checkpoints", run.world, run.plan.config.keep)
        members = run.optimizer.members
        self._writer.start(run.step, {**state, **self._evaluations.state(run)}, members)
        self._saved_at = run.step

    def _complete(self, run: Run) -> None:
        """Wait until the checkpoint that is being written is complete, if there is one. Collective."""
        path = None if self._writer is None else self._writer.wait()
        if path is not None:
            run.hooks.on_checkpoint(run, path)

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        """Continue from this rank's part of a checkpoint. Collective."""
        _check_buffers(run.model, state["buffers"])
        optimizer = state["optimizer"]
        if isinstance(optimizer, Mapping):  # that of a rank that had died is a copy of another rank's
            optimizer = {**optimizer, "rank": run.world.rank}
        run.optimizer.load_state_dict(optimizer)
        with torch.no_grad():
            for name, buffer in run.model.named_buffers():
                buffer.copy_(state["buffers"][name])
        run.step, run.compute_seconds, run.cpu.seconds = state["step"], state["compute_seconds"], state["cpu_seconds"]
        run.serving_cpu_before = state["serving_cpu_seconds"]
        run.steps_before, run.gradients_before = state["position"] - run.step, state["gradients"] - run.step
        run.optimizer.exchange_seconds = state["exchange_seconds"]
        vars(run.optimizer.statistics).update(state["statistics"])
        _restore_generators(run, state)
        run.passes.load_state(state.get("passes", {}))
        self._evaluations.load_state(run, state)


def _restore_generators(run: Run, state: Mapping[str, Any]) -> None:
    """Continue with the random generators of a checkpoint, or with new seeds on another number of ranks. Local."""
    if "seed" in state:
        torch.manual_seed(state["seed"])
        run.batches.rng.manual_seed(state["seed"])
        return
    torch.set_rng_state(state["torch_rng"])
    if run.world.device != "cpu" and state.get("cuda_rng") is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], run.world.device)
    run.batches.rng.set_state(state["augment_rng"])


def _check_buffers(model: torch.nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Check that a model has the buffers that a checkpoint holds. Local.

    Raises:
        UsageError: A buffer differs; the message names the first one.
    """
    shapes = {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
    saved_shapes = {name: tuple(buffer.shape) for name, buffer in saved.items()}
    for name in {**saved_shapes, **shapes}:
        there, here = saved_shapes.get(name, "absent"), shapes.get(name, "absent")
        if there != here:
            raise UsageError(
                f"buffer {name} is {there} in the checkpoint and {here} in this model: it was saved from another model",
            )


def load_newest(folder: Path, config: TrainConfig, world: World) -> dict[str, Any]:
    """Return the state from which this rank continues, from the newest checkpoint in a run folder. Collective."""
    found = checkpoint.load_newest(folder / "checkpoints", world)
    if isinstance(found, checkpoint.Parts):
        if world.rank == 0:
            logger.info("%s was written by %d ranks and continues on %d", found.path, len(found), world.size)
        state = rescaled.load(found, config, world)
    else:
        state = found
    require_options_of_checkpoint(config, state["options"], folder)
    return state


def _state_of(run: Run) -> dict[str, Any]:
    """Return this rank's part of a checkpoint, without evaluations. Local; between two barriers."""
    return {
        "optimizer": run.optimizer.state_dict(),
        "buffers": dict(run.model.named_buffers()),
        "options": deciding_options(run.plan.config),
        "step": run.step,
        "position": run.position,
        "gradients": run.gradients,
        "loss": run.counters.loss,
        "seconds": run.clock.seconds,
        "compute_seconds": run.compute_seconds,
        "cpu_seconds": run.cpu.seconds,
        "serving_cpu_seconds": run.serving_cpu_seconds,
        "exchange_seconds": run.optimizer.exchange_seconds,
        "statistics": run.optimizer.statistics.numbers(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(run.world.device) if run.world.device != "cpu" else None,
        "passes": run.passes.state(),
        "augment_rng": run.batches.rng.get_state(),
    }
