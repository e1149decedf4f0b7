"""What the scripts of this folder need to run under any method, on any number of ranks, and to be compared.

A script is a module with a function ``train(run)``. It differs from the public script that it follows in these calls:

    model = run.prepare(Net())                    where the public script has Net().to(device)
    optimizer = run.distribute(base, model)       mpitrain.DistributedOptimizer(base, model, method)
    loader = run.loader(dataset, batch_size)      a DataLoader with a DistributedSampler
    run.randn(...), run.share(...)                this rank's part of noise, or of a batch
    return run.outcome(...)                       the consensus, and its loss

``batch_size`` counts the samples of all ranks together, so that one process without mpitrain (``Run(None)``) makes the
steps that p ranks make together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import mpitrain

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Outcome:
    """The result of a script on one rank.

    Attributes:
        before, after: The script's loss before training, and of the consensus after it.
        parameters: The consensus, by name.
    """

    before: float
    after: float
    parameters: Mapping[str, torch.Tensor]


@dataclass
class Run:
    """One run of a script.

    Args:
        method: The method; None for one process with the torch optimizer alone.
        is_exact: The model in the form that can be compared (``prepare``), instead of the public script's.
        compiler: The backend of ``torch.compile``.
    """

    method: mpitrain.Method | None
    is_exact: bool = False
    compiler: str = "inductor"
    rank: int = 0
    size: int = 1
    _optimizers: list[mpitrain.DistributedOptimizer] = field(default_factory=list)
    _noise: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(7))

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        if self.method is not None:
            world = mpitrain.init()
            self.rank, self.size = world.rank, world.size

    @property
    def dtype(self) -> torch.dtype:
        """The type of parameters and inputs."""
        return torch.float64 if self.is_exact else torch.float32

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the model in the form of this run.

        Three things make p ranks differ from one process with the p-fold batch, also under DistributedDataParallel:
        the statistics of BatchNorm, random numbers drawn on each rank (dropout), and rounding. The exact form has
        GroupNorm, no dropout, and float64.
        """
        if not self.is_exact:
            return model
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, BATCH_NORMS):
                    setattr(module, name, nn.GroupNorm(1, child.num_features))
                elif isinstance(child, nn.Dropout):
                    child.p = 0.0
        return model.double()

    def distribute(self, base: torch.optim.Optimizer, model: nn.Module) -> Any:
        """Return the distributed optimizer; for one process, the torch optimizer. Collective."""
        if self.method is None:
            return base
        self._optimizers.append(mpitrain.DistributedOptimizer(base, model, self.method))
        return self._optimizers[-1]

    def clip_grad_norm_(self, optimizer: Any, parameters: Any, max_norm: float) -> torch.Tensor:
        """Clip as a script does without mpitrain, and with it. Collective where a step averages gradients."""
        if self.method is None:
            return nn.utils.clip_grad_norm_(parameters, max_norm)
        return optimizer.clip_grad_norm_(max_norm)

    def loader(self, dataset: Any, batch_size: int) -> DataLoader:
        """Return a loader of this rank's part of every batch, in a new order in each epoch (``set_epoch``)."""
        if not isinstance(dataset, torch.utils.data.Dataset):
            dataset = TensorDataset(*dataset)
        sampler = DistributedSampler(dataset, num_replicas=self.size, rank=self.rank, shuffle=True, drop_last=True)
        return DataLoader(dataset, batch_size=batch_size // self.size, sampler=sampler, drop_last=True)

    def share(self, batch: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Return this rank's part of a batch that all ranks have."""
        return batch[(slice(None),) * dim + (slice(self.rank, None, self.size),)]

    def randn(self, n: int, *shape: int) -> torch.Tensor:
        """Return noise (n, *shape) for this rank's n samples: its part of the noise that one process draws."""
        return self.share(torch.randn(n * self.size, *shape, generator=self._noise, dtype=torch.float64)).to(self.dtype)

    def mean(self, value: float) -> float:
        """Return the mean of a number over the ranks. Collective."""
        return value if self.method is None else mpitrain.init().comm.allreduce(value) / self.size

    def outcome(self, model: nn.Module, before: float, loss: Callable[[], float]) -> Outcome:
        """Return the loss of the consensus, and its parameters. Collective; closes the optimizers."""
        for optimizer in self._optimizers:
            optimizer.world.barrier()
            optimizer.finalize()
            optimizer.world.barrier()
        with ExitStack() as stack:
            for optimizer in self._optimizers:
                stack.enter_context(optimizer.consensus())
            after = float(loss())
            parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
        for optimizer in self._optimizers:
            optimizer.world.barrier()
            optimizer.close()
        self._optimizers.clear()
        return Outcome(float(before), after, parameters)


def deviation(found: Outcome, wanted: Outcome) -> float:
    """Return the largest difference of a parameter, relative to the parameter where that is above 1."""
    assert found.parameters.keys() == wanted.parameters.keys()
    pairs = [(found.parameters[name].double(), value.double()) for name, value in wanted.parameters.items()]
    return max(float(((a - b).abs() / b.abs().clamp(min=1)).max()) for a, b in pairs)


def digits(dtype: torch.dtype, n: int = 480) -> tuple[torch.Tensor, torch.Tensor]:
    """Return handwritten digits: images (n, 1, 8, 8) in [0, 1], and labels (n,)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:n] / 16, dtype=dtype).reshape(-1, 1, 8, 8), torch.tensor(labels[:n])


def text(n: int, vocabulary: int) -> torch.Tensor:
    """Return n tokens of a language with grammar: after a token comes one of two others."""
    generator = torch.Generator().manual_seed(1)
    choices = torch.randint(2, (n,), generator=generator).tolist()
    tokens = [0]
    for choice in choices[1:]:
        tokens.append((3 * tokens[-1] + 1 + choice) % vocabulary)
    return torch.tensor(tokens)
