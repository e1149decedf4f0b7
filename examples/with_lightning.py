"""The Lightning Trainer for the loop, mpitrain for communication.

    pip install lightning
    jobs/local.sh 2 python examples/with_lightning.py

Lightning takes the variables of mpirun for its own and starts a process group. With `hide_launcher=True` each rank is a
single process to it, and the ranks exchange through the optimizer that `configure_optimizers` returns.
"""

import lightning
import torch

import mpitrain

world = mpitrain.init(hide_launcher=True)  # before anything of Lightning is created


class Classifier(lightning.LightningModule):
    """A linear classifier that a distributed optimizer trains."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(20, 2)

    def training_step(self, batch, number):
        """Return the loss of a mini-batch."""
        x, y = batch
        return torch.nn.functional.cross_entropy(self.layer(x), y)

    def configure_optimizers(self):
        """Wrap the optimizer. Collective."""
        base = torch.optim.SGD(self.parameters(), lr=0.5)
        return mpitrain.DistributedOptimizer(base, self, mpitrain.EASGD(moving_rate=0.9 / world.size))


torch.manual_seed(0)
inputs = torch.randn(512, 20)
labels = (inputs[:, 0] > 0).long()
share = torch.utils.data.TensorDataset(inputs[world.rank :: world.size], labels[world.rank :: world.size])
model = Classifier()
trainer = lightning.Trainer(
    accelerator="cpu" if world.device == "cpu" else "cuda",
    devices=1,
    max_epochs=10,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
assert trainer.world_size == 1
trainer.fit(model, torch.utils.data.DataLoader(share, 16, shuffle=True))

optimizer = trainer.optimizers[0]
world.barrier()
with optimizer.consensus(), torch.no_grad():
    accuracy = (model.layer(inputs.to(model.device)).argmax(1).cpu() == labels).float().mean().item()
if world.rank == 0:
    print(f"accuracy {accuracy:.1%} on {world.size} ranks")
world.barrier()
optimizer.close()
