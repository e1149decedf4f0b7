"""Metrics: rows that are written are read, also by other processes, while the writer runs and after it was killed."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpitrain.errors import UsageError
from mpitrain.records.metrics import MetricsWriter, read_metrics

TABLES = {"progress": ["step", "loss"], "staleness": ["step", ("histogram", (33,))]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.h5"


def write(path: Path, steps: range, **options: float) -> None:
    with MetricsWriter(path, TABLES, **options) as metrics:
        for step in steps:
            metrics.append("progress", step=step, loss=1 / step)
            metrics.append("staleness", step=step, histogram=np.full(33, step))


def check(path: Path, steps: range) -> None:
    tables = read_metrics(path)
    expected = np.array(steps, dtype=np.float64)
    np.testing.assert_array_equal(tables["progress"]["step"], expected)
    np.testing.assert_array_equal(tables["progress"]["loss"], 1 / expected)
    np.testing.assert_array_equal(tables["staleness"]["histogram"], np.repeat(expected[:, None], 33, axis=1))


# ---- one process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 7, 8, 300])
@pytest.mark.parametrize("flush_seconds", [0, 3600])
def test_rows_that_are_written_are_read(path: Path, n: int, flush_seconds: float) -> None:
    write(path, range(1, n + 1), flush_seconds=flush_seconds)
    check(path, range(1, n + 1))
    assert [file.name for file in path.parent.iterdir()] == ["metrics.h5"]


def test_a_missing_field_is_nan(path: Path) -> None:
    with MetricsWriter(path, TABLES) as metrics:
        metrics.append("progress", step=1)
        metrics.append("staleness", step=1)
    tables = read_metrics(path)
    assert tables["progress"]["step"] == [1]
    assert np.isnan(tables["progress"]["loss"]).all()
    assert np.isnan(tables["staleness"]["histogram"]).all()


def test_columns_are_float64_with_one_row_per_append(path: Path) -> None:
    write(path, range(1, 6))
    tables = read_metrics(path)
    assert {column.dtype for table in tables.values() for column in table.values()} == {np.dtype(np.float64)}
    assert tables["staleness"]["histogram"].shape == (5, 33)
    assert tables["progress"]["loss"].shape == (5,)


def test_the_caller_may_reuse_an_appended_array(path: Path) -> None:
    histogram = np.zeros(33)
    with MetricsWriter(path, TABLES, flush_seconds=3600) as metrics:
        for step in range(3):
            histogram[0] = step
            metrics.append("staleness", step=step, histogram=histogram)
    np.testing.assert_array_equal(read_metrics(path)["staleness"]["histogram"][:, 0], [0, 1, 2])


def test_rows_are_buffered_until_the_next_flush(path: Path) -> None:
    with MetricsWriter(path, TABLES, flush_seconds=3600) as metrics:
        for step in (1, 2, 3):
            metrics.append("progress", step=step)
        assert len(read_metrics(path)["progress"]["step"]) == 1  # the first row is written at once
        metrics.flush()
        assert len(read_metrics(path)["progress"]["step"]) == 3


@pytest.mark.parametrize(
    ("table", "values", "says"),
    [
        ("progres", {}, "progress, staleness"),
        ("progress", {"lost": 1}, "step, loss"),
        ("progress", {"loss": [1, 2]}, "shape"),
        ("staleness", {"histogram": np.zeros(32)}, r"\(33,\)"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(path: Path, table: str, values: dict, says: str) -> None:
    with MetricsWriter(path, TABLES) as metrics, pytest.raises(ValueError, match=says):
        metrics.append(table, **values)
    assert len(read_metrics(path)["progress"]["step"]) == 0


def test_closing_twice_is_fine_and_appending_afterwards_is_not(path: Path) -> None:
    metrics = MetricsWriter(path, TABLES)
    metrics.close()
    metrics.close()
    with pytest.raises(ValueError, match="closed"):
        metrics.append("progress", step=1)


# ---- continuing a file -------------------------------------------------------------------------------------


def test_a_reopened_file_is_continued(path: Path) -> None:
    write(path, range(1, 4))
    write(path, range(4, 8))
    check(path, range(1, 8))


def test_rows_after_a_checkpoint_are_dropped_and_may_be_written_again(path: Path) -> None:
    write(path, range(1, 9))
    with MetricsWriter(path, TABLES) as metrics:
        for table in TABLES:
            metrics.truncate_after(table, "step", 5)
        check(path, range(1, 6))
    write(path, range(6, 11))
    check(path, range(1, 11))


def test_truncation_includes_buffered_rows_and_drops_nan(path: Path) -> None:
    with MetricsWriter(path, TABLES, flush_seconds=3600) as metrics:
        for step in (1, np.nan, 2, 3):
            metrics.append("progress", step=step)
        metrics.truncate_after("progress", "step", 2)
        metrics.append("progress", step=7)
        with pytest.raises(ValueError, match="no column"):
            metrics.truncate_after("progress", "epoch", 2)
    np.testing.assert_array_equal(read_metrics(path)["progress"]["step"], [1, 2, 7])


def test_a_new_field_is_nan_for_old_rows_and_an_old_field_stays(path: Path) -> None:
    write(path, range(1, 3))
    with MetricsWriter(path, {"progress": ["step", "samples"]}) as metrics:
        metrics.append("progress", step=3, samples=9)
    progress = read_metrics(path)["progress"]
    np.testing.assert_array_equal(progress["samples"], [np.nan, np.nan, 9])
    np.testing.assert_array_equal(progress["loss"], [1, 1 / 2, np.nan])


def test_a_field_does_not_change_its_shape(path: Path) -> None:
    write(path, range(1, 3))
    with pytest.raises(UsageError, match="move it away"):
        MetricsWriter(path, {"staleness": [("histogram", (65,))]})


def test_entries_of_another_number_of_workers_end_in_nan(path: Path) -> None:
    def append(n: int, step: int) -> None:
        fields = ["step", ("bytes", (n,)), ("histogram", (n, 3))]
        with MetricsWriter(path, {"workers": fields}, per_worker=["workers"]) as metrics:
            metrics.append("workers", step=step, bytes=np.full(n, step), histogram=np.full((n, 3), step))

    for n, step in ((2, 1), (4, 2), (1, 3)):
        append(n, step)
    workers = read_metrics(path)["workers"]
    nan = np.nan
    expected = np.array([[1, 1, nan, nan], [2, 2, 2, 2], [3, nan, nan, nan]])
    np.testing.assert_array_equal(workers["bytes"], expected)
    np.testing.assert_array_equal(workers["histogram"], np.repeat(expected[:, :, None], 3, axis=2))


# ---- other processes ---------------------------------------------------------------------------------------

WRITER = """
import itertools, sys
import numpy as np
from mpitrain.records.metrics import MetricsWriter
tables = {"progress": ["step", "loss"], "staleness": ["step", ("histogram", (33,))]}
metrics = MetricsWriter(sys.argv[1], tables, flush_seconds=0)
for step in itertools.count(int(sys.argv[2])):
    metrics.append("progress", step=step, loss=1 / step)
    metrics.append("staleness", step=step, histogram=np.full(33, step))
