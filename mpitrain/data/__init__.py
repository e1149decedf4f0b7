"""Data sets, the order in which workers draw from them, and importers from standard formats."""

from pathlib import Path

from mpitrain.data.agreement import World
from mpitrain.data.augmentation import augment
from mpitrain.data.builtin import digits, synthetic
from mpitrain.data.dataset import Dataset, Normalisation
from mpitrain.data.from_file import load_file
from mpitrain.data.hdf5 import SUFFIXES
from mpitrain.data.sampler import MODES, Sampler
from mpitrain.data.storage import Limits
from mpitrain.errors import UsageError

__all__ = ["MODES", "Dataset", "Limits", "Normalisation", "Sampler", "World", "augment", "load"]


def load(
    name: str,
    *,
    world: World,
    sampling: str = "independent",
    seed: int = 0,
    split_seed: int = 0,
    limits: Limits | None = None,
) -> Dataset:
    """Collective over the ranks of each node: loads a data set.

    Args:
        name: `digits`, `synthetic` (with options: `synthetic:n=10000,shape=3x32x32,classes=10`), or the path of an HDF5
            file.
        world: The ranks, and the memory that those of a node share.
        sampling: How the data will be drawn, "independent" or "sharded"; decides where a large file is kept.
        seed: Which synthetic data; not the run's seed, if runs with different seeds are to learn the same thing.
        split_seed: Which fifth of the digits is the test set.
        limits: Memory that the data may take on a node; measured if not given.
    """
    if sampling not in MODES:
        raise UsageError(f"no sampling '{sampling}': use one of {', '.join(MODES)}")
    limits = limits or Limits.measure()
    kind, _, options = name.partition(":")
    if name == "digits":
        return digits(split_seed=split_seed)
    if kind == "synthetic":
        return synthetic(options, world=world, seed=seed, limits=limits)
    path = Path(name).expanduser()
    if path.suffix in SUFFIXES or path.is_file():
        return load_file(path, world=world, sampling=sampling, limits=limits)
    raise UsageError(f"no data '{name}': use digits, synthetic, or the path of an HDF5 file ({' or '.join(SUFFIXES)})")
