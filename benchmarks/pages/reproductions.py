"""The pages of docs/reproductions, from the results that are checked in beside them.

python -m benchmarks.pages.reproductions [--from runs/reproduce]      copy new results, then write all pages
"""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SCRIPTS = ROOT / "benchmarks" / "reproduce"
FOLDER = DOCS / "reproductions"

Result = Mapping[str, Any]
"""The JSON document of a script."""


def results(folder: Path = FOLDER) -> dict[str, Result]:
    """Return the results of a folder by the name of their script."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def shown(value: Any) -> str:
    """Return a measured value as the page shows it."""
    if value is None:
        return "not finite"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def verdict(result: Result) -> str:
    """Return the verdict on a script in a few words."""
    criteria = result["criteria"]
    n_met = sum(one["passed"] for one in criteria)
    n_against = sum("contradicts" in one and not one["passed"] for one in criteria)
    missed = len(criteria) - n_met - n_against
    parts = [f"{n_met} of {len(criteria)} criteria met"]
    if n_against:
        parts.append(f"{n_against} contradict{'s' if n_against == 1 else ''} the paper")
    if missed:
        parts.append(f"{missed} missed")
    return ", ".join(parts)


def claim(name: str) -> tuple[str, str, str]:
    """Return the docstring of a script in three parts: its first line, the text, and the command that runs it."""
    docstring = ast.get_docstring(ast.parse((SCRIPTS / f"{name}.py").read_text())) or ""
    first, _, body = docstring.partition("\n\n")
    text, _, command = body.rpartition("\n\n")
    sentence = first.partition(": ")[2]
    return sentence[:1].upper() + sentence[1:], text.strip(), textwrap.dedent(command)


def page(result: Result) -> str:
    """Return the page of a script in Markdown."""
    name, criteria = result["name"], result["criteria"]
    first, text, command = claim(name)
    given = {key: value for key, value in result["options"].items() if value is not False}
    used = ", ".join(f"`{_option(key, value)}`" for key, value in given.items())
    printed = [line for line in result["lines"] if not line.startswith("wrote ")]
    lines = [
        f"# {name}",
        "",
        f"**Published result:** {first}",
        "",
        text,
        "",
        f"The script ran with {used or 'its default options'}.",
        "",
        "## Criteria",
        "",
        *(f"{k}. {one['criterion']}" for k, one in enumerate(criteria, 1)),
        "",
        "## Result",
        "",
        f"![{name}]({name}.png)",
        "",
        *(["```", *printed, "```", ""] if printed else []),
        "| criterion | value | verdict |",
        "|---|---|---|",
        *(f"| {k} | {shown(one['value'])} | {_verdict_of(one)} |" for k, one in enumerate(criteria, 1)),
        "",
        f"**Verdict:** {verdict(result)}.",
        "",
        "To repeat the result:",
        "",
        "```",
        command,
        "```",
        "",
    ]
    return "\n".join(lines)


def _option(name: str, value: Any) -> str:
    """Return an option as it is given on a command line."""
    words = [] if value is True else [str(one) for one in (value if isinstance(value, list) else [value])]
    return " ".join([f"--{name.replace('_', '-')}", *words])


def _verdict_of(criterion: Mapping[str, Any]) -> str:
    if criterion["passed"]:
        return "met"
    reason = criterion.get("contradicts", "")
    return f"contradicts the paper. Likeliest reason: {reason}" if reason else "missed"


def index(found: Mapping[str, Result]) -> str:
    """Return the overview of all pages in Markdown."""
    lines = [
        "# Published results, repeated",
        "",
        "Each script of `benchmarks/reproduce/` repeats a published result with the methods of mpitrain and simulated",
        "workers. The criteria follow from the papers. We chose sizes, learning rates and targets in trial runs. If a",
        "result contradicts the paper, its page says so and gives the likeliest reason, which we sought afterwards.",
        "`make reproduce` runs all scripts, and `make reproduce-quick` runs small versions of them. Only",
        "`cifar10` trains on real ranks; it needs a data file, and its page has the command.",
        "[choosing.md](choosing.md) draws conclusions from the results.",
        "",
        "| script | published result | verdict |",
        "|---|---|---|",
    ]
    for name, result in found.items():
        lines.append(f"| [{name}](reproductions/{name}.md) | {claim(name)[0]} | {verdict(result)} |")
    return "\n".join([*lines, ""])


def pages(found: Mapping[str, Result]) -> dict[Path, str]:
    """Return the text of every page by its path."""
    made = {FOLDER / f"{name}.md": page(result) for name, result in found.items()}
    return {**made, DOCS / "reproductions.md": index(found)}


def collect(source: Path, names: Iterable[str] = ()) -> None:
    """Copy results and figures from a folder that scripts have written."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.json")):
        if names and path.stem not in names:
            continue
        shutil.copy(path, FOLDER / path.name)
        shutil.copy(path.with_suffix(".png"), FOLDER / f"{path.stem}.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write all pages; return the exit code."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--from", dest="source", type=Path, help="a folder with new results")
    options = made.parse_args(arguments)
    if options.source is not None:
        collect(options.source)
    for path, text in pages(results()).items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
