"""The examples run on ranks and learn."""

import re
import sys

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
