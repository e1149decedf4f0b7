"""Data that needs no download: scikit-learn's digits, and samples drawn from a formula."""

import importlib.util
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpitrain.data.agreement import World, agree, all_ok
from mpitrain.data.dataset import Dataset, Normalisation
from mpitrain.data.options import between, choice, parse_options, positive, sizes
from mpitrain.data.splits import stratified
from mpitrain.data.storage import Limits, MemoryImages, share_of
from mpitrain.errors import UsageError

BLOCK = 256  # synthetic samples that share a random stream, so that any rank can draw any block


def digits(*, split_seed: int) -> Dataset:
    """1,797 handwritten digits of 8x8 pixels in 0..16 (UCI, by scikit-learn); a fifth of each class is the test set."""
    table = _digits_table()
    images = table[:, :-1].astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = table[:, -1].astype(np.int64)
    is_test = stratified(labels, 0.2, split_seed)
    train = images[~is_test]
    return Dataset(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        shape=(1, 8, 8),
        normalisation=Normalisation(16.0, (float(train.mean() / 16),), (float(train.std() / 16),)),
        storage="private",
        train_images=MemoryImages(train),
        train_labels=labels[~is_test],
        test_images=MemoryImages(images[is_test]),
        test_labels=labels[is_test],
    )


def _digits_table() -> NDArray[np.float64]:
    """(1797, 65): 64 pixels and the label of each digit.

    It is read from the file that scikit-learn comes with, because importing scikit-learn takes a second.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise UsageError("digits come with scikit-learn: pip install scikit-learn, or use --data synthetic")
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.exists():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits  # it has moved

    loaded = load_digits()
    return np.column_stack([loaded.data, loaded.target])


def synthetic(options: str, *, world: World, seed: int, limits: Limits) -> Dataset:
    """Collective over the node: samples drawn from a formula.

    kind=clusters: x = m_y + z with z ~ N(0, 1) per coordinate and centers m drawn so that two of them are about
    separation * sqrt(2) apart, whatever the dimension; the smaller the separation, the more classes overlap.
    kind=teacher: x = z and y = argmax of a random two-layer tanh network, so that there is something to learn and no
    label noise.

    Args:
        options: `n` training and `test` test samples, `shape`, `classes`, `kind`, `separation`.
        world: Whose node shares the memory.
        seed: Which centers or teacher, and which samples.
        limits: What fits.
    """
    known = {
        "n": positive,
        "test": positive,
        "shape": sizes,
        "classes": positive,
        "kind": choice("clusters", "teacher"),
        "separation": between(0, 1e3),
    }
    given = parse_options(options, known, owner="synthetic")
    n, shape, n_classes = given.get("n", 10_000), given.get("shape", (20,)), given.get("classes", 10)
    n_test = given.get("test", max(1, n // 5))
    kind, separation = given.get("kind", "clusters"), given.get("separation", 3.0)
    if len(shape) not in (1, 3):
        written = "x".join(map(str, shape))
        raise UsageError(f"synthetic cannot make shape={written}: use d or CxHxW, such as 20 or 3x32x32")

    d, total = math.prod(shape), n + n_test
    n_bytes = total * (4 * d + 8)
    shared = agree(world, n_bytes <= limits.shared_bytes)
    if not shared and agree(world, n_bytes * world.local_size > limits.private_bytes):
        raise UsageError(f"{n_bytes / 2**30:.1f} GiB of synthetic data do not fit into memory: use a smaller n")
    x: NDArray[np.float32] = world.shared_array((total, d), np.float32) if shared else np.empty((total, d), np.float32)
    y: NDArray[np.int64] = world.shared_array((total,), np.int64) if shared else np.empty(total, np.int64)
    start, stop = share_of(total, world.local_rank, world.local_size, BLOCK) if shared else (0, total)

    law = np.random.default_rng([seed, 0])
    centers = law.standard_normal((n_classes, d)) * (separation / np.sqrt(d))
    first, second = law.standard_normal((d, 64)) / np.sqrt(d), law.standard_normal((64, n_classes))

    def draw() -> None:
        for low in range(start, stop, BLOCK):
            high = min(low + BLOCK, stop)
            rng = np.random.default_rng([seed, 1, low // BLOCK])
            labels = rng.integers(n_classes, size=BLOCK)[: high - low]
            z = rng.standard_normal((BLOCK, d))[: high - low]
            x[low:high] = centers[labels] + z if kind == "clusters" else z
            y[low:high] = labels if kind == "clusters" else np.argmax(np.tanh(z @ first) @ second, axis=1)

    all_ok(world, draw)
    images = x.reshape(total, *shape)
    return Dataset(
        name="synthetic",
        classes=tuple(str(label) for label in range(n_classes)),
        shape=shape,
        normalisation=Normalisation(1.0, (0.0,) * shape[0], (1.0,) * shape[0]),
        storage="shared" if shared else "private",
        train_images=MemoryImages(images[:n]),
        train_labels=y[:n],
        test_images=MemoryImages(images[n:]),
        test_labels=y[n:],
    )
