"""DistributedDataParallel inside groups of ranks, DiLoCo between the groups.

    jobs/local.sh 4 python examples/ddp_groups.py

Each two neighbouring ranks are a group. DDP averages the gradients of a group in every step, over gloo (or NCCL on
GPUs). DiLoCo averages the parameters of the groups after every 10 steps: rank k of a group exchanges with rank k of the
other groups. (``DistributedOptimizer(..., replica_size=2)`` makes such groups without DDP.)
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel

import mpitrain

GROUP_SIZE = 2
N_TEST = 300
STEPS = 200
BATCH = 32

world = mpitrain.init()
if world.size % GROUP_SIZE:
    raise SystemExit(f"start this example on a multiple of {GROUP_SIZE} ranks")
group = world.split(world.rank // GROUP_SIZE)  # the ranks whose gradients DDP averages
peers = world.split(world.rank % GROUP_SIZE)  # the ranks of the same number in all groups

folder = group.comm.bcast(tempfile.mkdtemp() if group.rank == 0 else None)  # the ranks of a group share a node
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=group.rank, world_size=group.size
)

digits = load_digits()
shuffled = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))  # the same on all ranks
images = torch.tensor(digits.data / 16, dtype=torch.float32)[shuffled]
labels = torch.tensor(digits.target)[shuffled]

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
with_ddp = DistributedDataParallel(model)
base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
method = mpitrain.DiLoCo(period=10)

with mpitrain.DistributedOptimizer(base, model, method, world=peers) as optimizer:
    order = torch.Generator().manual_seed(world.rank)
    for _ in range(STEPS):
        batch = torch.randint(len(images) - N_TEST, (BATCH,), generator=order)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(with_ddp(images[batch]), labels[batch]).backward()
        optimizer.step()
    optimizer.finalize()
    vectors = world.comm.allgather(optimizer.consensus_vector())
    if world.rank == 0:
        with optimizer.consensus(), torch.no_grad():
            predicted = model(images[-N_TEST:]).argmax(1)
        equal = all((vector == vectors[0]).all() for vector in vectors)
        print(f"test accuracy {(predicted == labels[-N_TEST:]).float().mean():.1%}, equal on all ranks: {equal}")

torch.distributed.destroy_process_group()