"""


def start_writer(path: Path, first: int, **environment: str) -> subprocess.Popen:
    """Start a process that appends rows as fast as it can until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(first)], env={**os.environ, **environment})
    deadline = time.monotonic() + 120
    while not path.exists() or len(read_metrics(path)["progress"]["step"]) < first + 20:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("locking", ["TRUE", "FALSE"])
def test_a_file_is_readable_while_it_is_written(path: Path, locking: str) -> None:
    process = start_writer(path, 1, HDF5_USE_FILE_LOCKING=locking)
    try:
        rows = []
        for _ in range(30):
            tables = read_metrics(path)
            rows.append(len(tables["progress"]["step"]))
            np.testing.assert_array_equal(tables["progress"]["step"], np.arange(1, rows[-1] + 1))
            np.testing.assert_array_equal(tables["progress"]["loss"], 1 / np.arange(1, rows[-1] + 1))
            histogram = tables["staleness"]["histogram"]
            assert (histogram == histogram[:, :1]).all()
        assert rows == sorted(rows)
        assert rows[-1] > rows[0]
    finally:
        kill(process)


NO_LOCKS = """
#include <errno.h>
#include <sys/file.h>
extern "C" int flock(int, int) { errno = ENOLCK; return -1; }
"""


def test_a_file_system_without_locks_is_enough(path: Path) -> None:
    """NFS without its lock daemon is one."""
    library = path.with_name("nolock.so")
    build = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(build, input=NO_LOCKS, text=True, check=True)
    kill(start_writer(path, 1, LD_PRELOAD=str(library)))
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert len(read_metrics(path)["progress"]["step"]) >= 20


