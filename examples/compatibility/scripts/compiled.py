"""A compiled model with a cosine schedule, as in PyTorch's tutorial on torch.compile."""

import torch
import torch.nn.functional as F
from torch import nn

from examples.compatibility.harness import Outcome, Run, digits


def train(run: Run) -> Outcome:
    images, labels = digits(run.dtype)
    torch.compiler.reset()
    net = run.prepare(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 10)))
    model = torch.compile(net, backend=run.compiler)
    optimizer = run.distribute(torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True), model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    loader = run.loader((images, labels), batch_size=48)

    def evaluate() -> float:
        with torch.no_grad():
            return F.cross_entropy(model(images), labels).item()

    before = evaluate()
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    return run.outcome(net, before, evaluate)
