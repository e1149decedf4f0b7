"""The local optimizers of a run, by name: ``--optimizer adamw --optimizer-set beta2=0.95``.

Their settings are declared and checked in the same way as the settings of methods. An optimizer is chosen before torch
is imported, and made with the model's parameters later. ``--lr``, ``--momentum`` and ``--weight-decay`` are options of
their own.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mpitrain.algorithms.base.settings import boolean, check_settings, literal, number, settings_taken, values_of_texts
from mpitrain.errors import UsageError, unknown

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rates:
    """The settings that most optimizers share.

    Attributes:
        lr: The initial learning rate.
        momentum: The momentum of SGD. With None, an imported optimizer uses its own default.
        weight_decay: The weight decay.
    """

    lr: float
    momentum: float | None
    weight_decay: float


@dataclass(frozen=True)
class LocalOptimizer(ABC):
    """A kind of torch optimizer with its settings.

    Attributes:
        name: The value of ``--optimizer``.
        has_momentum: Whether the optimizer uses ``--momentum``.
    """

    name: ClassVar[str]
    has_momentum: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self, self.name)

    def settings(self) -> dict[str, Any]:
        """Return the settings by name."""
        return dict(vars(self))

    @abstractmethod
    def make(self, parameters: Iterable[torch.nn.Parameter], rates: Rates) -> torch.optim.Optimizer:
        """Make the torch optimizer of these parameters."""


@dataclass(frozen=True)
class SGD(LocalOptimizer):
    """``torch.optim.SGD``."""

    nesterov: bool = boolean(False, "step along the gradient after the momentum")
    dampening: float = number(0.0, "share of the gradient that the momentum leaves out", low=0, below=1)

    name: ClassVar[str] = "sgd"
    has_momentum: ClassVar[bool] = True

    def make(self, parameters: Iterable[torch.nn.Parameter], rates: Rates) -> torch.optim.Optimizer:
        """Make the torch optimizer of these parameters."""
        import torch

        momentum = rates.momentum or 0.0
        return torch.optim.SGD(
            parameters,
            lr=rates.lr,
            momentum=momentum,
            dampening=self.dampening,
            weight_decay=rates.weight_decay,
            nesterov=self.nesterov,
        )


@dataclass(frozen=True)
class Adam(LocalOptimizer):
    """``torch.optim.Adam``: the weight decay is added to the gradient."""

    beta1: float = number(0.9, "memory of the mean of the gradient", low=0, below=1)
    beta2: float = number(0.999, "memory of the mean of its square", low=0, below=1)
    eps: float = number(1e-8, "added to the root of the second mean", low=0)
    amsgrad: bool = boolean(False, "divide by the largest second mean so far")

    name: ClassVar[str] = "adam"

    def make(self, parameters: Iterable[torch.nn.Parameter], rates: Rates) -> torch.optim.Optimizer:
        """Make the torch optimizer of these parameters."""
        import torch

        kind = torch.optim.AdamW if isinstance(self, AdamW) else torch.optim.Adam
        return kind(
            parameters,
            lr=rates.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=rates.weight_decay,
            amsgrad=self.amsgrad,
        )


@dataclass(frozen=True)
class AdamW(Adam):
    """``torch.optim.AdamW``. The weight decay is separate from the gradient: a step subtracts lr*weight_decay*x."""

    name: ClassVar[str] = "adamw"


@dataclass(frozen=True)
class Lion(LocalOptimizer):
    """Lion (``trainer.lion``). The weight decay is separate from the gradient: a step subtracts lr*weight_decay*x."""

    beta1: float = number(0.9, "memory of the momentum in the direction of a step", low=0, below=1)
    beta2: float = number(0.99, "memory of the momentum", low=0, below=1)

    name: ClassVar[str] = "lion"

    def make(self, parameters: Iterable[torch.nn.Parameter], rates: Rates) -> torch.optim.Optimizer:
        """Make the torch optimizer of these parameters."""
        from mpitrain.trainer.lion import Lion as TorchLion

        return TorchLion(parameters, lr=rates.lr, betas=(self.beta1, self.beta2), weight_decay=rates.weight_decay)


@dataclass(frozen=True)
class Imported(LocalOptimizer):
    """A torch optimizer that is imported from ``module:Class``. The class is called with ``lr`` and the settings.

    Attributes:
        path: ``module:Class``.
        texts: The settings as texts: Python literals, or words.
    """

    path: str
    texts: Mapping[str, str]

    name: ClassVar[str] = "imported"
    has_momentum: ClassVar[bool] = True

    def settings(self) -> dict[str, Any]:
        """Return the settings by name."""
        return {key: literal(text) for key, text in self.texts.items()}

    def make(self, parameters: Iterable[torch.nn.Parameter], rates: Rates) -> torch.optim.Optimizer:
        """Make the optimizer of these parameters.

        Raises:
            UsageError: The class cannot be imported, lacks a setting, or refuses a value.
        """
        import torch

        from mpitrain.models.imported import imported

        kind = imported("optimizer", self.path, otherwise=f"use one of {', '.join(KINDS)}")
        settings = settings_taken(kind, self.path, self.settings())
        known = inspect.signature(kind).parameters
        for name, value in {"momentum": rates.momentum, "weight_decay": rates.weight_decay or None}.items():
            if value is not None:
                if name not in known:
                    raise UsageError(f"{self.path} has no {name}: remove --{name.replace('_', '-')}")
                settings.setdefault(name, value)
        try:
            made = kind(parameters, lr=rates.lr, **settings)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{self.path} refuses its settings ({error}): correct --optimizer-set") from error
        if not isinstance(made, torch.optim.Optimizer):
            raise UsageError(f"{self.path} returned a {type(made).__name__}, not a torch.optim.Optimizer")
        return made


KINDS: dict[str, type[LocalOptimizer]] = {kind.name: kind for kind in (SGD, Adam, AdamW, Lion)}


def create(name: str, texts: Mapping[str, str]) -> LocalOptimizer:
    """Return an optimizer from its name and its settings as text.

    Raises:
        UsageError: The name or a setting is unknown, or a value is invalid.
    """
    if ":" in name:
        return Imported(name, texts)
    if name not in KINDS:
        raise UsageError(unknown("optimizer", name, KINDS, otherwise="module:Class for an optimizer of your own"))
    return KINDS[name](**values_of_texts(KINDS[name], name, texts))
