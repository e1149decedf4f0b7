"""Detection of changes to the shared parameters of a node that the optimizer has not made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch

from mpitrain.errors import UsageError
from mpitrain.optimizer.layout import FlatLayout


class ForeignWrites:
    """A check whether anything other than the optimizer has changed the parameters since the last step.

    The ranks of a node share the parameters. If a script changes them, each rank makes the change once more, while
    other ranks compute with the parameters. The check uses two signs of a change. The first is the version counter of a
    tensor, which torch increases with every change in place. The second is the values of a few elements of each
    parameter, which also reveal changes through ``parameter.data`` and changes by other ranks.

    Args:
        model: The model, for the names of the parameters.
        layout: The positions of the parameters in the vector.
        x: (n,) the parameters.
    """

    def __init__(self, model: torch.nn.Module, layout: FlatLayout, x: np.ndarray) -> None:
        self._model, self._bits = model, x.view(f"i{x.dtype.itemsize}")
        layers = [(place.parameter, layer) for place, layer in zip(layout.places, layout.layers, strict=True)]
        self._layers = [(parameter, layer) for parameter, layer in layers if layer.start < layer.stop]
        self._parameters = [parameter for parameter, _ in self._layers]
        self._positions = np.array(
            [at for _, part in self._layers for at in (part.start, (part.start + part.stop) // 2, part.stop - 1)]
        )
        self.accept()

    def accept(self) -> None:
        """Record the present values, with which ``check`` compares. Local; call it while no rank changes parameters."""
        self._versions = self._present_versions()
        self._samples = self._bits[self._positions]

    def _present_versions(self) -> list[int]:
        return [parameter._version for parameter in self._parameters]

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Ignore changes inside the block, where the parameters are not the shared ones."""
        before = self._present_versions()
        try:
            yield
        finally:
            rows = zip(self._versions, before, self._present_versions(), strict=True)
            self._versions = [known + after - begun for known, begun, after in rows]

    def check(self) -> None:
        """Check that only the optimizer has changed parameters. Local; call it before any rank begins the next update.

        Raises:
            UsageError: A parameter was changed; the message names it and a remedy.
        """
        versions = self._present_versions()
        is_same = self._bits[self._positions] == self._samples
        if versions == self._versions and is_same.all():
            return
        rows = zip(self._parameters, versions, self._versions, is_same.reshape(-1, 3).all(1), strict=True)
        changed = next(parameter for parameter, now, before, same in rows if now != before or not same)
        names = chain((name for name, known in self._model.named_parameters() if known is changed), ["?"])
        raise UsageError(
            f"the parameter {next(names)} was changed outside optimizer.step(), but node_shared lets all ranks of a "
            "node share one copy of it: use AllReduceSGD(node_shared=False) (mpitrain train: --set node_shared=false)"
        )
