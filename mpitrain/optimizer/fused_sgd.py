"""The step of a plain ``torch.optim.SGD`` on the host, in one pass over each tensor instead of three or more.

The state is torch's own: momentum buffers stay in ``base.state``, and ``base.step()`` can take over at any time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpitrain import kernels
from mpitrain.optimizer.checks import has_hooks
from mpitrain.optimizer.layout import FlatLayout


def is_plain_sgd(base: torch.optim.Optimizer) -> bool:
    """Return whether the fused kernels can replace ``base.step()``.

    They can if no option or hook makes the step different from the equations that they compute.
    """
    return (
        type(base) is torch.optim.SGD
        and not has_hooks(base)
        and not any(g["dampening"] or g["maximize"] or g["differentiable"] for g in base.param_groups)
    )


class FusedSGD:
    """Steps of a plain SGD on parameters in a flat vector.

    Args:
        base: A plain SGD whose parameters are on the host, in float32 or float64.
        layout: The positions of the parameters in the vector.
        x: (n,) the vector.
    """

    def __init__(self, base: torch.optim.Optimizer, layout: FlatLayout, x: np.ndarray) -> None:
        self._base, self._x = base, x
        self._v: np.ndarray | None = None  # (n,) the momentum buffers, from the first step with momentum on
        self._places = layout.places
        self._parts = {place.parameter: part for place, part in zip(layout.places, layout.layers, strict=True)}
        self._buffers: dict[torch.nn.Parameter, torch.Tensor] = {}  # views into _v
        for kernel in (kernels.sgd_step, kernels.torch_momentum_step, kernels.torch_nesterov_step):
            kernel.prepare(x)

    def step(self) -> None:
        """Make the step that ``base.step()`` would make."""
        if self._v is None and any(group["momentum"] for group in self._base.param_groups):
            velocity = torch.from_numpy(np.zeros_like(self._x))
            self._v = velocity.numpy()
            self._buffers = {place.parameter: place.view(velocity) for place in self._places}
        for group in self._base.param_groups:
            for parameter in group["params"]:
                part = self._parts.get(parameter)  # none for parameters that were frozen from the beginning
                if part is not None and parameter.grad is not None:
                    self._update(group, part, parameter)

    def _adopt(self, parameter: torch.nn.Parameter) -> None:
        """Move a parameter's momentum buffer into the vector, unless it is there: a loaded state has another."""
        state, view = self._base.state[parameter], self._buffers[parameter]
        buffer = state.get("momentum_buffer")
        if buffer is view:
            return
        if buffer is None:
            view.zero_()
        else:
            view.copy_(buffer)
        state["momentum_buffer"] = view

    def _update(self, group: dict[str, Any], part: slice, parameter: torch.nn.Parameter) -> None:
        gradient = parameter.grad
        assert gradient is not None
        x, g, eta, decay = self._x[part], gradient.reshape(-1).numpy(), group["lr"], group["weight_decay"]
        if not group["momentum"]:
            kernels.sgd_step(x, g, eta, decay)
            return
        assert self._v is not None
        self._adopt(parameter)
        step = kernels.torch_nesterov_step if group["nesterov"] else kernels.torch_momentum_step
        step(x, self._v[part], g, eta, group["momentum"], decay)
