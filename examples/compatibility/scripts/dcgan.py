"""A generator and a discriminator, each with an optimizer of its own, as in pytorch/examples, dcgan/main.py."""

import torch
from torch import nn

from examples.compatibility.harness import Outcome, Run, digits

NZ, WIDTH = 16, 16


def generator() -> nn.Module:
    """Return a network that makes images (batch, 1, 8, 8) of noise (batch, NZ, 1, 1)."""
    return nn.Sequential(
        nn.ConvTranspose2d(NZ, WIDTH, 4, 1, 0, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(True),
        nn.ConvTranspose2d(WIDTH, 1, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


def discriminator() -> nn.Module:
    """Return a network that says of an image how probably it is real."""
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 4, 2, 1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(WIDTH, 1, 4, 1, 0, bias=False),
        nn.Sigmoid(),
        nn.Flatten(0),
    )


def weights_init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        module.weight.data.normal_(0.0, 0.05)
    elif isinstance(module, nn.BatchNorm2d):
        module.weight.data.normal_(1.0, 0.05)
        module.bias.data.fill_(0)


def train(run: Run) -> Outcome:
    images = digits(run.dtype)[0] * 2 - 1
    net_g, net_d = generator(), discriminator()
    net_g.apply(weights_init)
    net_d.apply(weights_init)
    net_g, net_d = run.prepare(net_g), run.prepare(net_d)
    adam = {"lr": 2e-3, "betas": (0.5, 0.999)}
    optimizer_d = run.distribute(torch.optim.Adam(net_d.parameters(), **adam), net_d)
    optimizer_g = run.distribute(torch.optim.Adam(net_g.parameters(), **adam), net_g)
    criterion = nn.BCELoss()
    loader = run.loader((images,), batch_size=48)
    fixed_noise = torch.randn(64, NZ, 1, 1, dtype=run.dtype, generator=torch.Generator().manual_seed(5))

    def distance() -> float:
        """Return how far the mean image is from that of the data; batch statistics are those of the fixed noise."""
        with torch.no_grad():
            return (net_g(fixed_noise).mean(0) - images.mean(0)).square().mean().item()

    before = distance()
    for epoch in range(10):
        loader.sampler.set_epoch(epoch)
        for (real,) in loader:
            # Update D: maximize log(D(x)) + log(1 - D(G(z))).
            net_d.zero_grad()
            ones, zeros = torch.ones(len(real), dtype=run.dtype), torch.zeros(len(real), dtype=run.dtype)
            criterion(net_d(real), ones).backward()
            fake = net_g(run.randn(len(real), NZ, 1, 1))
            criterion(net_d(fake.detach()), zeros).backward()
            optimizer_d.step()
            # Update G: maximize log(D(G(z))).
            net_g.zero_grad()
            criterion(net_d(fake), ones).backward()
            optimizer_g.step()
    return run.outcome(nn.ModuleDict({"g": net_g, "d": net_d}), before, distance)
