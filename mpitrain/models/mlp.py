"""A perceptron with ReLU layers, for flat inputs and small images."""

import math
from itertools import pairwise

from torch import Tensor, nn

from mpitrain.errors import UsageError


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        shape: Of one input, flattened: (d,) or (C, H, W).
        n_classes: Outputs.
        hidden: Widths of the hidden layers; the default is right for 8x8 digits.
    """

    def __init__(self, *, shape: tuple[int, ...], n_classes: int, hidden: tuple[int, ...] = (128, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for n_in, n_out in pairwise((math.prod(shape), *hidden)):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], n_classes))

    @staticmethod
    def read_options(text: str) -> dict[str, tuple[int, ...]]:
        """What `hidden=256x128` after `mlp:` means."""
        key, _, widths = text.partition("=")
        hidden = tuple(int(width) if width.isascii() and width.isdigit() else 0 for width in widths.split("x"))
        if key != "hidden" or min(hidden) < 1:
            raise UsageError(f"mlp cannot use '{text}': write the widths of its hidden layers as mlp:hidden=256x128")
        return {"hidden": hidden}

    def forward(self, x: Tensor) -> Tensor:
        """(b, ...) -> (b, n_classes) logits."""
        logits: Tensor = self.layers(x)
        return logits
