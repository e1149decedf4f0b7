"""The tables of docs/choosing.md, from the checked-in results of the reproductions.

python -m benchmarks.pages.choosing      write them into the page
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.pages import reproductions
from benchmarks.pages.reliability import filled as fill
from benchmarks.pages.reliability import table

PAGE = reproductions.DOCS / "choosing.md"

METHODS = ("all-reduce", "gossip", "EASGD")

NETWORKS = {"base": "10 Gbit/s", "10 ms latency": "10 Gbit/s, 10 ms latency", "stragglers": "10 Gbit/s, stragglers"}
"""Names of networks on the page, where they differ from those of the results."""


def _seconds(value: float | None) -> str:
    return "never" if value is None or math.isinf(value) else f"{value:.1f}"


def _best(costs: Mapping[str, Mapping[str, list[float | None]]], workers: str) -> str:
    """Return the method that is first."""
    return min(METHODS, key=lambda name: costs[name][workers][0] or math.inf)


def to_target(result: Mapping[str, Any]) -> str:
    """Return seconds, gradients and bytes to the target on the basic network."""
    base = result["costs"]["base"]
    rows = [
        [workers, *(_seconds(base[name][workers][0]) for name in METHODS)]
        + [f"{base[name][workers][1] or math.inf:,.0f}" for name in METHODS]
        + [f"{base[name][workers][2] or math.inf:,.1f}" for name in METHODS]
        for workers in base["EASGD"]
    ]
    header = ["workers", *(f"{name}: s" for name in METHODS)]
    header += [f"{name}: gradients" for name in METHODS] + [f"{name}: GB" for name in METHODS]
    return table(header, rows)


def networks(result: Mapping[str, Any]) -> str:
    """Return which method is first on each network, with its time relative to all-reduce."""
    costs = result["costs"]
    numbers = [n for n in costs["base"]["EASGD"] if all(n in costs[key]["EASGD"] for key in costs)]
    rows = []
    for key, found in costs.items():
        cells = []
        for n in numbers:
            first = _best(found, n)
            reduced, fastest = found["all-reduce"][n][0] or math.inf, found[first][n][0] or math.inf
            cells.append("all-reduce" if first == "all-reduce" else f"{first}, {reduced / fastest:.1f} times faster")
        rows.append([NETWORKS.get(key, key), *cells])
    return table(["network", *(f"{n} workers" for n in numbers)], rows)


def steps(result: Mapping[str, Any]) -> str:
    """Return the seconds of a step of SGP and all-reduce on a slow network."""
    cells = {(one["cluster"], one["method"], one["workers"]): one["seconds"] for one in result["cells"]}
    numbers = sorted({workers for _, _, workers in cells})
    rows = [
        [f"{method}, {cluster}", *(f"{cells[cluster, method, n]:.2f}" for n in numbers)]
        for cluster in ("steady", "stragglers")
        for method in ("all-reduce", "SGP", "OSGP")
    ]
    return table(["seconds of a step", *(f"{n} nodes" for n in numbers)], rows)


def periods(result: Mapping[str, Any]) -> str:
    """Return the losses and bytes of the methods with local steps."""
    found = result["losses_and_gigabytes"]
    numbers = list(next(iter(found.values())))
    rows = [[name, *(f"{losses[h][0]:.3f}" for h in numbers)] for name, losses in found.items()]
    volume = next(iter(found.values()))
    rows.append(["GB sent", *(f"{volume[h][1]:,.0f}" for h in numbers)])
    return table(["training loss", *(f"H = {h}" for h in numbers)], rows)


def tables() -> dict[str, str]:
    """Return each table by the name of its place in the page."""
    found = reproductions.results()
    return {
        "to-target": to_target(found["crossover"]),
        "networks": networks(found["crossover"]),
        "steps": steps(found["gradient_push"]),
        "periods": periods(found["local_updates"]),
    }


def filled(page: str) -> str:
    """Return the page with its tables."""
    return fill(page, tables())


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
