"""Loggers: back-ends that receive the numbers of a run while it trains.

    name          package (extra)                    where the numbers are
    csv           none                               RUN/log.csv
    tensorboard   tensorboardX (tensorboard)         RUN/tensorboard
    wandb         wandb (wandb)                      the server of W&B, or RUN/wandb with WANDB_MODE=offline
    mlflow        mlflow or mlflow-skinny (mlflow)   the server in MLFLOW_TRACKING_URI, or RUN/mlruns without one

``RunLogger`` passes everything to several back-ends. A back-end that raises an error is left out from then on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpitrain.errors import UsageError, unknown
from mpitrain.loggers.csv_file import CSVLogger
from mpitrain.loggers.interface import Logger
from mpitrain.loggers.mlflow_run import MLflowLogger
from mpitrain.loggers.tensorboard import TensorBoardLogger
from mpitrain.loggers.wandb_run import WandbLogger


@dataclass(frozen=True)
class Backend:
    """A back-end that ``--log`` knows by name.

    Attributes:
        make: A function that returns the logger for the folder of a run.
        package: The package that it imports; None if it needs none. The extra has the name of the back-end.
        needs_folder: Whether it can only write to a run folder.
    """

    make: Callable[[Path | None], Logger]
    package: str | None
    needs_folder: bool


BACKENDS = {
    "csv": Backend(CSVLogger, None, needs_folder=True),
    "tensorboard": Backend(TensorBoardLogger, "tensorboardX", needs_folder=True),
    "wandb": Backend(WandbLogger, "wandb", needs_folder=False),
    "mlflow": Backend(MLflowLogger, "mlflow", needs_folder=False),
}


def check(names: Sequence[str], *, has_folder: bool) -> None:
    """Check that the back-ends exist and can be used. Their packages are not imported.

    Args:
        names: The names of the back-ends.
        has_folder: Whether the run has a folder.

    Raises:
        UsageError: A name is unknown or is given twice, a package is not installed, or a folder is missing.
    """
    for name in names:
        backend = BACKENDS.get(name)
        if backend is None:
            raise UsageError(f"--log: {unknown('value', name, BACKENDS)}")
        if names.count(name) > 1:
            raise UsageError(f"--log {name} was given twice: give each back-end once")
        if backend.needs_folder and not has_folder:
            raise UsageError(f"--log {name} writes to the folder of the run: add --out RUN")
        if backend.package is not None and importlib.util.find_spec(backend.package) is None:
            raise UsageError(
                f"--log {name} needs the package {backend.package}, which is not installed: "
                f"pip install 'mpitrain[{name}]'"
            )


def make(name: str, folder: Path | None) -> Logger:
    """Return the logger of a back-end.

    Raises:
        UsageError: See ``check``.
    """
    check([name], has_folder=folder is not None)
    return BACKENDS[name].make(folder)
