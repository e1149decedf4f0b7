"""The options of a run that decide which samples a rank reads, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpitrain.errors import UsageError
from mpitrain.trainer.options import NON_NEGATIVE, option, pairs

SAMPLINGS = ("independent", "sharded")
DIRICHLET = "dirichlet:ALPHA"
BUILT_IN = ("digits", "python-text", "synthetic")
SUFFIXES = (".h5", ".hdf5")


def is_imported(data: str) -> bool:
    """Return whether the name of data is that of a function of the user, ``module:function``."""
    head, colon, _ = data.partition(":")
    return bool(colon) and head not in BUILT_IN and not data.endswith(SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Samples, their order, and the sizes of the model that reads them; a base of ``TrainConfig``."""

    model_settings: Mapping[str, str] = option(
        {},
        "an option of the model, such as hidden=256x128 (mlp) or layers=6 (gpt: layers, heads, width, context, "
        "dropout); may be given several times",
        flag="--model-set",
        metavar="KEY=VALUE",
        repeated=True,
        collect=pairs("--model-set", "layers=6"),
    )
    sampling: str = option(
        "independent",
        "each rank draws from the whole training set (independent), from its part of every epoch (sharded), or from a "
        f"fixed part in which classes have shares of their own, more unequal the smaller ALPHA is ({DIRICHLET})",
        metavar="NAME",
    )
    workers: int = option(
        0,
        "processes of each rank that read batches ahead, for data of module:function; 0 reads them in the rank",
        parse=int,
        within=NON_NEGATIVE,
        metavar="N",
        replaceable=True,
    )
    verify: bool = option(
        False, "compare a data file with the digest of its import before training", parse=None, replaceable=True
    )
    augment: bool = option(False, "crop and flip training images at random", parse=None)

    def check_data(self, data: str) -> None:
        """Check how samples are drawn and read.

        Args:
            data: The name of the data.

        Raises:
            UsageError: There is no such sampling, or no work for worker processes.
        """
        if self.workers and not is_imported(data):
            raise UsageError(
                f"--workers is for data of module:function: {data} is in memory or in one file, which a rank reads "
                "faster itself; remove --workers"
            )
        if self.sampling in SAMPLINGS:
            return
        from mpitrain.data.sampler import parse_sampling  # imports torch

        parse_sampling(self.sampling)
