"""A loop with accelerate: `prepare`, `accumulate` and a schedule, as in nlp_example.py and by_feature of its examples.

`prepare` takes the distributed optimizer, too: it hands every step on.
"""

import torch
from accelerate import Accelerator
from torch import nn

from examples.compatibility.harness import Outcome, Run


def train(run: Run) -> Outcome:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(384, 12, generator=generator, dtype=torch.float64).to(run.dtype)
    labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = run.prepare(nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.05), nn.Linear(32, 2)))
    optimizer = run.distribute(torch.optim.AdamW(model.parameters(), lr=2e-2), model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 100)
    loader = run.loader((inputs, labels), batch_size=24)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            return nn.functional.cross_entropy(model(inputs), labels).item()

    before = evaluate()
    for _ in range(12):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    return run.outcome(accelerator.unwrap_model(model), before, evaluate)
