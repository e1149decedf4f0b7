"""The lines that the two ranks of a pair append to their files, read back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpitrain.collectives.probe.outcome import Outcome


@dataclass
class Report:
    """The report of one rank so far.

    Attributes:
        ready: Whether the rank has started.
        problem: The reason why it could not start.
        segments: The files of shared memory that MPI has created, which must be removed.
        found: The results of the rank, by operation.
    """

    ready: bool = False
    problem: str = ""
    segments: list[str] = field(default_factory=list)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def error(self) -> Outcome | None:
        """The outcome of the operation that raised an exception, if one did."""
        return next((Outcome(**record) for record in self.found.values() if record["verdict"] == "error"), None)


def read_reports(folder: Path) -> list[Report]:
    """Return the reports of both ranks. Local."""
    reports = []
    for rank in range(2):
        report = Report()
        with suppress(FileNotFoundError):
            text = (folder / f"rank-{rank}.jsonl").read_text()
            for line in text[: text.rfind("\n") + 1].splitlines():  # the last line may be incomplete
                record = json.loads(line)
                report.ready = report.ready or "ready" in record
                report.problem = report.problem or record.get("problem", "")
                report.segments = report.segments or record.get("segments", [])
                if "operation" in record:
                    report.found[record.pop("operation")] = record
        reports.append(report)
    return reports


def completed(reports: Sequence[Report], names: Sequence[str]) -> list[tuple[str, Outcome]]:
    """Return the outcomes of the operations that both ranks completed: ``wrong`` if bytes on either rank are wrong."""
    outcomes = []
    for name in names:
        records = [report.found.get(name) for report in reports]
        if any(record is None or record["verdict"] == "error" for record in records):
            break
        first, second = (Outcome(**record) for record in records if record is not None)
        outcomes.append((name, second if second.verdict == "wrong" else first))
    return outcomes
