"""Completion in a shell: the words that bash would offer after the line so far."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.launching import environment

from mpitrain.algorithms import METHODS
from mpitrain.cli.completion import typed_command
from mpitrain.cli.main import COMMANDS
from mpitrain.models import MODELS

pytestmark = pytest.mark.launches


def completions(line: str, folder: Path, **others: str) -> list[str]:
    """Return the offered words, as the function of ``register-python-argcomplete`` asks for them."""
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\v",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(folder / "found"),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    command = [sys.executable, "-m", "mpitrain"]
    done = subprocess.run(
        command,
        env=environment("active", {**asked, **others}),
        cwd=folder,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == b""
    found = folder / "found"
    return [word.strip() for word in found.read_text().split("\v")] if done.returncode == 0 and found.exists() else []


def test_commands_options_and_values_complete(tmp_path: Path) -> None:
    (tmp_path / "mine.h5").touch()
    (tmp_path / "other.txt").touch()
    offered = {
        "mpitrain ": set(COMMANDS),
        "mpitrain train --algorithm eas": {name for name in METHODS if name.startswith("eas")},
        "mpitrain train --model ": set(MODELS),
        "mpitrain train --wire bf": {"bfloat16"},
        "mpitrain train --log ": {"csv", "tensorboard", "wandb", "mlflow"},
        "mpitrain simulate --algorithm gos": {name for name in METHODS if name.startswith("gos")},
    }
    for line, expected in offered.items():
        found = completions(line, tmp_path)
        assert expected
        assert expected <= set(found), (line, found)
    data = set(completions("mpitrain train --data ", tmp_path))
    assert {"digits", "synthetic", "mine.h5"} <= data
    assert "other.txt" not in data
    assert "--batch-size" in completions("mpitrain train --batch", tmp_path)


def test_without_the_extra_nothing_is_offered_and_nothing_is_printed(tmp_path: Path) -> None:
    (tmp_path / "argcomplete.py").write_text("raise ImportError")
    assert completions("mpitrain ", tmp_path, PYTHONPATH=str(tmp_path)) == []


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("mpitrain", None),
        ("mpitrain tr", None),
        ("mpitrain train --lr", "train"),
        ("mpitrain train --out 'a b", "train"),
    ],
)
def test_the_command_is_found_in_the_line(line: str, command: str | None) -> None:
    assert typed_command(line, COMMANDS) == command
