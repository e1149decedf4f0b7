"""The recorded results of the benchmarks, NAME.md and NAME.json, in the order in which they are shown."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ORDER = (
    *("kernels", "collectives", "windows", "steps", "stragglers", "startup", "nodes", "between", "sums"),
    *("prediction", "compare"),
)
MPIS = ("openmpi", "mpich")
MPI_NAMES = {"openmpi": "Open MPI", "mpich": "MPICH"}
ON_GPU = "gpu-"
"""The prefix of results on a GPU. They come from another machine and have their own page."""


@dataclass(frozen=True)
class Result:
    """One recorded benchmark.

    Attributes:
        name: Of its files, such as ``collectives-mpich-4``.
        document: The JSON document.
        markdown: The text beside it, "" if there is none.
    """

    name: str
    document: dict[str, Any]
    markdown: str

    @property
    def benchmark(self) -> str:
        """The benchmark's name without MPI and ranks."""
        return self.name.partition("-")[0]

    @property
    def mpi(self) -> str | None:
        """``openmpi``, ``mpich``, or None if the MPI does not matter."""
        named = [mpi for mpi in MPIS if mpi in self.name.split("-")]
        if named:
            return named[0]
        library = self.document.get("world", {}).get("mpi", "").lower().replace(" ", "")
        return next((mpi for mpi in MPIS if library.startswith(mpi)), None)

    @property
    def ranks(self) -> int | None:
        """The number of ranks of the run."""
        n_ranks: int | None = self.document.get("world", {}).get("ranks")
        return n_ranks


def load(folder: Path, *, on_gpu: bool = False) -> list[Result]:
    """Load the results of a folder: by benchmark, Open MPI before MPICH, few ranks before many.

    Args:
        folder: With results of any kind.
        on_gpu: Whether those on a GPU are wanted, or the others.
    """
    results = []
    for path in folder.glob("*.json"):
        if path.name.startswith(ON_GPU) != on_gpu:
            continue
        beside = path.with_suffix(".md")
        markdown = beside.read_text() if beside.exists() else ""
        results.append(Result(path.stem, json.loads(path.read_text()), markdown))

    def place(result: Result) -> tuple[int, int, int, str]:
        order = ORDER.index(result.benchmark) if result.benchmark in ORDER else len(ORDER)
        return order, result.ranks or 0, MPIS.index(result.mpi) if result.mpi else -1, result.name

    return sorted(results, key=place)
