"""Checkpoints: a loaded state equals the saved one, and a failed save leaves the previous checkpoint."""

import errno
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.lone_world import LoneWorld

from mpitrain import UsageError
from mpitrain.records import checkpoint, checkpoint_writer, part
from mpitrain.records.checkpoint_writer import save

ALONE = LoneWorld()
FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # many examples are synced, which takes time on a disk


def same(a, b):
    """Return whether two states are equal in type, dtype, shape and bits."""
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        if not a.numel():  # torch cannot view every empty tensor as bytes
            return True
        return a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


def round_trip(state):
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        return checkpoint.load(save(Path(folder), 1, state, ALONE), ALONE)


whole = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
array_types = st.sampled_from(["bool", *whole, "float16", "float32", "float64"]).map(np.dtype)
any_shape = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
arrays = hnp.arrays(array_types, any_shape)
bfloat16_arrays = hnp.arrays(np.uint16, any_shape).map(lambda a: a.view(ml_dtypes.bfloat16))
tensors = arrays.map(lambda a: torch.from_numpy(a.copy()))
bfloat16_tensors = hnp.arrays(np.uint16, any_shape).map(lambda a: torch.from_numpy(a.copy()).view(torch.bfloat16))
text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), text, arrays, bfloat16_arrays, tensors, bfloat16_tensors
)
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(text, st.integers(-(2**40), 2**40)), inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(max_examples=100)
@given(nested)
def test_a_loaded_state_equals_the_saved_one(state):
    assert same({"state": state}, round_trip({"state": state}))


@pytest.mark.parametrize("number", [np.float64(0.1), np.float64("nan"), 2**200, -(2**63), -0.0, math.inf, True])
def test_numbers_keep_their_value(number):
    loaded = round_trip({"x": number})["x"]
    assert loaded == number or math.isnan(loaded)
    assert math.copysign(1, loaded) == math.copysign(1, number)


def test_views_are_saved_by_their_elements():
    array, tensor = np.arange(12).reshape(3, 4), torch.arange(12).reshape(3, 4)
    loaded = round_trip(
        {"array": array[:, ::2].T, "tensor": tensor[:, ::2].t(), "parameter": torch.nn.Parameter(torch.ones(2))}
    )
    assert np.array_equal(loaded["array"], array[:, ::2].T)
    assert torch.equal(loaded["tensor"], tensor[:, ::2].t())
    assert loaded["parameter"].tolist() == [1, 1]


def test_the_state_of_an_optimizer_can_be_saved():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(round_trip(optimizer.state_dict()))
    optimizer.step()


def test_long_strings_can_be_saved():
    assert round_trip({"text": "x" * 200_000})["text"] == "x" * 200_000


def test_the_newest_two_are_kept(tmp_path):
    for step in (5, 99_999_999, 100_000_000, 20, 100_000_001):
        save(tmp_path, step, {"step": step}, ALONE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-100000000", "step-100000001"]
    assert checkpoint.load(checkpoint.latest(tmp_path), ALONE) == {"step": 100_000_001}


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "not there") is None


def test_saving_a_step_again_replaces_its_checkpoint(tmp_path):
    save(tmp_path, 3, {"x": 1}, ALONE)
    path = save(tmp_path, 3, {"x": 2}, ALONE)
    assert checkpoint.load(path, ALONE) == {"x": 2}


def write_part(folder, rank, n_ranks, state, step=4):
    part.write(folder / part.file_name(rank), part.encode(state), step=step, rank=rank, n_ranks=n_ranks)


def test_a_dead_rank_resumes_from_the_part_of_the_next_rank_alive(tmp_path):
    class WithOthers(LoneWorld):
        def Allgather(self, mine, found):
            super().Allgather(mine, found)
            for rank in (3, 4) if mine.size == 3 else ():
                write_part(tmp_path / ".step-00000004.partial", rank, 6, {"rank": rank})

    path = save(tmp_path, 4, {"rank": 0}, WithOthers(0, 6, dead={1, 2, 5}))
    assert [checkpoint.load(path, LoneWorld(rank, 6))["rank"] for rank in range(6)] == [0, 3, 3, 3, 4, 0]


