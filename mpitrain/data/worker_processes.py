"""Batches that worker processes read ahead of the training, for data from a function of the user.

The processes are those of ``torch.utils.data.DataLoader``. They are spawned, not forked: a fork of a process that uses
MPI shares its network connections and its locks, and may crash or hang. A spawned process imports the modules of the
data set anew. If one of them imports mpi4py, MPI is not started there. The process ends with its rank.
"""

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from mpitrain.data.dataset import Batch
from mpitrain.data.imported import ImportedDataset, checked
from mpitrain.errors import UsageError

IGNORED = (signal.SIGINT, signal.SIGUSR1)
"""Signals for the ranks. SIGTERM ends a worker, but later: its rank needs it until the last checkpoint is saved."""

GRACE_SECONDS = 30
"""Seconds from SIGTERM to the end of a worker whose rank has not ended it before."""

WITHOUT_MPI = ("MPI4PY_RC_INITIALIZE", "false")
"""The environment variable with which importing mpi4py does not start MPI."""


class WorkerProcesses:
    """The processes of one rank, and the batches that they have read.

    Args:
        dataset: The data set, which can be pickled.
        indices_of: A function that returns the training samples (b,) of a step.
        n_workers: The number of processes.
        seed: The seed of their random generators.
    """

    def __init__(
        self, dataset: ImportedDataset, indices_of: Callable[[int], NDArray[np.int64]], n_workers: int, *, seed: int
    ) -> None:
        self._dataset, self._indices_of, self._n_workers, self._seed = dataset, indices_of, n_workers, seed
        self._batches: Iterator[Any] | None = None
        self._next = 0

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, which is usually the one after the previous call. Local.

        Raises:
            UsageError: The data set cannot be pickled.
        """
        if self._batches is None or step != self._next:
            self._start(step)
        assert self._batches is not None
        self._next = step + 1
        return checked(next(self._batches), self._dataset.name)

    def close(self) -> None:
        """End the processes. Local."""
        if self._batches is not None:
            # A traceback may still refer to the iterator, whose deletion would end the processes otherwise.
            self._batches._shutdown_workers()  # type: ignore[attr-defined]
            self._batches = None

    def _start(self, step: int) -> None:
        self.close()
        loader = DataLoader(
            self._dataset.train,
            batch_sampler=_Steps(self._indices_of, step),
            num_workers=self._n_workers,
            multiprocessing_context="spawn",
            worker_init_fn=_handle_signals,
            generator=torch.Generator().manual_seed(self._seed + step),
        )
        try:
            with _environment(*WITHOUT_MPI), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Got pickle error")  # it advises to fork
                self._batches = iter(loader)
        except Exception as error:  # pickling raises errors of many types
            raise UsageError(
                f"{self._dataset.name}: the data set cannot be sent to worker processes ({type(error).__name__}: "
                f"{error}): define its class at the top of a module, or remove --workers"
            ) from error


class _Steps(Sampler[list[int]]):
    """The samples of each step from a first one on, without end."""

    def __init__(self, indices_of: Callable[[int], NDArray[np.int64]], first: int) -> None:
        self._indices_of, self._first = indices_of, first

    def __iter__(self) -> Iterator[list[int]]:
        step = self._first
        while True:
            yield self._indices_of(step).tolist()
            step += 1


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for the processes that are started inside the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def end_later(*_: Any) -> None:
    """End this process after the grace period. The handler of SIGTERM in a worker."""
    signal.alarm(GRACE_SECONDS)


def _handle_signals(worker: int) -> None:
    signal.signal(signal.SIGTERM, end_later)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
