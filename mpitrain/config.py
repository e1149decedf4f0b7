"""What a training run is asked to do."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpitrain.errors import UsageError

DEFAULT_EPOCHS = 10.0


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. The command line's options have the same names.

    Args:
        algorithm: Registry name of the method.
        settings: Its hyper-parameters, as text.
        data: ``digits``, ``synthetic`` or an HDF5 file.
        model: A name of ``mpitrain.models`` or ``module:function``.
        epochs, steps, gradients, minutes: The budget; give one. An epoch is the training set once, over all ranks
            together; steps are each rank's; gradients count over all ranks.
        batch_size: Of each rank.
        lr, momentum, weight_decay: Of the local SGD. ``momentum`` None means 0.9, or the method's own default when it
            makes the update itself.
        seed: Of everything random: weights, sampling, augmentation, peers.
        device: ``cpu`` or ``cuda``.
        out: The run's folder; made new.
        sampling: ``independent`` (each rank shuffles the whole set) or ``sharded``.
        augment: Random crops and flips.
        evaluate_every: Steps of rank 0 between evaluations; an epoch when None.
        evaluate_seconds: Seconds between evaluations, instead.
        defer_evaluation: Only keep what the method evaluates while training, and evaluate it afterwards on all ranks:
            the run is not disturbed.
        checkpoint_every: Steps between checkpoints; an epoch when None, never when 0.
        straggler: Rank and factor: this rank computes that many times slower.
        quiet: No progress bar.
    """

    algorithm: str = "easgd"
    settings: Mapping[str, str] = field(default_factory=dict)
    data: str = "digits"
    model: str = "mlp"
    epochs: float | None = None
    steps: int | None = None
    gradients: int | None = None
    minutes: float | None = None
    batch_size: int = 32
    lr: float = 0.05
    momentum: float | None = None
    weight_decay: float = 0.0
    seed: int = 0
    device: str = "cpu"
    out: str | None = None
    sampling: str = "independent"
    augment: bool = False
    evaluate_every: int | None = None
    evaluate_seconds: float | None = None
    defer_evaluation: bool = False
    checkpoint_every: int | None = None
    straggler: tuple[int, float] | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        budgets = [b for b in (self.epochs, self.steps, self.gradients, self.minutes) if b is not None]
        if len(budgets) > 1:
            raise UsageError("give one of --epochs, --steps, --gradients and --minutes, not several")
        if not budgets:
            object.__setattr__(self, "epochs", DEFAULT_EPOCHS)
        for name in ("epochs", "steps", "gradients", "minutes", "batch_size", "evaluate_every", "evaluate_seconds"):
            self._need(name, lambda v: v > 0, "more than 0")
        for name in ("lr", "weight_decay", "checkpoint_every", "seed"):
            self._need(name, lambda v: v >= 0, "0 or more")
        self._need("momentum", lambda v: 0 <= v < 1, "at least 0 and below 1")
        if self.sampling not in ("independent", "sharded"):
            raise UsageError(f"--sampling must be independent or sharded, not {self.sampling!r}")
        if self.straggler is not None and not (math.isfinite(self.straggler[1]) and self.straggler[1] >= 1):
            raise UsageError(f"--straggler RANK:FACTOR needs a factor of 1 or more, not {self.straggler[1]:g}")

    def _need(self, name: str, good: Any, wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not (math.isfinite(value) and good(value)):
            raise UsageError(f"--{name.replace('_', '-')} must be {wanted}, not {value:g}")

    def to_json(self) -> dict[str, Any]:
        """As a JSON document."""
        return {**dataclasses.asdict(self), "settings": dict(self.settings)}

    @classmethod
    def of_run(cls, run: Path, **changes: Any) -> TrainConfig:
        """The configuration of an existing run, with some of it changed (a longer budget).

        Raises:
            UsageError: When ``run`` is not the folder of a run.
        """
        path = run / "config.json"
        try:
            document = json.loads(path.read_text())["config"]
        except (OSError, KeyError, ValueError) as error:
            raise UsageError(f"{run} is not the folder of a run: {path} cannot be read ({error})") from error
        if any(changes.get(name) is not None for name in ("epochs", "steps", "gradients", "minutes")):
            document.update(epochs=None, steps=None, gradients=None, minutes=None)
        document.update({name: value for name, value in changes.items() if value is not None})
        if document.get("straggler") is not None:
            document["straggler"] = tuple(document["straggler"])
        return cls(**document)
