"""Data sets, samplers for distributed workers, and importers of standard formats."""

from pathlib import Path

from mpitrain.data.augmentation import augment
from mpitrain.data.dataset import Dataset, Normalisation
from mpitrain.data.digits import load_digits
from mpitrain.data.hdf5_format import SUFFIXES
from mpitrain.data.hdf5_loader import load_hdf5
from mpitrain.data.identity import Identity, identity_of
from mpitrain.data.node_agreement import World
from mpitrain.data.sampler import MODES, Sampler, parse_sampling
from mpitrain.data.storage import Limits
from mpitrain.data.synthetic import load_synthetic
from mpitrain.data.text import load_python_text
from mpitrain.errors import UsageError, unknown

__all__ = [
    "MODES",
    "Dataset",
    "Identity",
    "Limits",
    "Normalisation",
    "Sampler",
    "World",
    "augment",
    "identity_of",
    "load",
]

BUILT_IN = ("digits", "python-text", "synthetic")
"""The data that need no file."""


def load(
    name: str,
    *,
    world: World,
    sampling: str = "independent",
    seed: int = 0,
    split_seed: int = 0,
    limits: Limits | None = None,
    verify: bool = False,
    context: int = 128,
) -> Dataset:
    """Load a data set. Collective over the ranks of each node.

    Args:
        name: `digits`, `python-text` (the documentation that comes with Python), `synthetic` (with options:
            `synthetic:n=10000,shape=3x32x32,classes=10`), or the path of an HDF5 file.
        world: The ranks, with memory that the ranks of a node share.
        sampling: The way in which samples will be drawn, "independent", "sharded" or "dirichlet:ALPHA". It determines
            where the images of a large file are stored.
        seed: The seed of synthetic data. It is independent of the seed of the run, so that several runs can use the
            same data.
        split_seed: The seed that selects a fifth of the digits as the test set.
        limits: The memory that the data may occupy on a node; by default half of the free memory.
        verify: Whether to compare a data file with its stored digest before it is used. It has no effect on other data.
        context: The number of tokens of a sample of text. It has no effect on other data.
    """
    parse_sampling(sampling)
    limits = limits or Limits.measure()
    kind, _, options = name.partition(":")
    if name == "digits":
        return load_digits(split_seed=split_seed)
    if name == "python-text":
        return load_python_text(context=context)
    if kind == "synthetic":
        return load_synthetic(options, world=world, seed=seed, limits=limits)
    path = Path(name).expanduser()
    if path.suffix in SUFFIXES or path.is_file():
        return load_hdf5(path, world=world, sampling=sampling, limits=limits, verify=verify, context=context)
    file = f"the path of an HDF5 file ({' or '.join(SUFFIXES)})"
    raise UsageError(unknown("data", name, BUILT_IN, otherwise=file))
