"""Identifiers are the field's terms: names that the project once had for itself do not come back.

The table has what each of them is called instead. Names are compared whole, in code and not in prose.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

INSTEAD = {
    "look": "poll",
    "looks": "polls",
    "looking": "polling",
    "naps": "backoff",
    "patience": "spin_limit",
    "together": "run_on_survivors, all_ok",
    "are_told": "ulfm_available",
    "outlives": "survives_failures",
    "living": "alive_ranks",
    "speaks_for_all": "saves_shared_state",
    "one_a_node": "node_shared",
    "stand_in": "replace_nonfinite",
    "rejected": "n_nonfinite",
    "looking_away": "suspended",
    "BaseWatch": "DirectStepGuard",
    "holding": "swapped_parameters",
    "settle": "wait, synchronize",
    "finish": "finalize, wait, close",
    "Meeting": "NodeBarrier",
    "meet": "wait",
    "Board": "Scoreboard",
    "Desk": "ConsensusServer",
    "Bell": "WakeupPipe",
    "rooms": "staging_buffers",
    "then": "prefetch",
    "recover": "reset_nonfinite",
    "Segment": "ParamGroupSlice",
    "carry": "wrap",
    "take": "what is done with it: acquire, receive, select",
    "kept": "what is kept",
}


def identifiers(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a module names, without leading underscores."""
    for node in ast.walk(ast.parse(source)):
        names: list[str | None] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.arg | ast.keyword):
            names = [node.arg]
        elif isinstance(node, ast.alias):
            names = [node.asname or node.name]
        for name in names:
            if name is not None:
                yield getattr(node, "lineno", 0), name.lstrip("_")


def found_in(source: str) -> list[str]:
    return [f"line {line}: {name} is {INSTEAD[name]}" for line, name in identifiers(source) if name in INSTEAD]


@pytest.mark.parametrize("folder", ["mpitrain", "benchmarks"])
def test_no_private_name_is_left(folder: str) -> None:
    found = [f"{path}, {text}" for path in sorted((ROOT / folder).rglob("*.py")) for text in found_in(path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "def settle(self): pass",
        "worker.finish()",
        "f(then=1)",
        "class Board: pass",
        "from a import b as kept",
        "_look = 1",
    ],
)
def test_a_private_name_is_found(source: str) -> None:
    assert found_in(source)
