"""A small classifier of the digits of scikit-learn, in NumPy: the model that reproductions train.

The network is tanh and softmax, 64-n_hidden-10. Its parameters are one flat vector, as the methods see them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Array = NDArray[np.floating]
Samples = tuple[NDArray[np.floating], NDArray[np.integer]]
"""Inputs (samples, 64) and labels (samples,)."""

N_CLASSES = 10


class Network:
    """A classifier of digits: losses and gradients of a flat parameter vector.

    Args:
        n_hidden: Units of the hidden layer.
        n_train: Training samples; the rest of the 1,797 samples are for tests.
        label_noise: The fraction of training labels that are replaced by a random class.
        dtype: The type of the data and of the parameters.
    """

    def __init__(
        self, n_hidden: int = 32, *, n_train: int = 1437, label_noise: float = 0.0, dtype: type = np.float64
    ) -> None:
        digits, rng = load_digits(), np.random.default_rng(0)
        order = rng.permutation(len(digits.target))
        x, y = (digits.data[order] / 16 - 0.5).astype(dtype), digits.target[order]
        self.train, self.test = (x[:n_train], y[:n_train].copy()), (x[n_train:], y[n_train:])
        noisy = rng.random(n_train) < label_noise
        self.train[1][noisy] = rng.integers(N_CLASSES, size=int(noisy.sum()))
        self.dtype = np.dtype(dtype)
        self.shapes = ((64, n_hidden), (n_hidden,), (n_hidden, N_CLASSES), (N_CLASSES,))
        self.n = sum(int(np.prod(shape)) for shape in self.shapes)
        self._ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])[:-1]

    def start(self, seed: int) -> Array:
        """Return the initial vector (n,): weights of variance 1/fan-in, zero biases."""
        rng, w = np.random.default_rng(seed), np.zeros(self.n, self.dtype)
        for part in self.split(w)[::2]:
            part[...] = rng.normal(size=part.shape) / np.sqrt(len(part))
        return w

    def split(self, w: Array) -> list[Array]:
        """Return views of vectors (..., n): weights and biases of both layers."""
        parts = np.split(w, self._ends, axis=-1)
        return [part.reshape(w.shape[:-1] + shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def forward(self, w: Array, x: Array) -> tuple[Array, Array]:
        """Return the hidden layer and the log-probabilities (..., samples, 10) of vectors (..., n)."""
        w_1, b_1, w_2, b_2 = self.split(w)
        hidden = np.tanh(x @ w_1 + b_1[..., None, :])
        logits = hidden @ w_2 + b_2[..., None, :]
        logits -= logits.max(axis=-1, keepdims=True)
        return hidden, logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    def loss(self, w: Array, samples: Samples | None = None) -> float:
        """Return the mean cross-entropy, by default on the training samples; NaN for non-finite parameters."""
        x, y = samples or self.train
        return float(-self.forward(w, x)[1][np.arange(len(y)), y].mean())

    def error(self, w: Array, samples: Samples | None = None) -> float:
        """Return the fraction of wrong answers, by default on the test samples."""
        x, y = samples or self.test
        return float((self.forward(w, x)[1].argmax(axis=-1) != y).mean())

    def losses_and_gradients(self, w: Array, x: Array, y: NDArray[np.integer], out: Array) -> Array:
        """Compute the gradients of k vectors (k, n) on a mini-batch each into ``out`` (k, n); return the losses (k,).

        Args:
            w: The vectors.
            x, y: Inputs (k, samples, 64) and labels (k, samples).
            out: The gradients of the losses.
        """
        w_2 = self.split(w)[2]
        hidden, logs = self.forward(w, x)
        right = np.take_along_axis(logs, y[..., None], axis=-1)
        error = np.exp(logs)
        np.put_along_axis(error, y[..., None], np.exp(right) - 1, axis=-1)
        error /= y.shape[-1]
        below = (error @ w_2.swapaxes(-1, -2)) * (1 - hidden**2)
        parts = (x.swapaxes(-1, -2) @ below, below.sum(-2), hidden.swapaxes(-1, -2) @ error, error.sum(-2))
        for part, value in zip(self.split(out), parts, strict=True):
            part[...] = value
        losses: Array = -right[..., 0].mean(axis=-1)
        return losses

    def gradient_on(self, w: Array, samples: Samples) -> Array:
        """Return the gradient (n,) of ``loss``."""
        out = np.empty((1, self.n), self.dtype)
        self.losses_and_gradients(w[None], samples[0][None], samples[1][None], out)
        gradient: Array = out[0]
        return gradient


class MiniBatches:
    """Gradients of mini-batches, which each worker draws with replacement: a ``BatchedGradient`` of the simulator.

    Args:
        network: The classifier.
        n_workers: The number of workers.
        batch_size: Samples of a gradient.
        seed: The seed of the draws.
        parts: The indices of the training samples of each worker; by default every worker draws from all.
    """

    largest_batch = 64

    def __init__(
        self,
        network: Network,
        n_workers: int,
        *,
        batch_size: int = 16,
        seed: int = 0,
        parts: Sequence[NDArray[np.integer]] | None = None,
    ) -> None:
        self._network, self._size, self._parts = network, batch_size, parts
        self._draws = [np.random.default_rng([seed, rank]) for rank in range(n_workers)]
        self._losses = np.zeros(n_workers)

    def batch(self, ranks: list[int], xs: list[np.ndarray], out: np.ndarray) -> None:
        """Compute the next gradients of k workers at ``xs``, (n,) each, into ``out`` (k, n)."""
        x, y = self._network.train
        chosen = np.stack([self._choose(rank) for rank in ranks])
        self._losses[ranks] = self._network.losses_and_gradients(np.stack(xs), x[chosen], y[chosen], out)

    def __call__(self, rank: int, x: np.ndarray) -> np.ndarray:
        """Return the next gradient (n,) of a worker."""
        out = np.empty((1, x.size), x.dtype)
        self.batch([rank], [x], out)
        gradient: np.ndarray = out[0]
        return gradient

    def loss(self, rank: int, x: np.ndarray) -> float:
        """Return the loss of the worker's last mini-batch at the parameters of its last gradient."""
        return float(self._losses[rank])

    def _choose(self, rank: int) -> NDArray[np.integer]:
        if self._parts is None:
            return self._draws[rank].integers(len(self._network.train[1]), size=self._size)
        part = self._parts[rank]
        return part[self._draws[rank].integers(len(part), size=self._size)]