def test_each_rank_has_its_own_part(tmp_path):
    path = tmp_path / "step-00000007"
    path.mkdir()
    for rank in range(3):
        write_part(path, rank, 3, {"rank": rank})
    assert checkpoint.latest(tmp_path) == path
    assert [checkpoint.load(path, LoneWorld(rank, 3))["rank"] for rank in range(3)] == [0, 1, 2]
    for size in (1, 2, 4):
        with pytest.raises(UsageError, match=f"written by 3 ranks, not {size}"):
            checkpoint.load(path, LoneWorld(0, size))


def test_another_number_of_ranks_gets_all_parts(tmp_path, caplog):
    for step in (4, 7):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        for rank in range(3):
            write_part(path, rank, 3, {"rank": rank, "step": step}, step)
    for size in (1, 2, 4):
        parts = checkpoint.load_newest(tmp_path, LoneWorld(0, size))
        assert list(parts) == [{"rank": rank, "step": 7} for rank in range(3)]
    os.truncate(path / part.file_name(2), 1500)  # then the previous checkpoint is the newest that can be read
    for parts in (checkpoint.load_newest(tmp_path, LoneWorld(0, 2)), checkpoint.newest_parts(tmp_path)):
        assert [found["step"] for found in parts] == [4, 4, 4]


def test_the_part_of_another_rank_is_refused(tmp_path):
    path = tmp_path / "step-00000007"
    path.mkdir()
    for rank in range(2):
        write_part(path, rank, 2, {"rank": rank})
    shutil.copy(path / part.file_name(1), path / part.file_name(0))
    with pytest.raises(UsageError, match="it is the part of rank 1"):
        checkpoint.load(path, LoneWorld(0, 2))


@given(st.data())
def test_a_truncated_file_is_named(data):
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        path = save(Path(folder), 1, {"x": np.arange(1000), "y": ["text", 1, None]}, ALONE)
        file = path / "rank-00000.h5"
        length = data.draw(st.integers(0, file.stat().st_size - 1))
        os.truncate(file, length)
        with pytest.raises(UsageError) as error:
            checkpoint.load(path, ALONE)
        assert str(file) in str(error.value)
        assert f"delete {path}" in str(error.value)
        assert "\n" not in str(error.value)


def zeroed(content):
    """Return the content with a page of zeros, as a disk may leave it."""
    return content[:4096] + bytes(4096) + content[8192:]


def one_bit_changed(content):
    """Return the content with one bit of a number changed, which HDF5 does not notice."""
    at = content.index(np.arange(1000).tobytes()) + 4000
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [zeroed, one_bit_changed])
@pytest.mark.parametrize("block_bytes", [1000, 2**22])  # the file has many blocks, or is a part of one
def test_a_file_with_a_wrong_checksum_is_refused(tmp_path, monkeypatch, damage, block_bytes):
    monkeypatch.setattr(part, "_BLOCK_BYTES", block_bytes)
    path = save(tmp_path, 1, {"x": np.arange(1000), "y": np.zeros(5000)}, ALONE)
    file = path / "rank-00000.h5"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UsageError, match=r"rank-00000.h5 is no readable checkpoint \(.*checksum is wrong\)"):
        checkpoint.load(path, ALONE)


def test_a_part_whose_checksum_was_removed_is_refused(tmp_path):
    path = save(tmp_path, 1, {"x": 1}, ALONE)
    file = path / "rank-00000.h5"
    os.truncate(file, part.read_seal(file).n_bytes)  # a complete HDF5 file
    with pytest.raises(UsageError, match="no checksum at its end"):
        checkpoint.load(path, ALONE)


@pytest.mark.parametrize("at", range(-part._SEAL.size, 0, 3))
def test_a_changed_bit_of_the_seal_is_noticed(tmp_path, at):
    path = save(tmp_path, 1, {"x": 1}, ALONE)
    file = path / "rank-00000.h5"
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)
    with pytest.raises(UsageError):
        checkpoint.load(path, ALONE)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, OSError, KeyError])
