"""Metrics and checkpoints that reach outside themselves, declare what they do not hold, or are damaged."""

import shutil

import h5py
import numpy as np
import pytest
from support.lone_world import LoneWorld

from benchmarks.damage import damaged
from mpitrain import UsageError
from mpitrain.records import checkpoint, part
from mpitrain.records.checkpoint_writer import save
from mpitrain.records.metrics import MetricsWriter, read_metrics

N = 50


def external_storage(group, folder):
    (folder / "secret").write_bytes(np.arange(N, dtype=float).tobytes())
    group.create_dataset("x", (N,), float, external=[(str(folder / "secret"), 0, 8 * N)])


def external_link(group, folder):
    with h5py.File(folder / "other.h5", "w") as other:
        other["x"] = np.zeros(N)
    group["x"] = h5py.ExternalLink(str(folder / "other.h5"), "/x")


def soft_link(group, folder):
    group["x"] = h5py.SoftLink(f"{group.name}/y")


def virtual(group, folder):
    layout = h5py.VirtualLayout((N,), float)
    layout[:] = h5py.VirtualSource(str(folder / "missing.h5"), "x", (N,))
    group.create_virtual_dataset("x", layout)


def huge(group, folder):
    group.create_dataset("x", (10**12,), float, chunks=(100,))


CHANGES = [external_storage, external_link, soft_link, virtual, huge]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_metrics_that_are_not_in_the_file_are_refused(tmp_path, change):
    path = tmp_path / "metrics.h5"
    with h5py.File(path, "w", libver="v110") as file:
        group = file.create_group("progress")
        group["y"] = np.zeros(N)
        change(group, tmp_path)
    with pytest.raises(UsageError, match=r"cannot be read as metrics .*progress/x") as caught:
        read_metrics(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_state_that_is_not_in_the_part_is_refused(tmp_path, change):
    """Even with the right checksum."""
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    with h5py.File(tmp_path / "part.h5", "w") as file:
        file.attrs["kind"] = "array"
        file.attrs["dtype"] = "float64"
        change(file, tmp_path)
        file.move("x", "value")
    image = memoryview((tmp_path / "part.h5").read_bytes())
    part.write(folder / part.file_name(0), image, step=1, rank=0, n_ranks=1)
    with pytest.raises(UsageError, match=r"is no readable checkpoint .*value"):
        checkpoint.load(folder, LoneWorld())


def test_a_hundred_damaged_checkpoints_are_never_loaded(tmp_path):
    path = save(tmp_path, 1, {"x": np.arange(500.0), "y": ["text", 1, None]}, LoneWorld())
    whole = (path / part.file_name(0)).read_bytes()
    for seed in range(100):
        (path / part.file_name(0)).write_bytes(damaged(whole, seed))
        with pytest.raises(UsageError) as caught:
            checkpoint.load_newest(tmp_path, LoneWorld())
        assert "\n" not in str(caught.value)
    shutil.rmtree(path)


def test_a_hundred_damaged_metrics_are_read_or_refused_with_one_line(tmp_path, monkeypatch):
    """Values in the tables have no checksum; whatever can be read has the form of tables."""
    monkeypatch.setattr("mpitrain.records.metrics.PAUSE_SECONDS", 0.0)
    path = tmp_path / "metrics.h5"
    with MetricsWriter(path, {"progress": ["step", "loss"], "staleness": ["step", ("histogram", (33,))]}) as metrics:
        for step in range(300):
            metrics.append("progress", step=step, loss=1.0)
            metrics.append("staleness", step=step, histogram=np.ones(33))
    whole = path.read_bytes()
    n_refused = 0
    for seed in range(100):
        path.write_bytes(damaged(whole, seed))
        try:
            tables = read_metrics(path)
        except UsageError:  # of one line, as each is
            n_refused += 1
        else:
            for columns in tables.values():
                assert len({len(column) for column in columns.values()}) <= 1
    assert n_refused > 30
