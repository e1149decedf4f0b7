"""The examples run and learn."""

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile

import pytest
from support.launching import ROOT, launch

WITH_PACKAGES = ("with_accelerate.py", "with_fabric.py", "with_hf_trainer.py", "with_lightning.py")


def test_every_example_with_another_package_is_tried():
    assert set(WITH_PACKAGES) == {path.name for path in (ROOT / "examples").glob("with_*.py")}


@pytest.mark.launches
@pytest.mark.examples
@pytest.mark.parametrize("script", WITH_PACKAGES)
def test_an_example_trains_on_two_ranks(script):
    command = [sys.executable, str(ROOT / "examples" / script)]
    finished = launch(2, command, timeout_seconds=200.0, extra_env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.output
    (accuracy,) = re.findall(r"accuracy (.*)% on 2 ranks", finished.output)
    assert float(accuracy) > 90


@pytest.mark.launches
@pytest.mark.examples
def test_optuna_finds_settings(tmp_path):
    script = str(ROOT / "examples" / "sweep_optuna.py")
    command = [sys.executable, script, "--trials=2", "--ranks=2", "--epochs=2", f"--out={tmp_path}"]
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "best of 2 trials" in done.stdout
    results = [json.loads((tmp_path / f"trial-{k}" / "result.json").read_text())["test_loss"] for k in (0, 1)]
    assert f"test loss {min(results):.4f}" in done.stdout


@pytest.mark.ranks(4)
@pytest.mark.time_limit(300)
def test_ddp_runs_inside_groups_of_ranks(world, mpi_tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(mpi_tmp_path))
    runpy.run_path(str(ROOT / "examples" / "ddp_groups.py"), run_name="__main__")
    said = world.comm.bcast(capsys.readouterr().out)
    (accuracy,) = re.findall(r"test accuracy (.*)%, equal on all ranks: True", said)
    assert float(accuracy) > 90


def test_the_notebook_runs(monkeypatch, capsys):
    """Its claims: all-reduce waits for the slow worker, and a long period hides the latency."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {}
    for cell in json.loads((ROOT / "examples" / "simulator.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    names["plt"].close("all")
    assert names["easgd"]["seconds"][-1] < names["allreduce"]["seconds"][-1] / 3
    assert names["seconds"][16][-1] < names["seconds"][4][-1] < names["seconds"][1][-1]
    assert capsys.readouterr().out.count("simulated workers") == 14
