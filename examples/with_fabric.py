"""Lightning Fabric for devices and precision, mpitrain for communication.

    pip install lightning
    jobs/local.sh 2 python examples/with_fabric.py

Fabric takes the variables of mpirun for its own and starts a process group. With `hide_launcher=True` each rank is a
single process to it, and the ranks exchange through `DistributedOptimizer`. Fabric sets up the model alone: `setup`
must not wrap the optimizer.
"""

import torch
from lightning.fabric import Fabric

import mpitrain

world = mpitrain.init(hide_launcher=True)  # before anything of Lightning is created
fabric = Fabric(accelerator="cpu" if world.device == "cpu" else "cuda", devices=1, precision="32-true")
assert fabric.world_size == 1

torch.manual_seed(0)
inputs = torch.randn(512, 20)
labels = (inputs[:, 0] > 0).long()
share = torch.utils.data.TensorDataset(inputs[world.rank :: world.size], labels[world.rank :: world.size])
loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(share, 16, shuffle=True))
model = fabric.setup(torch.nn.Linear(20, 2))
base = torch.optim.SGD(model.parameters(), lr=0.5)

with mpitrain.DistributedOptimizer(base, model, mpitrain.EASGD(moving_rate=0.9 / world.size)) as optimizer:
    for _ in range(10):
        for x, y in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            fabric.backward(loss)
            optimizer.step(loss)
    world.barrier()
    with optimizer.consensus(), torch.no_grad():
        accuracy = (model(inputs.to(fabric.device)).argmax(1).cpu() == labels).float().mean().item()
    if world.rank == 0:
        print(f"accuracy {accuracy:.1%} on {world.size} ranks")
    world.barrier()
