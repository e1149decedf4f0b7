"""Your own training loop, on several ranks: handwritten digits with EASGD.

    jobs/local.sh 4 python examples/own_loop.py

(or with ``mpirun -n 4`` or ``srun``; plain ``python`` runs it as one rank). The script differs from one for a single
process in three calls: ``init``, ``DistributedOptimizer`` and ``consensus``.
"""

import torch
from sklearn.datasets import load_digits

import mpitrain

N_TEST = 300
EPOCHS = 20
BATCH = 32

world = mpitrain.init()
digits = load_digits()
shuffled = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))  # the same on all ranks
images = torch.tensor(digits.data / 16, dtype=torch.float32)[shuffled]
labels = torch.tensor(digits.target)[shuffled]

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)).to(world.device)
base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
scheduler = torch.optim.lr_scheduler.StepLR(base, step_size=15, gamma=0.1)
method = mpitrain.EASGD(moving_rate=0.9 / world.size, period=10)

with mpitrain.DistributedOptimizer(base, model, method) as optimizer:
    # Every rank draws from all training data, in an order of its own; together the ranks make EPOCHS passes.
    order = torch.Generator().manual_seed(world.rank)
    for _ in range(EPOCHS):
        own_share = torch.randperm(len(images) - N_TEST, generator=order)[: (len(images) - N_TEST) // world.size]
        for batch in own_share.split(BATCH):
            x, y = images[batch].to(world.device), labels[batch].to(world.device)
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step(loss)
        scheduler.step()

    world.barrier()  # now the center has the last exchange of every rank
    if world.rank == 0:
        with optimizer.consensus(), torch.no_grad():  # the model holds the center inside the block
            predicted = model(images[-N_TEST:].to(world.device)).argmax(1).cpu()
        print(f"test accuracy of the center: {(predicted == labels[-N_TEST:]).float().mean():.1%}")
