"""A perceptron with ReLU layers, for flat inputs and small images."""

import math
from itertools import pairwise

from torch import Tensor, nn

from mpitrain.errors import UsageError


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        shape: The shape of one input, (d,) or (C, H, W); inputs are flattened.
        n_classes: The number of outputs.
        hidden: The widths of the hidden layers; the default suits 8x8 digits.
    """

    def __init__(self, *, shape: tuple[int, ...], n_classes: int, hidden: tuple[int, ...] = (128, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for n_in, n_out in pairwise((math.prod(shape), *hidden)):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], n_classes))

    @staticmethod
    def read_options(text: str) -> dict[str, tuple[int, ...]]:
        """Parse the text after `mlp:`, such as `hidden=256x128`, into keyword arguments."""
        key, _, widths = text.partition("=")
        hidden = tuple(int(width) if width.isascii() and width.isdigit() else 0 for width in widths.split("x"))
        if key != "hidden" or min(hidden) < 1:
            raise UsageError(f"mlp cannot parse '{text}': write the widths of its hidden layers as mlp:hidden=256x128")
        return {"hidden": hidden}

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (b, ...) to logits (b, n_classes)."""
        logits: Tensor = self.layers(x)
        return logits