def test_any_error_of_hdf5_becomes_a_usage_error(tmp_path, monkeypatch, error):
    def fail(group):
        raise error("Can't decrement id ref count")

    path = save(tmp_path, 1, {"x": 1}, ALONE)
    monkeypatch.setattr(part.hdf5_tree, "read_tree", fail)
    with pytest.raises(UsageError, match="is no readable checkpoint"):
        checkpoint.load(path, ALONE)


@pytest.mark.parametrize("bad", [object(), {"x": {1, 2}}, np.array([object()])])
def test_a_state_that_cannot_be_saved_leaves_the_previous_checkpoint(tmp_path, bad):
    save(tmp_path, 1, {"x": 1}, ALONE)
    with pytest.raises(TypeError):
        save(tmp_path, 2, {"good": np.zeros(10), "bad": bad}, ALONE)
    assert checkpoint.load(checkpoint.latest(tmp_path), ALONE) == {"x": 1}
    save(tmp_path, 2, {"x": 2}, ALONE)
    assert checkpoint.load(checkpoint.latest(tmp_path), ALONE) == {"x": 2}


def test_unfinished_checkpoints_are_removed(tmp_path):
    """By a save, before it needs the room, and when a run resumes."""

    def leave():
        (tmp_path / ".step-00000007.partial").mkdir()
        (tmp_path / ".step-00000007.partial" / "rank-00000.h5").write_bytes(b"half of a file")

    for act in (
        lambda: save(tmp_path, 9, {"x": 1}, ALONE),
        lambda: checkpoint.load_newest(tmp_path, ALONE),
    ):
        leave()
        act()
        assert not list(tmp_path.glob(".step*"))


