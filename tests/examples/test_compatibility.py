"""The scripts of docs/compatibility.md do what the page says, and the page says what was measured."""

import itertools
import json
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec

import numpy as np
import pytest
from support.launching import ROOT, environment

from examples.compatibility import page
from examples.compatibility.measure import compare, failure, measure
from examples.compatibility.registry import METHODS, RANKS, SCRIPTS

ONLY_TORCH = [script.module for script in SCRIPTS if not script.packages]
OTHERS = [script.module for script in SCRIPTS if script.packages]


@pytest.fixture(scope="module")
def digits_read_once():
    """The digits without scikit-learn, whose import takes a second and which reads a text file at each call."""
    from mpitrain.data import digits

    table = digits._table()
    package, datasets = (module_from_spec(ModuleSpec(name, None)) for name in ("sklearn", "sklearn.datasets"))
    datasets.load_digits = lambda *, return_X_y: (table[:, :-1], table[:, -1].astype(np.int64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package.__name__, package)
        patch.setitem(sys.modules, datasets.__name__, datasets)
        yield


@pytest.mark.ranks(2)
@pytest.mark.time_limit(240)
@pytest.mark.parametrize("module", ONLY_TORCH)
def test_a_script_equals_one_process_under_all_reduce(world, digits_read_once, module):
    result = compare(module, compiler="eager")
    assert failure(result) is None
    if world.rank == 0:
        assert result["deviation"] < page.LARGEST_DEVIATION


@pytest.mark.ranks(2)
@pytest.mark.time_limit(240)
@pytest.mark.parametrize(("module", "method"), list(zip(ONLY_TORCH, itertools.cycle(["EASGD", "DiLoCo"]))))
def test_a_script_trains_in_its_public_form(world, digits_read_once, module, method):
    assert failure(measure(module, method, compiler="eager")) is None


@pytest.mark.launches
@pytest.mark.examples
@pytest.mark.time_limit(1500)
@pytest.mark.parametrize("module", OTHERS)
def test_a_script_with_other_packages_trains_and_equals_one_process(module):
    command = [sys.executable, "-m", "examples.compatibility", module, "--ranks", "2", "--dry-run"]
    env = environment("active")
    finished = subprocess.run(command, check=False, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    results = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith('{"script"')]
    assert {result["method"] for result in results} == set(METHODS)
    (deviation,) = (result["deviation"] for result in results if result["method"] == "all-reduce")
    assert deviation < page.LARGEST_DEVIATION


def test_the_page_is_made_of_the_registry_and_the_results():
    assert page.PAGE.read_text() == page.render(page.load()), "run python -m examples.compatibility"


def test_every_script_was_measured_as_it_is_and_works():
    rows = {(row["script"], row["method"], row["ranks"]): row for row in page.load()["results"]}
    wanted = {(script.module, method, n) for script in SCRIPTS for method in METHODS for n in RANKS}
    assert rows.keys() == wanted
    old = sorted({row["script"] for row in rows.values() if row["source"] != page.digest(row["script"])})
    assert not old, f"changed since they were measured: python -m examples.compatibility {' '.join(old)}"
    assert not [row for row in rows.values() if failure(row)]
    assert all(rows[script.module, "all-reduce", n]["deviation"] >= 0 for script in SCRIPTS for n in RANKS)


def test_the_registry_has_every_script_and_the_extra_every_package():
    assert {script.module for script in SCRIPTS} == {path.stem for path in (page.HERE / "scripts").glob("*.py")}
    extra = re.search(r'"examples": \[(.*)\]', (ROOT / "setup.py").read_text())
    packages = {package for script in SCRIPTS for package in script.packages}
    assert packages | {"optuna"} == set(re.findall(r'"(\w+)>=', extra[1]))  # examples/sweep_optuna.py


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({"before": 2.0, "after": 1.0}, None),
        ({"before": 2.0, "after": 1.0, "deviation": 9e-6}, None),
        ({"before": 2.0, "after": 1.9}, "the loss of the consensus went from 2 to 1.9"),
        ({"before": 2.0, "after": float("nan")}, "went from 2 to nan"),
        ({"before": 2.0, "after": 1.0, "deviation": 2e-5}, "differs from that of one process by 2e-05"),
        ({"before": 2.0, "after": 1.0, "deviation": float("nan")}, "by nan"),
        ({"error": "did not end"}, "did not end"),
    ],
)
def test_a_result_that_misses_the_criterion_is_a_failure(result, text):
    found = failure(result)
    assert found is None if text is None else text in found


def test_a_failure_is_on_the_page():
    recorded = page.load()
    recorded["results"][-1] |= {"error": "did not end"}
    assert "did not end" in page.render(recorded)


@pytest.mark.parametrize("page_of_users", ["README.md", "docs/architecture.md"])
def test_the_page_is_linked(page_of_users):
    assert "compatibility.md" in (ROOT / page_of_users).read_text()
