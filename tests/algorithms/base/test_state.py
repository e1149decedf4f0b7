"""State that is declared as a list of attributes: the entries of a checkpoint, by the kind of each attribute."""

import json

import numpy as np
import pytest

from mpitrain.algorithms.base.state import entries, restore


class Vector:
    def __init__(self, values):
        self.local = np.array(values)


class Window:
    persistent = ("sums", "n_steps")

    def __init__(self, value):
        self.sums, self.n_steps = np.full(2, float(value)), value


class HandWritten:
    def __init__(self, value):
        self.value = value

    def state(self):
        yield "center", self.value

    def load(self, state):
        self.value = state["center"]


class First:
    persistent = ("t",)

    def __init__(self, value):
        self.t = value


class Second(First):
    persistent = ("_velocity", "_shown", "_rate", "_is_local", "kind", "_rng", "_center", "_nodes", "_windows")

    def __init__(self, value):
        super().__init__(value)
        self._velocity, self._shown = np.full(3, float(value), np.float32), Vector([value])
        self._rate, self._is_local, self.kind = value / 2, bool(value), f"kind {value}"
        self._rng = np.random.default_rng(value)
        self._center = HandWritten(value)
        self._nodes = [HandWritten(value + 1), HandWritten(value + 2)]
        self._windows = {"long": Window(value), "short": Window(value + 1)}
        self.forgotten = value


NAMES = [
    *("t", "velocity", "shown", "rate", "is_local", "kind", "rng", "center", "center_1", "center_2"),
    *("long_sums", "long_n_steps", "short_sums", "short_n_steps"),
]


def test_entries_are_those_of_the_base_class_then_of_the_class_in_order():
    assert [name for name, _ in entries(Second(3))] == NAMES


def test_what_is_restored_is_what_was_saved():
    saved, other = Second(3), Second(0)
    velocity, shown = other._velocity, other._shown.local
    restore(other, {name: np.copy(value) if isinstance(value, np.ndarray) else value for name, value in entries(saved)})
    assert other._velocity is velocity  # in place: kernels and peers hold references
    assert other._shown.local is shown
    for (name, found), (_, wanted) in zip(entries(other), entries(saved), strict=True):
        assert type(found) is type(wanted), name
        assert np.array_equal(found, wanted), name
    assert other.forgotten == 0
    assert other._rng.random() == saved._rng.random()
    assert json.loads(dict(entries(saved))["rng"])["bit_generator"] == "PCG64"


def test_numbers_of_a_file_become_numbers_of_python():
    worker = Second(3)
    restore(worker, dict(entries(worker)) | {"t": np.int64(7), "rate": np.float64(0.25), "is_local": np.bool_(False)})
    assert (worker.t, worker._rate, worker._is_local) == (7, 0.25, False)
    assert [type(value) for value in (worker.t, worker._rate, worker._is_local)] == [int, float, bool]


@pytest.mark.parametrize("missing", NAMES)
def test_a_missing_entry_is_a_key_error(missing):
    state = dict(entries(Second(3)))
    del state[missing]
    with pytest.raises(KeyError, match=missing):
        restore(Second(0), state)


def test_an_entry_of_another_size_is_refused():
    with pytest.raises(ValueError, match="broadcast"):
        restore(Second(0), dict(entries(Second(3))) | {"velocity": np.zeros(4)})


@pytest.mark.parametrize("value", [None, [1, 2], np.float32(1)], ids=["none", "numbers", "numpy scalar"])
def test_a_value_that_a_checkpoint_cannot_store_is_refused(value):
    owner = First(value)
    with pytest.raises(TypeError, match=r"First.t: a checkpoint cannot store a"):
        list(entries(owner))
    with pytest.raises(TypeError, match=r"First.t: a checkpoint cannot store a"):
        restore(owner, {"t": 1})
