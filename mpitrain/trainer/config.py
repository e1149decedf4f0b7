"""What a training run is asked to do."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpitrain import algorithms
from mpitrain.algorithms import Method
from mpitrain.algorithms.base.iterate_average import Average
from mpitrain.errors import UsageError
from mpitrain.kernels.native.wire import FLOAT32, format_of

DEFAULT_EPOCHS = 10.0
BUDGETS = ("epochs", "steps", "gradients", "minutes")
NOT_OF_THE_RESULT = (*BUDGETS, "device", "transport", "evaluate_every", "checkpoint_every", "straggler", "quiet")
"""What a resumed run may be given anew; all else decides what it computes."""


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
        average: What is evaluated instead of what the method evaluates: ``polyak``, ``moving:RATE``, or None.
        seed: Of everything random: weights, sampling, augmentation, peers.
        device: ``cpu`` or ``cuda``.
        transport: How vectors on GPUs reach other ranks: ``auto``, ``ipc``, ``cuda-aware`` or ``staged``.
        out: The run's folder; made new.
        sampling: ``independent`` (each rank shuffles the whole set) or ``sharded``.
        augment: Random crops and flips.
        evaluate_every: Steps of rank 0 between evaluations; an epoch when None.
        evaluate_seconds: Seconds between evaluations, instead.
        defer_evaluation: Only keep what the method evaluates while training, and evaluate it afterwards on all ranks:
            the run is not disturbed.
        checkpoint_every: Steps between checkpoints; an epoch when None, never when 0.
        straggler: Rank and factor: this rank computes that many times slower.
        replica_size: Ranks that are one worker between them, each with mini-batches of its own.
        wire: How vectors cross nodes: ``float32``, ``bfloat16``, ``float16`` or ``int8``; see ``DistributedOptimizer``.
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
    average: str | None = None
    seed: int = 0
    device: str = "cpu"
    transport: str = "auto"
    out: str | None = None
    sampling: str = "independent"
    augment: bool = False
    evaluate_every: int | None = None
    evaluate_seconds: float | None = None
    defer_evaluation: bool = False
    checkpoint_every: int | None = None
    straggler: tuple[int, float] | None = None
    replica_size: int = 1
    wire: str = FLOAT32
    quiet: bool = False

    def __post_init__(self) -> None:
        budgets = [b for b in (self.epochs, self.steps, self.gradients, self.minutes) if b is not None]
        if len(budgets) > 1:
            raise UsageError("give one of --epochs, --steps, --gradients and --minutes, not several")
        if not budgets:
            object.__setattr__(self, "epochs", DEFAULT_EPOCHS)
        for name in ("epochs", "steps", "gradients", "minutes", "batch_size", "evaluate_every", "evaluate_seconds"):
            self._need(name, lambda v: v > 0, "more than 0")
        self._need("replica_size", lambda v: v >= 1, "1 or more")
        for name in ("lr", "weight_decay", "checkpoint_every", "seed"):
            self._need(name, lambda v: v >= 0, "0 or more")
        self._need("momentum", lambda v: 0 <= v < 1, "at least 0 and below 1")
        average_of(self)
        format_of(self.wire)
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

        Args:
            run: Its folder.
            changes: By the names of the fields; None is no change. What decides the result may be repeated only.

        Raises:
            UsageError: When ``run`` is not the folder of a run, or a change would make it another one.
        """
        path = run / "config.json"
        try:
            document = json.loads(path.read_text())["config"]
            stored = cls(**{**document, "straggler": document["straggler"] and tuple(document["straggler"])})
        except (OSError, LookupError, TypeError, ValueError) as error:
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise UsageError(f"{run} is not the folder of a run: {path} cannot be read ({why})") from error
        changes = {name: value for name, value in changes.items() if value is not None}
        for key, value in changes.pop("settings", {}).items():
            _refuse_change(f"--set {key}", value, stored.settings.get(key))
        for name, value in changes.items():
            if name not in NOT_OF_THE_RESULT:
                _refuse_change(f"--{name.replace('_', '-')}", value, getattr(stored, name))
        if any(name in changes for name in BUDGETS):
            changes = {**dict.fromkeys(BUDGETS), **changes}
        return dataclasses.replace(stored, **changes)


def _refuse_change(option: str, value: Any, stored: Any) -> None:
    if value != stored:
        of_the_run = "the default" if stored is None else stored
        raise UsageError(
            f"{option} is {of_the_run} in the run that is resumed, not {value}: leave it out, or start a new run"
        )


def method_of(config: TrainConfig) -> Method:
    """The method; ``--momentum`` is its own setting when it makes the update itself.

    Raises:
        UsageError: Unknown names, settings out of range.
    """
    method = algorithms.create(config.algorithm, config.settings)
    if method.owns_update and config.momentum is not None:
        if "momentum" not in method.settings():
            raise UsageError(f"{method.name} makes the update itself, without momentum: leave --momentum out")
        if "momentum" in config.settings:
            raise UsageError(f"{method.name}: give --momentum or --set momentum=..., not both")
        method = algorithms.create(config.algorithm, {**config.settings, "momentum": str(config.momentum)})
    return method


def average_of(config: TrainConfig) -> Average | None:
    """What is evaluated instead of what the method evaluates.

    Raises:
        UsageError: With what ``--average`` takes.
    """
    return None if config.average is None else Average.parse(config.average)


def warnings_of(config: TrainConfig, n_workers: int) -> list[str]:
    """What about a run is outside a region in which its method is proved to work, one line each."""
    return list(method_of(config).warnings(n_workers, config.lr))
