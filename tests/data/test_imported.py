"""Data of a function of the user, and the processes that read them ahead."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch
from support import own_data

from mpitrain.data import Sampler, identity_of
from mpitrain.data.imported import load_imported
from mpitrain.data.worker_processes import GRACE_SECONDS, WorkerProcesses, end_later
from mpitrain.errors import UsageError


def loaded(function):
    return load_imported(f"own_data:{function.__name__}", function)


def test_samples_classes_and_labels_are_those_of_the_function():
    data, (train, test) = loaded(own_data.synthetic), own_data.synthetic()
    assert (data.n_train, data.n_test, data.n_classes, data.n_outputs, data.shape) == (64, 20, 4, 4, (6,))
    assert (data.has_tokens, data.predicts_tokens) == (False, False)
    x, y = data.batch(np.array([5, 3]))
    torch.testing.assert_close(x, train.inputs[[5, 3]])
    assert y.tolist() == [train.targets[5], train.targets[3]]
    np.testing.assert_array_equal(data.labels, train.targets)
    assert torch.cat([y for _, y in data.test_batches(7)]).tolist() == test.targets


def test_real_valued_answers_are_targets():
    data = loaded(own_data.regression)
    assert (data.n_classes, data.n_outputs, data.labels) == (0, 2, None)
    assert data.batch(np.arange(4))[1].shape == (4, 2)


def test_whole_numbers_are_tokens():
    data = loaded(own_data.sequences)
    assert (data.has_tokens, data.predicts_tokens, data.n_classes, data.shape) == (True, True, 7, (8,))
    assert data.labels is None


def test_the_identity_names_the_function_and_the_sizes():
    one, other = identity_of(loaded(own_data.synthetic)), identity_of(loaded(own_data.witness))
    assert one == identity_of(loaded(own_data.synthetic))
    assert one.difference(other)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (own_data.one_set, "return a training and a test set"),
        (own_data.lone_inputs, "whose samples are"),
        (own_data.unnamed, "the number of classes is unknown"),
        (own_data.empty, "the test set is empty"),
    ],
)
def test_another_form_is_refused(function, told):
    with pytest.raises(UsageError, match=told):
        loaded(function)


def test_samples_of_different_shapes_are_refused():
    with pytest.raises(UsageError, match="give them the same shape"):
        loaded(own_data.ragged).batch(np.arange(3))


def is_running(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.time_limit(600)
def test_worker_processes_read_the_steps_in_order_without_mpi():
    data, sampler = loaded(own_data.witness), Sampler(40, 4, seed=1)
    reading = WorkerProcesses(data, lambda step: sampler.indices(*divmod(step, 10)), 2, seed=0)
    found = {step: reading.batch(step)[0] for step in (*range(12), 3, 4)}  # back, as after a checkpoint is restored
    for step, batch in found.items():
        assert batch[:, 0].tolist() == sampler.indices(*divmod(step, 10)).tolist()
    where = torch.cat(list(found.values()))
    processes = {int(process) for process in where[:, 1]}
    assert os.getpid() not in processes
    assert len(processes) == 4  # two at first, two after the return
    assert where[:, 2:].tolist() == [[0, 1]] * len(where)  # no MPI; after SIGTERM, the rank has time
    reading.close()
    end = time.monotonic() + 120
    while any(map(is_running, processes)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(is_running, processes))


def test_a_worker_ends_some_time_after_sigterm():
    end_later()
    assert 0 < signal.alarm(0) <= GRACE_SECONDS


def test_data_that_cannot_be_pickled_are_refused():
    reading = WorkerProcesses(loaded(own_data.local), lambda step: np.arange(4), 1, seed=0)
    with pytest.raises(UsageError, match="cannot be sent to worker processes"):
        reading.batch(0)
