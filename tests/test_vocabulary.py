"""Identifiers are the field's terms, and docstrings open as those of NumPy and PyTorch do.

Names that the project once had for itself do not come back: INSTEAD has their replacements. Names are compared whole,
in code and not in prose. Public classes and functions have a docstring. That of a function opens with an imperative
verb, that of a property with a noun phrase or "Whether".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

INSTEAD = {
    "look": "poll",
    "looks": "polls",
    "looking": "polling",
    "naps": "backoff",
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


# A function's docstring does not open with one of these, nor with a verb in the third person ("Returns").
NO_IMPERATIVE = frozenset(
    """
    A All Already An And Another Any Anything As At Because Before Both But By Collective Each Either Else Every
    Everybody Everyone Everything Few For From How If In It Its Local Many More Most Neither No Nobody None Nor
    Not Nothing Of On One Only Or Other Others Same Several Some Somebody Something Such That The Their Them
    Then There These They Thing This Those Though To Two Until Was What Whatever When Where Wherever Whether
    Which Whichever While Who Whoever Whose Why With Without
    """.split()
)
VERBS_IN_S = frozenset(
    ["Access", "Address", "Bypass", "Compress", "Cross", "Decompress", "Focus", "Pass", "Press", "Process"]
)


# Names of other libraries' interfaces, by the file that calls them.
OF_OTHERS = {"wandb_run.py": ("finish",)}


def identifiers(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of everything that a module names, without leading underscores."""
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


Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_property(function: Function) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in function.decorator_list)


def is_setter(node: ast.AST) -> bool:
    """Whether a function sets a property, whose getter has the docstring."""
    return isinstance(node, Function) and any(ast.unparse(one).endswith(".setter") for one in node.decorator_list)


def opening_objection(function: Function) -> str | None:
    """Return what is wrong with the first word of a function's docstring, None if nothing is."""
    text = ast.get_docstring(function)
    if text is None:
        return None
    word = re.split(r"[\s,.:;]", text, maxsplit=1)[0]
    returns_bool = function.returns is not None and ast.unparse(function.returns) == "bool"
    if is_property(function) or (word == "Whether" and returns_bool):
        return None
    third_person = len(word) > 2 and word.endswith("s") and word not in VERBS_IN_S
    return f"opens with {word!r}, which is no imperative" if word in NO_IMPERATIVE or third_person else None


def documentation_problems(sources: Mapping[str, str]) -> list[str]:
    """Return the public classes and functions without a docstring, and the functions whose docstring opens wrongly.

    A method that overrides one with a docstring needs none. Classes are told apart by their name alone.
    """
    trees = {path: ast.parse(source) for path, source in sources.items()}
    classes = {node.name: node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def is_inherited(owner: ast.ClassDef, name: str) -> bool:
        bases = [
            classes[word] for base in owner.bases for word in re.findall(r"\w+", ast.unparse(base)) if word in classes
        ]
        return any(
            any(isinstance(node, Function) and node.name == name and ast.get_docstring(node) for node in base.body)
            or is_inherited(base, name)
            for base in bases
            if base is not owner
        )

    def problems(body: list[ast.stmt], owner: ast.ClassDef | None) -> Iterator[tuple[int, str]]:
        for node in body:
            if not isinstance(node, Function | ast.ClassDef):
                continue
            name = f"{owner.name}.{node.name}" if owner else node.name
            objection = opening_objection(node) if isinstance(node, Function) else None
            if objection is not None:
                yield node.lineno, f"{name} {objection}"
            if node.name.startswith("_") or is_setter(node):
                continue
            if ast.get_docstring(node) is None and not (owner and is_inherited(owner, node.name)):
                yield node.lineno, f"{name} has no docstring"
            if isinstance(node, ast.ClassDef):
                yield from problems(node.body, node)

    return [f"{path}:{line}: {text}" for path, tree in trees.items() for line, text in problems(tree.body, None)]


def found_in(source: str) -> list[str]:
    return [f"line {line}: {name} is {INSTEAD[name]}" for line, name in identifiers(source) if name in INSTEAD]


@pytest.mark.parametrize("folder", ["mpitrain", "benchmarks"])
def test_no_abandoned_name_is_used(folder: str) -> None:
    found = [
        f"{path}, {text}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for text in found_in(path.read_text())
        if not any(f": {name} is " in text for name in OF_OTHERS.get(path.name, ()))
    ]
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
def test_an_abandoned_name_is_found(source: str) -> None:
    assert found_in(source)


def test_public_names_are_documented_in_the_imperative() -> None:
    paths = sorted(path for folder in ("mpitrain", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
    found = documentation_problems({str(path.relative_to(ROOT)): path.read_text() for path in paths})
    assert not found, f"{len(found)} problems:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def f(): pass", "f has no docstring"),
        ("class A: pass", "A has no docstring"),
        ('class A:\n    """A letter."""\n    def f(self): pass', "A.f has no docstring"),
        ('def f():\n    """The sum."""', "f opens with 'The'"),
        ('def f():\n    """Collective. Wait for all ranks."""', "f opens with 'Collective'"),
        ('def f():\n    """Returns the sum."""', "f opens with 'Returns'"),
        ('def _f():\n    """What is left."""', "_f opens with 'What'"),
        ('def f() -> int:\n    """Whether there is one."""', "f opens with 'Whether'"),
    ],
    ids=[
        "function without",
        "class without",
        "method without",
        "article",
        "duty first",
        "third person",
        "private function",
        "whether of a number",
    ],
)
def test_a_missing_docstring_or_another_opening_is_found(source: str, problem: str) -> None:
    (found,) = documentation_problems({"a.py": source})
    assert problem in found


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    """Return the sum."""',
        'def f():\n    """Pass the gradient on. Collective."""',
        'def f() -> bool:\n    """Whether there is one."""',
        'class A:\n    """A letter."""\n    @property\n    def f(self):\n        """The sum."""',
        "def _f(): pass",
        'class A:\n """A."""\n def f(self):\n  """Add."""\nclass B(A):\n """B."""\n def f(self): pass',
        'def f():\n    """Return a function."""\n    def g(): pass\n    return g',
    ],
    ids=["imperative", "duty at the end", "predicate", "property", "private", "inherited", "nested"],
)
def test_good_docstrings_are_not_objected_to(source: str) -> None:
    assert documentation_problems({"a.py": source}) == []
