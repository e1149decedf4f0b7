"""A variational auto-encoder, as in pytorch/examples, vae/main.py.

There the loss is a sum over the batch. Here it is divided by the batch: all-reduce averages over the ranks, so that p
ranks would otherwise make a p-th of the sum's gradient, as with DistributedDataParallel.
"""

import torch
import torch.nn.functional as F
from torch import nn

from examples.compatibility.harness import Outcome, Run, digits


class VAE(nn.Module):
    """An encoder to a normal distribution in the latent space, and a decoder."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 32)
        self.fc21, self.fc22 = nn.Linear(32, 4), nn.Linear(32, 4)
        self.fc3, self.fc4 = nn.Linear(4, 32), nn.Linear(32, 64)

    def forward(self, x, noise):
        """Return the reconstruction, mu, and the logarithm of the variance."""
        h = F.relu(self.fc1(x.flatten(1)))
        mu, logvar = self.fc21(h), self.fc22(h)
        z = mu + noise * torch.exp(0.5 * logvar)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mu, logvar


def loss_function(outputs, x):
    """Return the negative evidence lower bound per sample."""
    reconstruction, mu, logvar = outputs
    bce = F.binary_cross_entropy(reconstruction, x.flatten(1), reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (bce + kld) / len(x)


def train(run: Run) -> Outcome:
    (images, _), model = digits(run.dtype), run.prepare(VAE())
    optimizer = run.distribute(torch.optim.Adam(model.parameters(), lr=1e-2), model)
    loader = run.loader((images,), batch_size=48)

    def test() -> float:
        model.eval()
        with torch.no_grad():
            return loss_function(model(images, torch.zeros(len(images), 4, dtype=run.dtype)), images).item()

    before = test()
    for epoch in range(8):
        model.train()
        loader.sampler.set_epoch(epoch)
        for (data,) in loader:
            optimizer.zero_grad()
            loss = loss_function(model(data, run.randn(len(data), 4)), data)
            loss.backward()
            optimizer.step()
    return run.outcome(model, before, test)
