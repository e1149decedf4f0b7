"""How a run starts: without an import of torch's compiler, and without collections of garbage meanwhile."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.launches

TRAIN = """
import gc, sys
from mpitrain.cli import main as cli
frozen = []
for more in ([], ["--algorithm", "allreduce"], ["--algorithm", "eamsgd", "--average", "polyak"]):
    assert cli.main(["train", "--data", "synthetic", "--steps", "2", "--quiet", *more]) == 0
    print("compiler:", "torch._dynamo" in sys.modules, "garbage:", gc.isenabled())
    frozen.append(gc.get_freeze_count())
assert frozen[0] > 100_000  # torch's modules
assert frozen[2] <= frozen[0]  # the garbage of a run is no part of it
"""

COMPILES = """
import sys
import torch, torch._dynamo
from mpitrain.trainer.compiler import MARK, do_without_compiler
do_without_compiler()
assert not hasattr(torch.optim.Optimizer.zero_grad.__wrapped__, MARK)
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer.zero_grad()
assert hasattr(torch.optim.Optimizer.zero_grad.__wrapped__, MARK)
print(True)
"""

STILL_WORKS = """
import torch
from mpitrain.trainer.compiler import do_without_compiler
do_without_compiler()
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(2):
    optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
state = optimizer.state_dict()
optimizer.load_state_dict(state)
import torch._dynamo  # comes late
optimizer.zero_grad()
print(len(state["state"]) == 2)
"""


def said(program):
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_run_of_plain_sgd_does_not_import_the_compiler():
    assert said(TRAIN) == "compiler: False garbage: True"


def test_an_imported_compiler_marks_the_methods_itself():
    assert said(COMPILES) == "True"


def test_optimizers_work_with_the_marks_and_with_a_compiler_that_comes_late():
    assert said(STILL_WORKS) == "True"
