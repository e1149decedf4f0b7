"""Several loggers as one: who logs, what an error of a back-end does, and what is refused beforehand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpitrain.errors import UsageError
from mpitrain.log import logger
from mpitrain.loggers import BACKENDS, check
from mpitrain.loggers.run_logger import RunLogger

LEAD = SimpleNamespace(rank=0, leader=0)


class Recorder:
    """A logger that keeps its calls, and raises an error in one of them.

    Args:
        fails: The call that fails, such as ``("log", 2)`` for the log of step 2.
    """

    def __init__(self, fails: Any = None) -> None:
        self.calls: list[Any] = []
        self._fails = fails

    def begin(self, config: Any) -> None:
        self._note("begin", config)

    def log(self, step: int, values: Any) -> None:
        self._note("log", step, values)

    def end(self, result: Any) -> None:
        self._note("end", result)

    def _note(self, *call: Any) -> None:
        self.calls.append(call)
        if self._fails in (call[0], call[:2]):
            raise ConnectionError("the server\nis away")


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda text, *parts, **_: found.append(text % parts))
    return found


def test_the_lead_passes_everything_to_all_and_leaves_nan_out() -> None:
    a, b = Recorder(), Recorder()
    with RunLogger([a, b], world=LEAD) as log:
        log.begin({"lr": 0.1})
        log.log(1, {"loss": 2, "accuracy": float("nan")})
        log.log(2, {"loss": float("nan")})
        log.log(3, {"loss": float("inf")})
        log.end({"complete": True})
    expected = [
        ("begin", {"lr": 0.1}),
        ("log", 1, {"loss": 2.0}),
        ("log", 3, {"loss": float("inf")}),
        ("end", {"complete": True}),
    ]
    assert a.calls == b.calls == expected


def test_an_error_of_the_program_ends_the_logs_without_a_result() -> None:
    one = Recorder()

    def program() -> None:
        with RunLogger([one], world=LEAD) as log:
            log.log(1, {"loss": 1 / 1})
            log.log(2, {"loss": 1 / 0})

    with pytest.raises(ZeroDivisionError):
        program()
    assert one.calls == [("begin", {}), ("log", 1, {"loss": 1.0}), ("end", None)]


def test_the_other_ranks_log_nothing_until_one_of_them_becomes_the_lead() -> None:
    one, world = Recorder(), SimpleNamespace(rank=1, leader=0)
    log = RunLogger([one], world=world)
    log.begin({"lr": 0.1})
    log.log(1, {"loss": 1.0})
    assert one.calls == []
    world.leader = 1  # rank 0 has died
    log.log(2, {"loss": 2.0})
    log.end()
    assert one.calls == [("begin", {"lr": 0.1}), ("log", 2, {"loss": 2.0}), ("end", None)]


@pytest.mark.parametrize("fails", ["begin", ("log", 2), "end"], ids=str)
def test_a_backend_that_fails_is_reported_once_and_left_out_from_then_on(fails: Any, warnings: list[str]) -> None:
    broken, sound = Recorder(fails), Recorder()
    log = RunLogger([broken, sound], world=LEAD)
    log.begin({})
    for step in (1, 2, 3):
        log.log(step, {"loss": float(step)})
    log.end({})
    assert [call[:2] for call in sound.calls] == [("begin", {}), ("log", 1), ("log", 2), ("log", 3), ("end", {})]
    failed = next(k for k, call in enumerate(broken.calls) if fails in (call[0], call[:2]))
    assert len(broken.calls) == failed + 1
    assert warnings == ["logging to Recorder has ended (the server is away); the run continues"]


def test_a_missing_package_is_refused_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(UsageError, match=r"--log wandb needs the package wandb.*pip install 'mpitrain\[wandb\]'"):
        check(["csv", "wandb"], has_folder=True)
    with pytest.raises(UsageError, match=r"mpitrain\[wandb\]"):
        RunLogger(["wandb"], world=LEAD)


def test_every_extra_is_declared_for_the_package() -> None:
    setup = (Path(__file__).resolve().parents[2] / "setup.py").read_text()
    for name, backend in BACKENDS.items():
        if backend.package is not None:
            assert f'"{name}": ' in setup
            assert f'["{backend.package}' in setup


@pytest.mark.parametrize(
    ("names", "has_folder", "text"),
    [
        (["cvs"], True, "did you mean csv"),
        (["csv", "csv"], True, "--log csv was given twice"),
        (["csv"], False, "add --out RUN"),
        (["tensorboard"], False, "add --out RUN"),
    ],
)
def test_what_cannot_be_logged_is_refused(names: list[str], has_folder: bool, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        check(names, has_folder=has_folder)
