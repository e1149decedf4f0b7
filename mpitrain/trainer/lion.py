"""Lion, the sign of an interpolated momentum, as a torch optimizer.

    c <- beta1*m + (1 - beta1)*g
    x <- x - eta*(sign(c) + lambda*x)
    m <- beta2*m + (1 - beta2)*g

Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, Algorithm 2. torch has no
implementation of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """The Lion optimizer; the module gives its equations.

    Args:
        params: The parameters or parameter groups.
        lr: The learning rate eta. The paper (section 5) recommends a third to a tenth of the learning rate of AdamW.
        betas: The coefficients beta1 and beta2.
        weight_decay: The weight decay lambda. The paper recommends three to ten times the weight decay of AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters. If there is a closure, call it first and return the loss that it returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            eta, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
            for x in group["params"]:
                g = x.grad
                if g is None:
                    continue
                state = self.state[x]
                if "m" not in state:
                    state["m"] = torch.zeros_like(x)
                m = state["m"]
                x.mul_(1 - eta * decay)
                x.add_(m.lerp(g, 1 - beta1).sign_(), alpha=-eta)
                m.lerp_(g, 1 - beta2)
        return loss
