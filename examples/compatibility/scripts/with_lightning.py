"""An auto-encoder in the Lightning Trainer, as in the quick start of Lightning's README."""

import lightning
import torch
from torch import nn

from examples.compatibility.harness import Outcome, Run, digits


class LitAutoEncoder(lightning.LightningModule):
    """An encoder and a decoder of images."""

    def __init__(self, run: Run):
        super().__init__()
        self._run = run
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 6))
        self.decoder = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 64))

    def forward(self, x):
        """Return the reconstruction."""
        return self.decoder(self.encoder(x.flatten(1)))

    def training_step(self, batch, number):
        """Return the loss of a mini-batch."""
        (x,) = batch
        return nn.functional.mse_loss(self(x), x.flatten(1))

    def configure_optimizers(self):
        """Return the optimizer and a schedule. Collective."""
        optimizer = self._run.distribute(torch.optim.Adam(self.parameters(), lr=1e-2), self)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 4)]


def train(run: Run) -> Outcome:
    images = digits(run.dtype)[0]
    model = run.prepare(LitAutoEncoder(run))

    def evaluate() -> float:
        with torch.no_grad():
            return nn.functional.mse_loss(model(images), images.flatten(1)).item()

    before = evaluate()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=8,
        precision="64-true" if run.is_exact else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, run.loader((images,), batch_size=48))
    return run.outcome(model, before, evaluate)
