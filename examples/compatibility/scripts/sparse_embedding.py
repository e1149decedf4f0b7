"""A recommendation model with sparse embedding bags, as in facebookresearch/dlrm, dlrm_s_pytorch.py."""

import torch
from torch import nn

from examples.compatibility.harness import Outcome, Run


class DLRM(nn.Module):
    """Embeddings of categories and a perceptron of numbers, which interact by dot products."""

    def __init__(self):
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.bags = nn.ModuleList(nn.EmbeddingBag(n, 8, mode="sum", sparse=True) for n in (50, 30))
        self.top = nn.Sequential(nn.Linear(8 + 3, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, numbers, categories):
        """Return the logit of a click (batch,)."""
        x = self.bottom(numbers)
        rows = torch.stack([x, *(bag(categories[:, i]) for i, bag in enumerate(self.bags))], dim=1)
        dots = torch.bmm(rows, rows.transpose(1, 2))
        pairs = torch.tril_indices(3, 3, offset=-1)
        return self.top(torch.cat([x, dots[:, pairs[0], pairs[1]]], dim=1)).squeeze(1)


def train(run: Run) -> Outcome:
    generator = torch.Generator().manual_seed(4)
    numbers = torch.randn(480, 4, generator=generator, dtype=torch.float64).to(run.dtype)
    categories = torch.randint(30, (480, 2, 3), generator=generator)
    clicks = ((categories[:, 0, 0] < 15) ^ (numbers[:, 0] > 1)).to(run.dtype)
    model = run.prepare(DLRM())
    optimizer = run.distribute(torch.optim.Adagrad(model.parameters(), lr=0.1), model)
    criterion = nn.BCEWithLogitsLoss()
    loader = run.loader((numbers, categories, clicks), batch_size=48)

    def evaluate() -> float:
        with torch.no_grad():
            return criterion(model(numbers, categories), clicks).item()

    before = evaluate()
    for epoch in range(12):
        loader.sampler.set_epoch(epoch)
        for x, c, y in loader:
            loss = criterion(model(x, c), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return run.outcome(model, before, evaluate)
