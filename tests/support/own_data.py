"""Data as a user gives them: functions for ``--data support.own_data:NAME``."""

from __future__ import annotations

import os
import signal
import sys

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from mpitrain import data
from mpitrain.data.worker_processes import end_later
from mpitrain.trainer.study import OneProcess

WHERE = ("index", "process", "has started MPI", "ends later")


class Arrays(Dataset):
    """The samples of the built-in data, one by one, with the attributes of torchvision's data sets."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, n_classes: int) -> None:
        self.inputs, self.targets = inputs, targets.tolist()
        self.classes = [str(k) for k in range(n_classes)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.inputs[index], self.targets[index]


def synthetic(name: str = "synthetic:n=64,test=20,shape=6,classes=4") -> tuple[Arrays, Arrays]:
    loaded = data.load(name, world=OneProcess())
    train, test = loaded.batch(np.arange(loaded.n_train)), loaded.test_batch(np.arange(loaded.n_test))
    return Arrays(*train, loaded.n_classes), Arrays(*test, loaded.n_classes)


class Witness(Dataset):
    """Samples that say where they were read."""

    classes = ("only",)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        later = signal.getsignal(signal.SIGTERM) is end_later
        mpi = sys.modules["mpi4py.MPI"]  # imported by this module, and started with the import in a process of its own
        return torch.tensor([index, os.getpid(), mpi.Is_initialized(), later], dtype=torch.float64), 0


def witness() -> tuple[Witness, Witness]:
    return Witness(), Witness()


def local() -> tuple[Dataset, Dataset]:
    class Local(Witness):
        pass

    return Local(), Local()


def regression() -> tuple[TensorDataset, TensorDataset]:
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    both = TensorDataset(x, x @ torch.tensor([[1.0, 2], [0, 1], [3, 0]]))
    return both, both


def sequences() -> tuple[Arrays, Arrays]:
    tokens = torch.arange(33 * 8).reshape(33, 8) % 7
    made = Arrays(tokens, torch.zeros(33), 7)
    made.targets = list(tokens.roll(-1, 1))
    return made, made


def unnamed() -> tuple[TensorDataset, TensorDataset]:
    both = TensorDataset(torch.zeros(8, 3), torch.zeros(8, dtype=torch.long))
    return both, both


def one_set() -> Dataset:
    return Witness()


def ragged() -> tuple[Dataset, Dataset]:
    class Ragged(Witness):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.zeros(1 + index % 2), 0

    return Ragged(), Ragged()


def lone_inputs() -> tuple[Dataset, Dataset]:
    return TensorDataset(torch.zeros(8, 3)), TensorDataset(torch.zeros(8, 3))


def empty() -> tuple[Dataset, Dataset]:
    return Witness(), TensorDataset(torch.zeros(0, 3))
