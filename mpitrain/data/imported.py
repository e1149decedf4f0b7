"""Data from a function of the user: a training and a test set in the form of ``torch.utils.data.Dataset``.

    def mine():
        return TensorDataset(x, y), TensorDataset(x_test, y_test)        # --data my_module:mine

A sample is (inputs, answer): a class number, a sequence of tokens, or real-valued targets. The number of classes is
that of the attribute ``classes`` of the training set, or follows from its ``targets``, as in torchvision.
"""

from collections.abc import Callable, Sized
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset, default_collate

from mpitrain.data.dataset import Batch, Dataset
from mpitrain.errors import UsageError

FORM = "return a training and a test set, each with __len__ and __getitem__, whose samples are (inputs, answer)"


@dataclass(frozen=True, kw_only=True, eq=False)
class ImportedDataset(Dataset):
    """The training and the test set of a function of the user."""

    train: TorchDataset[Any]
    test: TorchDataset[Any]
    number_of_classes: int
    targets_per_sample: int  # without classes
    inputs_are_tokens: bool
    answers_are_tokens: bool

    @property
    def n_train(self) -> int:
        """The number of training samples."""
        return length(self.train)

    @property
    def n_test(self) -> int:
        """The number of test samples."""
        return length(self.test)

    @property
    def n_classes(self) -> int:
        """The number of classes; 0 with real-valued targets."""
        return self.number_of_classes

    @property
    def n_outputs(self) -> int:
        """The number of outputs of a model for an answer."""
        return self.number_of_classes or self.targets_per_sample

    @property
    def has_tokens(self) -> bool:
        """Whether the inputs are whole numbers."""
        return self.inputs_are_tokens

    @property
    def predicts_tokens(self) -> bool:
        """Whether an answer is a sequence of classes."""
        return self.answers_are_tokens

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """The attribute ``targets`` of the training set, if it is one class for each sample; otherwise None."""
        found = targets_of(self.train)
        is_class = found is not None and found.shape == (self.n_train,) and found.dtype.kind in "iu"
        return found if self.number_of_classes and is_class else None

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """Return the training samples at the given indices, in that order. Local."""
        return joined([self.train[k] for k in indices.tolist()], self.name)

    def test_batch(self, indices: NDArray[np.int64]) -> Batch:
        """Return the test samples at the given indices, in that order. Local."""
        return joined([self.test[k] for k in indices.tolist()], self.name)

    def with_test_samples(self, indices: NDArray[np.int64]) -> Self:
        """Return the data set with these samples as the test set. Local."""
        return replace(self, test=Subset(self.test, indices.tolist()))

    def description(self) -> object:
        """Return the name of the function, the shape of a sample and the number of outputs."""
        return self.name, self.shape, self.n_outputs


def joined(samples: list[Any], name: str) -> Batch:
    """Return samples as one batch of inputs and answers. Local.

    Args:
        samples: Pairs of inputs and answer.
        name: The function, for messages.

    Raises:
        UsageError: The samples have another form, or different shapes.
    """
    try:
        found = default_collate(samples)
    except (TypeError, RuntimeError) as error:
        raise UsageError(f"{name}: its samples do not form a batch ({error}): give them the same shape") from error
    return checked(found, name)


def checked(found: Any, name: str) -> Batch:
    """Return a batch as inputs and answers.

    Raises:
        UsageError: It has another form.
    """
    is_pair = isinstance(found, list | tuple) and len(found) == 2 and all(isinstance(one, Tensor) for one in found)
    if not is_pair:
        raise UsageError(f"{name}: {FORM}")
    x, y = found
    return x, (y.to(torch.float32).reshape(len(y), -1) if y.is_floating_point() else y.long())


def load_imported(name: str, function: Callable[..., Any]) -> ImportedDataset:
    """Return the data set of a function of the user. Local; each rank calls the function.

    Raises:
        UsageError: The function returns something else.
    """
    sets = function()
    if not (isinstance(sets, tuple | list) and len(sets) == 2 and all(_is_set(one) for one in sets)):
        raise UsageError(f"{name}: {FORM}")
    train, test = sets
    for what, one in (("training", train), ("test", test)):
        if not length(one):
            raise UsageError(f"{name}: the {what} set is empty")
    x, y = joined([train[0]], name)
    has_classes = not y.is_floating_point()
    return ImportedDataset(
        name=name,
        shape=tuple(x.shape[1:]),
        storage="private",
        train=train,
        test=test,
        number_of_classes=_n_classes(name, train) if has_classes else 0,
        targets_per_sample=y[0].numel(),
        inputs_are_tokens=not x.is_floating_point(),
        answers_are_tokens=has_classes and y.ndim > 1,
    )


def _is_set(one: Any) -> bool:
    return hasattr(one, "__getitem__") and isinstance(one, Sized)


def length(one: TorchDataset[Any]) -> int:
    """Return the number of samples."""
    assert isinstance(one, Sized)
    return len(one)


def targets_of(train: TorchDataset[Any]) -> NDArray[Any] | None:
    """Return the attribute ``targets`` as an array; None without one."""
    found = getattr(train, "targets", None)
    return None if found is None else np.asarray(found)


def _n_classes(name: str, train: TorchDataset[Any]) -> int:
    """Return the number of classes.

    Raises:
        UsageError: The training set does not tell.
    """
    classes, targets = getattr(train, "classes", None), targets_of(train)
    if isinstance(classes, Sized) and len(classes):
        return len(classes)
    if targets is not None and targets.size and targets.dtype.kind in "iu":
        return int(targets.max()) + 1
    raise UsageError(
        f"{name}: the number of classes is unknown: give the training set an attribute classes (their names) or "
        "targets (the class of each sample)"
    )
