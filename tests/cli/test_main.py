"""The commands as a user types them: their output on each stream, and how soon it comes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.launching import Finished, launch

from mpitrain.algorithms import METHODS
from mpitrain.cli.main import main
from mpitrain.trainer.options import parse_settings, straggler

IN_TIME_SECONDS = 250.0


def split(n_ranks: int, folder: Path, *arguments: str) -> tuple[Finished, str, str]:
    """Run a command; return its output on stdout and on stderr."""
    script = 'exec "$@" > stdout 2> stderr'
    root = Path(__file__).resolve().parents[2]
    launcher = [str(root / "jobs" / "local.sh"), str(n_ranks)] if n_ranks else []
    command = ["bash", "-c", script, "bash", *launcher, "mpitrain", *arguments]
    done = launch(0, command, timeout_seconds=IN_TIME_SECONDS, cwd=folder)
    stdout, stderr = (folder / "stdout").read_text(), (folder / "stderr").read_text()
    assert done.returncode == 0, stderr
    return done, stdout, stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run on 2 ranks, and its output on stdout and on stderr."""
    folder = tmp_path_factory.mktemp("trained")
    _, stdout, stderr = split(2, folder, "train", "--steps", "50", "--set", "period=5", "--out", "run", "--json")
    return folder, stdout, stderr


@pytest.mark.launches
def test_only_rank_0_prints_and_the_last_line_is_the_result(trained: tuple[Path, str, str]) -> None:
    folder, stdout, stderr = trained
    sentence, report, document = stdout.splitlines()
    assert sentence.startswith("easgd on 2 ranks: test accuracy ")
    assert report == "report and plots: run/report.md"
    result = json.loads(document)
    assert result == json.loads((folder / "run" / "result.json").read_text())
    assert result["settings"]["period"] == 5
    assert result["steps_of_ranks"] == [50, 50]
    opening, *lines = stderr.splitlines()  # a log: no bar, and nothing of the launcher's
    assert "parameters" in opening
    assert lines
    assert all(line.startswith("epoch ") for line in lines)
    assert f"test loss {result['test_loss']:.4f}" in lines[-1]


@pytest.mark.launches
def test_a_run_leaves_its_plots_and_can_be_reported_again(trained: tuple[Path, str, str]) -> None:
    folder, _, _ = trained
    assert (folder / "run" / "curves.png").stat().st_size > 1000
    _, stdout, _ = split(0, folder, "report", "run", "--json")
    assert json.loads(stdout.splitlines()[-1])["runs"][0]["algorithm"] == "easgd"


@pytest.mark.launches
def test_info_of_several_ranks_is_one_document_and_tries_the_mpi_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPITRAIN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # with host memory only: every crash with a GPU's costs a start
    _, stdout, stderr = split(0, tmp_path, "info", "--json")
    assert json.loads(stdout)["probes"] == []  # a probe can take minutes, and nobody asked for one
    assert stderr == ""
    _, stdout, stderr = split(2, tmp_path, "info", "--probe", "--json")
    document = json.loads(stdout)
    assert document["world"]["ranks"] == 2
    assert [one["rank"] for one in document["ranks"]] == [0, 1]
    assert stderr.startswith("mpitrain: probing MPI operations")
    assert stderr.count("\n") == 1
    [probe] = document["probes"]
    assert {row["host"]["verdict"] for row in probe["outcomes"].values()} == {"ok"}
    _, stdout, stderr = split(2, tmp_path, "info")
    assert stdout.count(f"measured {probe['measured']}") == 1
    assert stderr == ""


@pytest.mark.launches
def test_one_rank_without_a_launcher_prints_nothing_else(tmp_path: Path) -> None:
    _, stdout, stderr = split(0, tmp_path, "train", "--data", "synthetic:n=100", "--steps", "30", "--quiet", "--json")
    assert json.loads(stdout.splitlines()[-1])["ranks"] == 1
    assert stderr == ""


def test_algorithms_are_listed_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["algorithms"]) == 0
    text = capsys.readouterr().out
    assert main(["algorithms", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.keys() == METHODS.keys()
    for name, method in document.items():
        for words in (f"{name}  ({method['class']})", method["summary"], method["source"]):
            assert words in map(str.strip, text.splitlines())
        assert method["settings"].keys() == METHODS[name]().settings().keys()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "import", "images", "--help"]])
def test_help_is_given_at_every_level(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(("usage: mpitrain", "usage: [mpirun -n P] mpitrain"))


@pytest.mark.parametrize("arguments", [[], ["nope"], ["report"], ["data"], ["train", "--nope"], ["train", "extra"]])
def test_a_wrong_command_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mpitrain: error: ")
    assert err.count("\n") == 1
    assert "--help)" in err


def test_settings_are_pairs() -> None:
    assert parse_settings(["a=1", "b = x=y"]) == {"a": "1", "b": "x=y"}
    assert straggler("2:4.5") == (2, 4.5)


HELP = """
from mpitrain.cli.main import main
try:
    main([{}'--help'])
except SystemExit:
    print()
"""
LOADED_BY = {
    "mpitrain": "import mpitrain",
    "the command": "import mpitrain.cli.main; mpitrain.cli.main._parsers()",
    "the methods": "import mpitrain.algorithms",
    "mpitrain algorithms": "from mpitrain.cli.main import main; main(['algorithms', '--json']); print()",
    "the plan of a run": "from mpitrain.trainer.plan import *; RunPlan.of(TrainConfig())",
    "mpitrain --help": HELP.format(""),
    "mpitrain train --help": HELP.format("'train', "),
    "mpitrain simulate --help": HELP.format("'simulate', "),
}
HEAVY = ("cupy", "h5py", "matplotlib", "mpi4py", "numba", "torch")


@pytest.mark.parametrize("statement", LOADED_BY.values(), ids=LOADED_BY)
def test_commands_do_not_import_heavy_libraries_before_they_need_them(statement: str) -> None:
    probe = f"import sys\n{statement}\nprint(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_importing_the_package_imports_little_else() -> None:
    probe = "import sys; before = {*sys.modules}; import mpitrain; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=200, check=True)
    loaded = done.stdout.split()
    assert "mpitrain" in loaded
    assert "numpy" not in loaded
    assert len(loaded) < 50


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    command = ["bash", "-c", "set -o pipefail; mpitrain algorithms | head -n 1"]
    done = launch(0, command, timeout_seconds=IN_TIME_SECONDS, cwd=tmp_path)
    assert done.output == "allreduce  (AllReduceSGD)\n"


def test_an_output_on_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mpitrain", "algorithms"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr == "mpitrain: error: cannot write the output (No space left on device): free some room\n"
