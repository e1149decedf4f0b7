"""The layout of a model's parameters in one flat vector.

    parameter group    0                        | 1
    tensor             weight ......... bias .. | weight ......
    vector             0               16      32                 n

Parameters are laid out group by group, so that each parameter group, with its own learning rate and weight decay, is
one slice of the vector. Each tensor begins on a 64-byte boundary; the padding stays zero. A tensor that several modules
share occurs once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpitrain.errors import UsageError

ALIGN_BYTES = 64


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a parameter in the vector."""

    parameter: torch.nn.Parameter
    start: int

    def view(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the parameter's part of a vector, in the parameter's shape."""
        return vector[self.start : self.start + self.parameter.numel()].view(self.parameter.shape)


class FlatLayout:
    """The positions of an optimizer's trainable parameters in a vector.

    Args:
        groups: ``optimizer.param_groups``.

    Attributes:
        n: The length of the vector, including padding.
        n_parameters: The number of elements of the parameters, without padding.
        dtype: NumPy's type of the elements.
        torch_dtype: torch's type of the elements.
        places: The position of each parameter.
        group_slices: One slice for each parameter group.
        layers: One slice for each parameter tensor, without padding.

    Raises:
        UsageError: There are no trainable parameters, or they are not all of the same floating-point type.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        trainable = [[p for p in group["params"] if p.requires_grad] for group in groups]
        self.torch_dtype = _common_dtype([p for group in trainable for p in group])
        self.dtype = _numpy_dtype(self.torch_dtype)
        align = max(ALIGN_BYTES // self.torch_dtype.itemsize, 1)
        self.places: list[Place] = []
        self.group_slices: list[slice] = []
        end = 0
        for parameters in trainable:
            begin = end
            for parameter in parameters:
                self.places.append(Place(parameter, end))
                end += -(-parameter.numel() // align) * align
            self.group_slices.append(slice(begin, end))
        self.n = end
        self.layers = tuple(slice(place.start, place.start + place.parameter.numel()) for place in self.places)
        self.n_parameters = sum(place.parameter.numel() for place in self.places)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.places[0].parameter.device

    @property
    def may_be_fused(self) -> bool:
        """Whether fused kernels can make the local update. They need more than 16 bits, on the host."""
        return self.device.type == "cpu" and self.torch_dtype.itemsize >= 4


def _common_dtype(parameters: Iterable[torch.nn.Parameter]) -> torch.dtype:
    dtypes = {p.dtype for p in parameters}
    if not dtypes:
        raise UsageError("the optimizer has no trainable parameter: requires_grad is False for all of them")
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise UsageError(f"the parameters have several types ({names}): convert the model to one, e.g. model.float()")
    (dtype,) = dtypes
    if not dtype.is_floating_point:
        raise UsageError(f"the parameters are {dtype}, not floating point: convert the model, e.g. model.float()")
    return dtype


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    if dtype == torch.bfloat16:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    known = {torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16}
    if dtype not in known:
        raise UsageError(f"parameters of type {dtype} cannot be exchanged: use float32, float64, bfloat16 or float16")
    return np.dtype(known[dtype])
