"""Run a benchmark and keep its results: the table in docs/benchmarks/NAME.md, the JSON document beside it.

    python -m benchmarks.pages.record kernels python -m benchmarks.micro.kernels

The tables are of one machine on one day and are committed by hand, when they are worth keeping; the documents are not.
The exit code is the benchmark's; one that fails leaves the old results as they are.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


def main() -> int:
    """Run the benchmark and return its exit code."""
    if len(sys.argv) < 3:
        print("usage: record.py NAME command [argument ...]", file=sys.stderr)
        return 2
    name, *command = sys.argv[1:]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if not line.startswith("{"):
                print(line, end="", flush=True)
    if process.returncode != 0:
        return process.returncode
    document = json.loads(lines.pop())
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    path = RESULTS / f"{name}.md"
    path.write_text(page(name, command, lines, document))
    print(f"wrote {path}")
    return 0


def page(name: str, command: Sequence[str], lines: Sequence[str], document: dict[str, Any]) -> str:
    """Return the Markdown of one benchmark."""
    versions = ", ".join(f"{package} {version}" for package, version in document.get("versions", {}).items())
    text = "\n".join(lines).strip("\n")
    return f"# {name}\n\n{time.strftime('%Y-%m-%d')}: `{' '.join(command)}`\n\n{versions}\n\n```\n{text}\n```\n"


if __name__ == "__main__":
    sys.exit(main())