def test_a_file_that_cannot_be_written_leaves_the_previous_checkpoints(tmp_path):
    """With the real HDF5, which raises several types of errors; a limit of the process replaces a full disk."""
    save(tmp_path, 1, {"x": 1}, ALONE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(UsageError) as error:
            save(tmp_path, 2, {"x": np.zeros(2**18), "y": [np.ones(2**17), "text"]}, ALONE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    says = f"cannot write a checkpoint (3 MiB) in {tmp_path} (File too large): the newest is step-00000001; 3 of them"
    assert str(error.value).startswith(says)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    save(tmp_path, 2, {"x": 2}, ALONE)
    assert checkpoint.load_newest(tmp_path, ALONE) == {"x": 2}


WRITER = """
import os, sys, time
from pathlib import Path
import numpy as np
from mpitrain.records.checkpoint_writer import save
from support.lone_world import LoneWorld

def wait_to_be_killed(moment):
    if moment == sys.argv[2]:
        print("now", flush=True)
        time.sleep(600)

fsync = os.fsync
def watched(descriptor):
    fsync(descriptor)
    wait_to_be_killed("in the folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "in the file")

os.fsync = watched
wait_to_be_killed("before the file")
save(Path(sys.argv[1]), 2, {"x": np.zeros(100_000), "y": 2}, LoneWorld())
"""


@pytest.mark.parametrize("moment", ["before the file", "in the file", "in the folder"])
def test_a_killed_writer_leaves_the_previous_checkpoint(tmp_path, moment):
    save(tmp_path, 1, {"x": 1}, ALONE)
    reader, writer = os.pipe()
    pid = os.fork()  # a new process would import torch
    if not pid:
        try:
            sys.argv, sys.stdout = ["", str(tmp_path), moment], os.fdopen(writer, "w")
            exec(WRITER, {})
        finally:
            os._exit(1)
    os.close(writer)
    try:
        with os.fdopen(reader) as said:
            assert said.readline() == "now\n"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert checkpoint.latest(tmp_path).name == "step-00000001"
    assert checkpoint.load(checkpoint.latest(tmp_path), ALONE) == {"x": 1}
    save(tmp_path, 2, {"x": 2}, ALONE)  # in place of the unfinished one
    assert checkpoint.load(checkpoint.latest(tmp_path), ALONE) == {"x": 2}


@pytest.mark.ranks(2, 3)
def test_each_rank_loads_what_it_saved(world, mpi_tmp_path):
    for step in (1, 2, 3):
        path = save(mpi_tmp_path, step, {"rank": world.rank, "x": np.full(5, step)}, world)
    assert checkpoint.latest(mpi_tmp_path) == path
    assert len(list(mpi_tmp_path.iterdir())) == 2
    state = checkpoint.load(path, world)
    assert state["rank"] == world.rank
    assert state["x"].tolist() == [3] * 5
    world.barrier()


@pytest.fixture
def view(world, mpi_tmp_path):
    """Copy the checkpoints of steps 1 and 2 for each rank, as if ranks saw one folder differently. Collective."""
    for step in (1, 2):
        save(mpi_tmp_path / "all", step, {"rank": world.rank, "step": step}, world)
    mine = Path(mpi_tmp_path / f"rank-{world.rank}" / "checkpoints")
    shutil.copytree(mpi_tmp_path / "all", mine)
    world.barrier()
    return mine


@pytest.mark.ranks(2, 3)
def test_ranks_load_the_newest_checkpoint(world, view):
    assert checkpoint.load_newest(view, world) == {"rank": world.rank, "step": 2}


@pytest.mark.ranks(2, 3)
def test_ranks_never_load_different_checkpoints(world, view):
    if world.rank == world.size - 1:  # another one under this name
        shutil.rmtree(view / "step-00000002")
        (view / "step-00000001").rename(view / "step-00000002")
    with pytest.raises(UsageError, match="is not the same for all ranks, but of steps 1, 2") as error:
        checkpoint.load_newest(view, world)
    assert len(set(world.comm.allgather(str(error.value).partition(" is not ")[2]))) == 1


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("last", ["does not see it", "has half of it", "has no checksum"])
def test_all_ranks_load_the_previous_checkpoint_if_one_cannot_read_its_part(world, view, last, capfd):
    newest = view / "step-00000002"
    if world.rank == world.size - 1:
        if last == "does not see it":
            shutil.rmtree(newest)
        elif last == "has half of it":
            os.truncate(newest / f"rank-{world.rank:05d}.h5", 1500)
        else:
            os.truncate(newest / part.file_name(world.rank), (newest / part.file_name(world.rank)).stat().st_size - 44)
    n_found = 1 if world.size == 1 and last == "does not see it" else 2
    assert checkpoint.load_newest(view, world) == {"rank": world.rank, "step": 1}
    warnings = [line for line in capfd.readouterr().err.splitlines() if "is no readable checkpoint" in line]
    assert len(warnings) == (world.rank == 0 and n_found == 2)
    if world.rank == world.size - 1:
        os.truncate(view / "step-00000001" / f"rank-{world.rank:05d}.h5", 0)
    with pytest.raises(UsageError, match=r"is no readable checkpoint.*: there is no other"):
        checkpoint.load_newest(view, world)
    world.barrier()


@pytest.mark.ranks(2)
def test_a_missing_checkpoint_is_reported_on_all_ranks(world, mpi_tmp_path):
    with pytest.raises(UsageError, match="has no complete checkpoint"):
        checkpoint.load_newest(mpi_tmp_path / "checkpoints", world)
    world.barrier()


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("moment", ["in a part", "at the renaming", "for a snapshot"])
def test_a_full_disk_is_reported_on_all_ranks_and_leaves_the_checkpoints(world, mpi_tmp_path, monkeypatch, moment):
    def fail(*arguments, **named):
        if moment != "in a part" or world.rank == world.size - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments, **named)

    write = part.write
    place = {
        "in a part": (part, "write"),
        "at the renaming": (checkpoint_writer, "_publish"),
        "for a snapshot": (checkpoint_writer.CheckpointWriter, "_make_partial"),
    }
    folder = Path(mpi_tmp_path)
    save(folder, 1, {"rank": world.rank}, world)
    with monkeypatch.context() as patch:
        patch.setattr(*place[moment], fail)
        with pytest.raises(UsageError, match=r"no room for a checkpoint \(\d+ MiB\).*: the newest is step-00000001"):
            save(folder, 2, {"rank": world.rank, "x": np.zeros(2**17)}, world)
    world.barrier()
    left = [path.name for path in folder.iterdir()]
    assert world.comm.allgather(left) == [["step-00000001"]] * world.size
    save(folder, 3, {"rank": world.rank}, world)
    assert checkpoint.load_newest(folder, world) == {"rank": world.rank}
    world.barrier()


@pytest.mark.ranks(2, 3)
def test_a_snapshot_is_written_while_the_state_changes(world, mpi_tmp_path, monkeypatch):
    """The disk is slower than the training: the call returns at once, and the file has the values of its moment."""
    may_write, write = threading.Event(), part.write

    def wait_to_write(*arguments, **named):
        assert may_write.wait(60)
        write(*arguments, **named)

    monkeypatch.setattr(part, "write", wait_to_write)
    folder, state = Path(mpi_tmp_path), {"rank": world.rank, "x": np.zeros(1000), "t": torch.zeros(1000)}
    writer = checkpoint_writer.CheckpointWriter(folder, world, 2)
    writer.start(1, state)
    state["x"] += 1
    state["t"] += 1
    writer.check()
    assert checkpoint.latest(folder) is None
    world.barrier()
    may_write.set()
    path = writer.wait()
    assert writer.wait() is None
    loaded = checkpoint.load(path, world)
    assert loaded["rank"] == world.rank
    assert not loaded["x"].any()
    assert not loaded["t"].any()
    world.barrier()


@pytest.mark.ranks(2, 3)
def test_a_rank_that_cannot_write_notices_at_its_next_step(world, mpi_tmp_path, monkeypatch):
    def fail(*arguments, **named):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    folder, last = Path(mpi_tmp_path), world.rank == world.size - 1
    if last:
        monkeypatch.setattr(part, "write", fail)
    writer = checkpoint_writer.CheckpointWriter(folder, world, 2)
    writer.start(1, {"rank": world.rank})
    if last:
        assert writer._has_written.wait(60)
        with pytest.raises(UsageError, match=r"cannot write a checkpoint .* \(Input/output error\)"):
            writer.check()
    else:
        writer.check()
    with pytest.raises(UsageError, match=r"cannot write a checkpoint .* \(Input/output error\)"):
        writer.wait()
    world.barrier()
    assert not list(folder.iterdir())
    world.barrier()


def test_a_failure_of_another_rank_is_not_reported_as_that_of_this_rank(tmp_path):
    """The other rank gives the checkpoint up and names the error; this rank learns of it when all wait."""
    writer = checkpoint_writer.CheckpointWriter(tmp_path, LoneWorld(0, 2), 2)
    writer.start(1, {"x": 1})
    checkpoint_writer._abandon(writer._partial)
    writer._thread.join(60)
    writer.check()
    with pytest.raises(UsageError, match="cannot write a checkpoint"):
        writer.wait()


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_are_kept_as_asked_for(tmp_path, keep):
    for step in range(1, 6):
        save(tmp_path, step, {"step": step}, ALONE, keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{k:08d}" for k in range(6 - keep, 6)]


def test_an_error_of_the_run_ends_the_writer_without_a_checkpoint(tmp_path):
    """The part of another rank never comes."""
    writer = checkpoint_writer.CheckpointWriter(tmp_path, LoneWorld(0, 2), 2)
    writer.start(1, {"x": 1})
    writer.close()
    assert not list(tmp_path.iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


@pytest.mark.parametrize(("most_bytes", "read"), [(6, [0, 1, 2]), (5, [0, 1, 2, 0, 2])])
def test_parts_are_read_once_if_memory_can_hold_all(tmp_path, monkeypatch, most_bytes, read):
    for rank in range(3):
        (tmp_path / f"rank-{rank:05d}.h5").write_bytes(b"ab")
    seen = []
    monkeypatch.setattr(checkpoint, "_load_part", lambda path, rank: seen.append(rank) or (0, {"rank": rank}))
    monkeypatch.setattr(checkpoint, "MOST_LOADED_BYTES", most_bytes)
    parts = checkpoint.Parts(tmp_path, 3)
    assert [part["rank"] for part in parts] == [0, 1, 2]
    assert (parts[0]["rank"], parts[0]["rank"], parts[2]["rank"]) == (0, 0, 2)
    assert seen == read
