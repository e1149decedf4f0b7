"""The forward and backward passes of a step, and the step with their gradient.

``--precision bfloat16`` or ``float16`` computes them under ``torch.autocast``; parameters, gradients and exchanges keep
the model's type. float16 gradients are scaled by a ``GradScaler``. ``--accumulate N`` adds the gradients of N
mini-batches to one: the gradient of their mean loss, from N passes that need the memory of one.

With ``--batch-size-of``, ranks have mini-batches of different sizes. A rank's gradient is the mean over its own
samples. If a step uses the mean of several ranks' gradients, the weight of each is proportional to its number of
samples. The result is the gradient of the union of their mini-batches. In all other methods, each worker makes its own
steps, and all workers have the same weight in exchanges.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from mpitrain.collectives.world.world import World
from mpitrain.optimizer.distributed import DistributedOptimizer
from mpitrain.trainer.objective import Objective
from mpitrain.trainer.plan import RunPlan


class GradientPass:
    """The forward and backward pass of one rank, and the step.

    Args:
        plan: The options of the run.
        model: The model, in training mode.
        objective: The loss.
        world: The ranks.

    Attributes:
        objective: See the argument.
    """

    def __init__(self, plan: RunPlan, model: torch.nn.Module, objective: Objective, world: World) -> None:
        config, kind = plan.config, torch.device(world.device).type
        self._model, self._loss, self.objective = model, objective.loss, objective
        self._size = config.batch_size_of_rank(world.rank)
        self._plan, self._rank, self._members = plan, world.rank, list(range(world.size))
        self._weight = plan.gradient_weight(self._rank, self._members)
        self._clip_norm = config.clip_norm
        dtype = None if config.precision == "float32" else getattr(torch, config.precision)
        self._dtype, self._device_type = dtype, kind
        self._scaler = torch.amp.GradScaler(kind) if config.precision == "float16" else None
        self._is_plain = dtype is None and config.accumulate == 1 and self._weight == 1
        self._may_shrink = config.on_failure == "continue" and bool(config.batch_sizes)

    def backward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Compute the gradient of the samples of a step; return their mean loss. Local."""
        if self._is_plain:
            loss: torch.Tensor = self._loss(self._model(x), y)
            loss.backward()
            return loss
        total = torch.zeros((), device=x.device)
        for inputs, targets in zip(x.split(self._size), y.split(self._size), strict=True):
            with self._autocast():
                loss = self._loss(self._model(inputs), targets)
            share = len(inputs) / len(x)
            part = loss * (share * self._weight)
            (part if self._scaler is None else self._scaler.scale(part)).backward()
            total += loss.detach() * share
        return total

    def _autocast(self) -> Any:
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device_type, self._dtype)

    def step(self, optimizer: DistributedOptimizer, loss: torch.Tensor) -> None:
        """Clip the gradient if ``--clip-norm`` is given, and make the step.

        The call is Collective if the step of the optimizer is Collective.
        """
        self._step(optimizer, loss)
        if self._may_shrink and optimizer.members != self._members:  # the others have died
            self._members = optimizer.members
            self._weight = self._plan.gradient_weight(self._rank, self._members)
            self._is_plain = self._is_plain and self._weight == 1

    def _step(self, optimizer: DistributedOptimizer, loss: torch.Tensor) -> None:
        if self._scaler is None:
            if self._clip_norm is not None:
                optimizer.clip_grad_norm_(self._clip_norm)
            optimizer.step(loss)
            return
        if self._clip_norm is not None:
            self._scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(self._clip_norm)
        self._scaler.step(optimizer, loss)
        self._scaler.update()

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: the scale of the gradients."""
        return {} if self._scaler is None else self._scaler.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        if self._scaler is not None and state:
            self._scaler.load_state_dict(state)
