"""A vision transformer with label smoothing, warm-up, clipping and an EMA of the weights, as in timm's train.py.

The exact form also compares the EMA.
"""

import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
import torch
from timm.models import VisionTransformer

from examples.compatibility.harness import Outcome, Run, digits


def train(run: Run) -> Outcome:
    images, labels = digits(run.dtype)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2}
    rates = {} if run.is_exact else {"drop_path_rate": 0.1, "proj_drop_rate": 0.1}
    model = run.prepare(VisionTransformer(num_classes=10, global_pool="avg", **sizes, **rates))
    base = timm.optim.create_optimizer_v2(model, opt="adamw", lr=5e-3, weight_decay=0.05)
    optimizer = run.distribute(base, model)
    scheduler = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=16, warmup_t=1, warmup_lr_init=1e-3, t_in_epochs=True
    )
    ema = timm.utils.ModelEmaV3(model, decay=0.9)
    criterion = timm.loss.LabelSmoothingCrossEntropy(0.1)
    loader = run.loader((images, labels), batch_size=48)

    def validate() -> float:
        model.eval()
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(model(images), labels).item()

    before = validate()
    for epoch in range(16):
        model.train()
        loader.sampler.set_epoch(epoch)
        for x, y in loader:
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            run.clip_grad_norm_(optimizer, model.parameters(), 1.0)
            optimizer.step()
            ema.update(model)
        scheduler.step(epoch + 1)
    outcome = run.outcome(model, before, validate)
    averaged = {f"ema.{name}": value.detach().clone() for name, value in ema.module.named_parameters()}
    return Outcome(outcome.before, outcome.after, {**outcome.parameters, **averaged})
