"""Sharpness-aware minimization with two passes per step, as in davda54/sam, example/train.py.

The ascent uses the norm and the gradient of the whole batch: `clip_grad_norm_(inf)` averages the gradients and clips
nothing. Without this line every rank ascends by its own gradient, as m-sharpness does with DistributedDataParallel's
`no_sync`, which is another method.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from examples.compatibility.harness import Outcome, Run, digits


class SAM(torch.optim.Optimizer):
    """An optimizer that steps with the gradient at the worst point near the parameters."""

    def __init__(self, parameters, make_base, rho=0.05):
        super().__init__(parameters, {"rho": rho})
        self.base_optimizer = make_base(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, norm):
        """Climb to the worst point."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["e_w"] = p.grad * (group["rho"] / (norm + 1e-12))
                    p.add_(self.state[p]["e_w"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        """Go back, and step with the gradient found there."""
        for group in self.param_groups:
            for p in group["params"]:
                if "e_w" in self.state[p]:
                    p.sub_(self.state[p]["e_w"])
        self.base_optimizer.step()
        self.zero_grad()


def train(run: Run) -> Outcome:
    images, labels = digits(run.dtype)
    model = run.prepare(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    )

    def make_base(groups):
        return run.distribute(torch.optim.SGD(groups, lr=0.1, momentum=0.9), model)

    optimizer = SAM(model.parameters(), make_base)
    loader = run.loader((images, labels), batch_size=48)

    def test() -> float:
        model.train()  # the statistics of all images, not the running ones of this rank
        with torch.no_grad():
            return F.cross_entropy(model(images), labels).item()

    before = test()
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        for x, y in loader:
            F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
            norm = run.clip_grad_norm_(optimizer.base_optimizer, model.parameters(), math.inf)
            optimizer.first_step(norm)
            F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
            optimizer.second_step()
    return run.outcome(model, before, test)
