"""A small model whose steps take time without a core: a test can act while a run is under way."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from mpitrain.models.mlp import MLP

STEP_SECONDS = 0.03


class SlowMLP(MLP):
    """A perceptron with one hidden layer and a pause in every training step."""

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (b, ...) to logits (b, n_classes)."""
        if self.training:
            time.sleep(STEP_SECONDS)
        return super().forward(x)


def slow_mlp(*, seed: int, **arguments: Any) -> nn.Module:
    """Return the model."""
    torch.manual_seed(seed)
    return SlowMLP(hidden=(16,), **arguments)