def test_rows_that_cannot_be_written_are_dropped_with_one_warning(path: Path, capsys: pytest.CaptureFixture) -> None:
    """With the real HDF5; a limit of the process replaces a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsWriter(path, TABLES, flush_seconds=0) as metrics:

        def append(steps: range) -> None:
            for step in steps:
                metrics.append("progress", step=step, loss=1 / step)
                metrics.append("staleness", step=step, histogram=np.full(33, step))

        append(range(1, 300))
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
        try:
            append(range(300, 2000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        n = min(len(columns["step"]) for columns in read_metrics(path).values())
        assert 299 <= n < 1999
        append(range(2000, 2010))
    for table in read_metrics(path).values():
        assert set(table["step"]) >= {*range(1, 300), *range(2000, 2010)}
    assert capsys.readouterr().err.count("cannot be written (File too large)") == 1


FULL_DEVICE = """
import os, sys
from mpitrain.records import metrics
metrics.reserve = lambda descriptor, offset, n_bytes: None  # a file system on which nothing can be reserved
writer = metrics.MetricsWriter(sys.argv[1], {"progress": ["step", "loss"]}, flush_seconds=0)
for step in range(10):
    writer.append("progress", step=step, loss=1.0)
os.dup2(os.open("/dev/full", os.O_RDWR), writer._file.id.get_vfd_handle())
for step in range(10, 3000):
    writer.append("progress", step=step, loss=1.0)
print("trained on", flush=True)
if sys.argv[2] == "closed":
    writer.close()
"""


@pytest.mark.parametrize("ending", ["closed", "left open"])
def test_a_write_that_fails_in_hdf5_does_not_end_the_process(path: Path, ending: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DEVICE, path, ending], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "trained on\n"), done.stderr
    assert done.stderr.splitlines() == [
        f"mpitrain: warning: rows of {path} are lost because it cannot be written (No space left on device)"
    ]
    assert len(read_metrics(path)["progress"]["step"]) >= 9


def test_the_file_of_a_killed_writer_can_be_read_and_continued(path: Path) -> None:
    """A writer killed during a write, several times, loses no row that it has written."""
    rows = 0
    for _ in range(4):
        kill(start_writer(path, rows + 1))
        with pytest.raises(OSError, match="open for write"):  # the reason to continue by copying
            h5py.File(path, "r+")
        tables = read_metrics(path)
        n, rows = rows, min(len(tables[table]["step"]) for table in TABLES)
        assert rows >= n + 19
        with MetricsWriter(path, TABLES) as metrics:
            for table in TABLES:
                metrics.truncate_after(table, "step", rows)
        check(path, range(1, rows + 1))


def test_a_file_that_a_killed_writer_was_building_is_ignored(path: Path) -> None:
    path.with_name("metrics.h5.building").write_bytes(b"half a file")
    write(path, range(1, 3))
    check(path, range(1, 3))


# ---- other and damaged files --------------------------------------------------------------------------------


def damaged(content: bytes, damage: str) -> bytes:
    length = int.from_bytes(content[28:36], "little")  # as the file notes it; a killed writer may have reserved more
    return {
        "empty": b"",
        "text": b"step,loss\n",
        "beginning": content[:3000],
        "half": content[: length // 2],
        "zeros": content[:48] + bytes(2000) + content[2048:],
    }[damage]


@pytest.mark.parametrize("writer", ["closed", "killed"])
@pytest.mark.parametrize("damage", ["empty", "text", "beginning", "half", "zeros"])
def test_a_damaged_file_is_a_usage_error_and_not_tried_for_hours(path: Path, damage: str, writer: str) -> None:
    """By default HDF5 retries for hours on a file that a crashed machine or a full disk has truncated."""
    if writer == "closed":
        write(path, range(1, 2000))
    else:
        kill(start_writer(path, 1))
    path.write_bytes(damaged(path.read_bytes(), damage))
    begin = time.monotonic()
    with pytest.raises(UsageError, match="damaged"):
        read_metrics(path)
    with pytest.raises(UsageError, match="move it away"):
        MetricsWriter(path, TABLES)
    assert time.monotonic() - begin < 120


def test_a_missing_file_and_another_kind_of_file_are_usage_errors(path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_metrics(path)
    with h5py.File(path, "w") as file:
        file["not a table"] = 1
    with pytest.raises(UsageError, match="another kind of file"):
        read_metrics(path)
