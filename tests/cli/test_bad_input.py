"""Mistakes of the user end all ranks soon, with one line and exit code 2, and change nothing on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.launching import Finished, installed, launch
from support.warm import Warm

from mpitrain.data import hdf5_format

pytestmark = pytest.mark.launches

IN_TIME_SECONDS = 250.0  # a hang would last for ever
TESTS = Path(__file__).resolve().parents[1]
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    """A process that runs the command without a launcher."""
    with Warm(NO_GPU) as warm:
        yield warm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """A folder with data files that are broken in different ways, and a run."""
    folder = tmp_path_factory.mktemp("bad")
    for name, label in (("good.h5", 1), ("label.h5", 2)):
        with h5py.File(folder / name, "w") as file:
            hdf5_format.create(file, classes=["cat", "dog"], shape=(3, 28, 28), n=(200, 50))
            for split in ("train", "test"):
                file[split]["images"][...] = 0  # a file that stores less than it declares is refused for that
                file[split]["labels"][...] = 0
            file["train"]["labels"][7] = label
            file.attrs["mean"], file.attrs["std"] = np.full(3, 0.5), np.full(3, 0.2)
    content = (folder / "good.h5").read_bytes()
    (folder / "truncated.h5").write_bytes(content[: len(content) // 2])
    (folder / "text.h5").write_text("these are words\n" * 100)
    (folder / "file").touch()
    (folder / "wrong.toml").write_text("lrr = 1")
    (folder / "elsewhere").mkdir()
    run = ["--data", "synthetic:n=100", "--steps", "4", "--set", "period=3", "--out", "run"]
    done = warm.run("train", "--quiet", *run, cwd=folder)
    assert done.returncode == 0, done.output
    return folder


def mpitrain(n_ranks: int, folder: Path, *arguments: str, mpi: str = "openmpi") -> Finished:
    extra = {"PYTHONPATH": str(TESTS), **NO_GPU}
    command = ["mpitrain", "train", "--quiet", *arguments]
    return launch(n_ranks, command, mpi=mpi, timeout_seconds=IN_TIME_SECONDS, extra_env=extra, cwd=folder)


def check_refused(done: Finished, words: str) -> None:
    assert not done.timed_out, done.output
    assert done.output.count("mpitrain: error") == 1, done.output
    line = next(line for line in done.output.splitlines() if "mpitrain: error" in line)
    assert words in line
    assert "Traceback" not in done.output
    assert done.returncode == 2, done.output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What is wrong whatever the data and the number of ranks: refused before torch is imported or MPI started.
ARGUMENTS = {
    "unknown algorithm": (["--algorithm", "nope"], "unknown algorithm 'nope': see mpitrain algorithms"),
    "unknown setting": (["--set", "foo=1"], "easgd has no setting 'foo': it must be one of moving_rate"),
    "setting out of range": (["--set", "period=0"], "period must be a whole number >= 1, not 0"),
    "setting that is no number": (["--set", "moving_rate=nan"], "moving_rate must be a number"),
    "settings that exclude each other": (["--set", "moving_rate=.1", "--set", "rho=2"], "moving_rate or rho, not both"),
    "setting without a value": (["--set", "period"], "--set takes KEY=VALUE"),
    "negative learning rate": (["--lr", "-1"], "--lr must be 0 or more, not -1"),
    "no epochs": (["--epochs", "0"], "--epochs must be more than 0, not 0"),
    "two budgets": (["--epochs", "1", "--steps", "2"], "--steps: not allowed with argument --epochs"),
    "a GPU by number": (["--device", "cuda:7"], "unknown value 'cuda:7': did you mean cuda?"),
    "unknown optimizer": (["--optimizer", "adamx"], "unknown optimizer 'adamx': did you mean adam"),
    "an optimizer of a method that needs none": (["--algorithm", "parle", "--optimizer", "lion"], "remove --optimizer"),
    "unknown schedule": (["--schedule", "cosin"], "unknown schedule 'cosin': did you mean cosine?"),
    "target without a value": (["--target", "accuracy"], "--target takes METRIC=VALUE"),
    "configuration with an unknown key": (["--config", "wrong.toml"], "has the key 'lrr', which is no option: did you"),
    "straggler without factor": (["--straggler", "1"], "must be RANK:FACTOR"),
}
LOADED = {
    "no GPU": (["--device", "cuda"], "no GPU can be used"),
    "no run": (["--resume", "elsewhere"], "elsewhere is not the folder of a run"),
    "other settings than the run's": (["--resume", "run", "--lr", "0.3"], "--lr is 0.05 in the run that is resumed"),
    "a folder that holds a run": (["--out", "run"], "already holds a run: continue it with --resume run"),
    "a folder that cannot be made": (["--out", "file/run"], "--out file/run cannot be used (Not a directory)"),
    "configuration that is not there": (["--config", "nope.toml"], "--config nope.toml cannot be read"),
    "optimizer that is not there": (
        ["--optimizer", "nothing:Own", "--out", "new"],
        "nothing:Own cannot be imported",
    ),
    "schedule that is not there": (
        ["--schedule", "nothing:f", "--out", "new"],
        "nothing:f cannot be imported",
    ),
    "loss for other data": (["--loss", "mse"], "synthetic has classes: use --loss cross_entropy, not mse"),
    "warm-up as long as the run": (
        ["--warmup", "9", "--steps", "9", "--out", "new"],
        "leaves nothing of a run of 9 steps",
    ),
    "batch size of no rank": (["--batch-size-of", "1=4"], "names rank 1: there are ranks 0 to 0"),
    "unknown data": (["--data", "nope"], "unknown data 'nope': it must be one of digits, python-text, synthetic"),
    "no such file": (["--data", "nope.h5"], "no data file nope.h5"),
    "truncated file": (["--data", "truncated.h5"], "truncated.h5 is truncated"),
    "another kind of file": (["--data", "text.h5"], "text.h5 is not an HDF5 file"),
    "label without a class": (["--data", "label.h5"], "train/labels[7] is 2, but there are 2 classes"),
    "batch larger than the data": (["--batch-size", "101"], "use --batch-size 100 or less"),
    "parameters that are no floats": (["--model", "support.small_models:whole_numbers"], "no trainable parameter"),
    "model that is none": (["--model", "support.small_models:no_module"], "returned a int, not a torch.nn.Module"),
    "module that is not there": (["--model", "nothing:model"], "cannot be imported (ModuleNotFoundError"),
    "straggler that is not there": (["--straggler", "9:2"], "names rank 9: there are ranks 0 to 0"),
    "no model to begin with": (["--init-from", "text.h5"], "--init-from text.h5 cannot be read as a model"),
    "no file to begin with": (["--init-from", "nowhere.pt"], "--init-from nowhere.pt cannot be read as a model"),
    "a folder that is no run to begin with": (["--init-from", "."], "has no complete checkpoint"),
}
# On several ranks: refused by all of them before or after MPI starts, and by rank 0 alone.
ON_RANKS = {
    "unknown setting": ARGUMENTS["unknown setting"],
    "no model to begin with": (["--init-from", "text.h5"], "text.h5 cannot be read as a model"),
    "a folder that cannot be made": LOADED["a folder that cannot be made"],
}


def with_data(arguments: list[str]) -> list[str]:
    if "--data" in arguments or "--resume" in arguments:
        return arguments
    return [*arguments, "--data", "synthetic:n=100,shape=64" if "--model" in arguments else "synthetic:n=100"]


@pytest.mark.parametrize(("arguments", "words"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_arguments_are_one_line(folder: Path, warm: Warm, arguments: list[str], words: str) -> None:
    done = warm.run("train", "--quiet", *arguments, cwd=folder)
    check_refused(done, words)
    assert done.output.count("\n") == 1


@pytest.mark.parametrize(("arguments", "words"), LOADED.values(), ids=LOADED)
def test_an_error_while_loading_is_one_line_and_changes_nothing_on_disk(
    folder: Path, warm: Warm, arguments: list[str], words: str
) -> None:
    before = contents(folder)
    done = warm.run("train", "--quiet", *with_data(arguments), cwd=folder)
    check_refused(done, words)
    assert done.output.count("\n") == 1
    assert contents(folder) == before


@pytest.mark.parametrize(("arguments", "words"), ON_RANKS.values(), ids=ON_RANKS)
def test_several_ranks_say_it_once(folder: Path, arguments: list[str], words: str) -> None:
    before = contents(folder)
    check_refused(mpitrain(2, folder, *with_data(arguments)), words)
    assert contents(folder) == before


@pytest.mark.skipif("mpich" not in installed(), reason="no environment of MPICH")
def test_it_is_the_same_under_the_other_mpi(folder: Path) -> None:
    arguments, words = LOADED["truncated file"]
    check_refused(mpitrain(2, folder, *arguments, mpi="mpich"), words)


def test_it_is_the_same_in_a_process_of_its_own(folder: Path) -> None:
    arguments, words = LOADED["no run"]
    done = mpitrain(0, folder, *arguments)
    check_refused(done, words)
    assert done.output.count("\n") == 1


# Rank 1 is in a folder where neither the data nor the model is.
@pytest.mark.parametrize(
    ("mpi", "arguments", "words"),
    [
        (installed()[0], ["--data", "good.h5"], "no data file good.h5"),
        (
            installed()[-1],
            ["--data", "synthetic:n=100,shape=64", "--model", "here:watched"],
            "cannot be imported (ModuleNotFoundError",
        ),
    ],
    ids=["data", "model"],
)
def test_an_error_on_one_rank_ends_all(folder: Path, mpi: str, arguments: list[str], words: str) -> None:
    (folder / "here.py").write_text("from support.small_models import watched\n")
    script = '[ "${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-}}" = 1 ] && cd elsewhere; exec mpitrain train --quiet "$@"'
    extra = {"PYTHONPATH": str(TESTS)}
    command = ["bash", "-c", script, "bash", *arguments]
    check_refused(launch(2, command, mpi=mpi, timeout_seconds=IN_TIME_SECONDS, extra_env=extra, cwd=folder), words)
