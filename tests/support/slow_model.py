"""A small model whose steps take time without a core, for as long as a test wants to act on the run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpitrain.models.mlp import MLP

SLOW_STEP_SECONDS = 0.5


class SlowMLP(MLP):
    """A perceptron with one hidden layer and a pause in every training step while the file $SLOW_WHILE exists."""

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (b, ...) to logits (b, n_classes)."""
        if self.training and Path(os.environ["SLOW_WHILE"]).exists():
            time.sleep(SLOW_STEP_SECONDS)
        return super().forward(x)


def slow_mlp(*, seed: int, **arguments: Any) -> nn.Module:
    """Return the model."""
    torch.manual_seed(seed)
    return SlowMLP(hidden=(16,), **arguments)


STEADY_STEP_SECONDS = 0.005


class SteadyMLP(MLP):
    """A perceptron whose training steps sleep for longer than they compute, whatever else runs on the machine."""

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (b, ...) to logits (b, n_classes)."""
        if self.training:
            time.sleep(STEADY_STEP_SECONDS)
        return super().forward(x)


def steady_mlp(*, seed: int, **arguments: Any) -> nn.Module:
    """Return the model."""
    torch.manual_seed(seed)
    return SteadyMLP(hidden=(16,), **arguments)
