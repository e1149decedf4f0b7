"""The examples run on ranks and learn."""

import re
import sys

import pytest
from support.launching import ROOT, launch

pytestmark = [pytest.mark.launches, pytest.mark.examples]


@pytest.mark.parametrize("script", ["with_accelerate.py"])
def test_an_example_trains_on_two_ranks(script):
    command = [sys.executable, str(ROOT / "examples" / script)]
    finished = launch(2, command, timeout_seconds=200.0, extra_env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.output
    (accuracy,) = re.findall(r"accuracy (.*)% on 2 ranks", finished.output)
    assert float(accuracy) > 90
