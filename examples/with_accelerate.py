"""Hugging Face accelerate for devices and precision, mpitrain for communication.

    pip install accelerate
    jobs/local.sh 2 python examples/with_accelerate.py

accelerate takes the variables of mpirun for its own and asks for MASTER_ADDR. With `hide_launcher=True` each rank is a
single process to it, and the ranks exchange through `DistributedOptimizer`, which `prepare` must not wrap.
"""

import torch
from accelerate import Accelerator

import mpitrain

world = mpitrain.init(hide_launcher=True)  # before anything of accelerate is created
accelerator = Accelerator(cpu=world.device == "cpu")
assert accelerator.num_processes == 1

torch.manual_seed(0)
inputs = torch.randn(512, 20)
labels = (inputs[:, 0] > 0).long()
share = torch.utils.data.TensorDataset(inputs[world.rank :: world.size], labels[world.rank :: world.size])
model, loader = accelerator.prepare(torch.nn.Linear(20, 2), torch.utils.data.DataLoader(share, 16, shuffle=True))
base = torch.optim.SGD(model.parameters(), lr=0.5)

with mpitrain.DistributedOptimizer(base, model, mpitrain.EASGD(moving_rate=0.9 / world.size)) as optimizer:
    for _ in range(10):
        for x, y in loader:
            optimizer.zero_grad()
            with accelerator.autocast():
                loss = torch.nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step(loss)
    world.barrier()
    with optimizer.consensus(), torch.no_grad():
        accuracy = (model(inputs).argmax(1) == labels).float().mean().item()
    if world.rank == 0:
        print(f"accuracy {accuracy:.1%} on {world.size} ranks")
    world.barrier()
