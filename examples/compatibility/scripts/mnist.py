"""A convolutional network with dropout, Adadelta and StepLR, as in pytorch/examples, mnist/main.py."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import StepLR

from examples.compatibility.harness import Outcome, Run, digits


class Net(nn.Module):
    """Two convolutions and two linear layers, with dropout."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, 1)
        self.conv2 = nn.Conv2d(8, 16, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(64, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        """Return log-probabilities (batch, 10)."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = self.dropout1(F.max_pool2d(x, 2)).flatten(1)
        return F.log_softmax(self.fc2(self.dropout2(F.relu(self.fc1(x)))), dim=1)


def train(run: Run) -> Outcome:
    images, labels = digits(run.dtype)
    model = run.prepare(Net())
    optimizer = run.distribute(torch.optim.Adadelta(model.parameters(), lr=1.0), model)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.9)
    loader = run.loader((images, labels), batch_size=24)

    def test() -> float:
        model.eval()
        with torch.no_grad():
            return F.nll_loss(model(images), labels).item()

    before = test()
    for epoch in range(10):
        model.train()
        loader.sampler.set_epoch(epoch)
        for data, target in loader:
            optimizer.zero_grad()
            loss = F.nll_loss(model(data), target)
            loss.backward()
            optimizer.step()
        scheduler.step()
    return run.outcome(model, before, test)
