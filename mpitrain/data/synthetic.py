"""Synthetic data: samples drawn from a formula, the same for any number of ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpitrain.data.dataset import ArrayDataset, Normalisation
from mpitrain.data.node_agreement import World, agree, all_ok
from mpitrain.data.option_parsing import between, choice, parse_options, positive, sizes
from mpitrain.data.storage import Limits, MemoryImages, share_of
from mpitrain.errors import UsageError

BLOCK = 256  # samples drawn from one random stream, so that any rank can draw any block
HIDDEN = 64  # units of the teacher

OPTIONS: dict[str, Callable[[str], object]] = {
    "n": positive,
    "test": positive,
    "shape": sizes,
    "classes": positive,
    "kind": choice("clusters", "teacher"),
    "separation": between(0, 1e3),
}

Draw = Callable[[np.random.Generator, int], tuple[NDArray[np.float64], NDArray[np.int64]]]
"""``draw(rng, n)`` returns samples (n, d) and their labels (n,)."""


@dataclass(frozen=True)
class Spec:
    """The options of a synthetic data set."""

    n_train: int
    n_test: int
    shape: tuple[int, ...]
    n_classes: int
    kind: str
    separation: float

    @classmethod
    def parse(cls, options: str) -> "Spec":
        """Read options such as ``n=10000,shape=3x32x32``."""
        given = parse_options(options, OPTIONS, owner="synthetic")
        n, shape = given.get("n", 10_000), given.get("shape", (20,))
        if len(shape) not in (1, 3):
            written = "x".join(map(str, shape))
            raise UsageError(f"synthetic cannot make shape={written}: use d or CxHxW, such as 20 or 3x32x32")
        n_test = given.get("test", max(1, n // 5))
        kind, separation = given.get("kind", "clusters"), given.get("separation", 3.0)
        return cls(n, n_test, shape, given.get("classes", 10), kind, separation)

    @property
    def n(self) -> int:
        """The number of samples in both sets together."""
        return self.n_train + self.n_test

    @property
    def d(self) -> int:
        """The number of coordinates of a sample."""
        return math.prod(self.shape)


def load_synthetic(options: str, *, world: World, seed: int, limits: Limits) -> ArrayDataset:
    """Return samples drawn from a formula. Collective over the node.

    With kind=clusters, x = m_y + z: m_y is the center of class y, and z is standard normal noise. Two centers are about
    separation * sqrt(2) apart in any dimension, so classes overlap more if the separation is smaller.

    With kind=teacher, x = z, and y is the index of the largest output of a random two-layer tanh network. These labels
    contain no noise.

    Args:
        options: `n` and `test`, the numbers of training and test samples; `shape`, `classes`, `kind`, `separation`.
        world: The ranks of the node, which share the memory.
        seed: The seed of the centers or the teacher, and of the samples.
        limits: The memory that the data may occupy.
    """
    spec = Spec.parse(options)
    n_bytes = spec.n * (4 * spec.d + 8)
    shared = agree(world, n_bytes <= limits.shared_bytes)
    if not shared and agree(world, n_bytes * world.local_size > limits.private_bytes):
        raise UsageError(f"{n_bytes / 2**30:.1f} GiB of synthetic data do not fit into memory: use a smaller n")
    x: NDArray[np.float32]
    y: NDArray[np.int64]
    if shared:
        x, y = world.shared_array((spec.n, spec.d), np.float32), world.shared_array((spec.n,), np.int64)
        start, stop = share_of(spec.n, world.local_rank, world.local_size, BLOCK)
    else:
        x, y = np.empty((spec.n, spec.d), np.float32), np.empty(spec.n, np.int64)
        start, stop = 0, spec.n
    draw = _formula(spec, seed)

    def fill() -> None:
        for low in range(start, stop, BLOCK):
            n_drawn = min(BLOCK, stop - low)
            samples, labels = draw(np.random.default_rng([seed, 1, low // BLOCK]), BLOCK)
            x[low : low + n_drawn], y[low : low + n_drawn] = samples[:n_drawn], labels[:n_drawn]

    all_ok(world, fill)
    images = x.reshape(spec.n, *spec.shape)
    n_channels = spec.shape[0]
    return ArrayDataset(
        name="synthetic",
        classes=tuple(str(label) for label in range(spec.n_classes)),
        shape=spec.shape,
        normalisation=Normalisation(1.0, (0.0,) * n_channels, (1.0,) * n_channels),
        storage="shared" if shared else "private",
        train_images=MemoryImages(images[: spec.n_train]),
        train_labels=y[: spec.n_train],
        test_images=MemoryImages(images[spec.n_train :]),
        test_labels=y[spec.n_train :],
    )


def _formula(spec: Spec, seed: int) -> Draw:
    """Return the function that draws samples, with the centers or the teacher of the seed."""
    rng, d = np.random.default_rng([seed, 0]), spec.d
    centers = rng.standard_normal((spec.n_classes, d)) * (spec.separation / np.sqrt(d))
    first, second = rng.standard_normal((d, HIDDEN)) / np.sqrt(d), rng.standard_normal((HIDDEN, spec.n_classes))

    def draw(rng: np.random.Generator, n: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        labels = rng.integers(spec.n_classes, size=n)
        z = rng.standard_normal((n, d))
        if spec.kind == "clusters":
            return centers[labels] + z, labels
        return z, np.argmax(np.tanh(z @ first) @ second, axis=1)

    return draw
