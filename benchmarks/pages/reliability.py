"""The tables of docs/reliability.md that follow from the declarations of the methods.

python -m benchmarks.pages.reliability      write them into the page
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mpitrain.algorithms import METHODS, Method, RobustSGD, SafeguardSGD

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
ENDS = "all end"
CONTINUES = "the others go on with `continue`"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def what_an_infinity_does(method: Method) -> str:
    """Return what a step does if ``GradScaler`` finds an infinite gradient on one rank."""
    if isinstance(method, RobustSGD | SafeguardSGD):
        return "the step leaves out that gradient"
    return "all ranks skip the step" if method.combines_gradients else "that rank skips its local update"


def what_survives(method: Method) -> list[str]:
    """Return the row of a method in the table of failures."""
    infinity = what_an_infinity_does(method)
    if method.is_synchronous:
        uneven = "inside `join()`" if method.can_join else "no"
        here, lead = (CONTINUES, "the next rank leads") if method.can_lose_workers else (ENDS, ENDS)
        waits = "for its neighbours" if "topology" in method.settings() else "for all ranks"
        return [f"`{method.name}`", waits, here, lead, here, uneven, infinity]
    goes_on = "the others go on"
    return [f"`{method.name}`", "for locks only", goes_on, "the next rank leads", goes_on, "yes", infinity]


def what_goes_on(method: Method) -> list[str]:
    """Return the row of a method in the table of resumed runs."""
    return [f"`{method.name}`", method.goes_on, method.begins_anew]


def what_is_lost(method: Method) -> list[str]:
    """Return the row of a synchronous method in the table of what a death costs."""
    if "topology" in method.settings():
        steps = "its parameters, apart from the part that its neighbours have averaged"
    elif method.combines_gradients:
        steps = "its gradient of this step"
    else:
        steps = "its local steps since the last exchange"
    return [f"`{method.name}`", "; ".join(filter(None, [steps, method.lost]))]


def tables() -> dict[str, str]:
    """Return each table by the name of its place in the page."""
    methods = [method() for method in METHODS.values()]
    failures = [
        "method",
        "waits",
        "a rank of its node dies",
        "rank 0 dies",
        "a rank elsewhere dies, or a node",
        "uneven steps",
        "`GradScaler`",
    ]
    return {
        "failures": table(failures, map(what_survives, methods)),
        "lost": table(["method", "lost with the rank"], [what_is_lost(m) for m in methods if m.is_synchronous]),
        "resumed": table(["method", "continues", "starts anew"], map(what_goes_on, methods)),
    }


def filled(page: str, made: Mapping[str, str] | None = None) -> str:
    """Return a page with tables in their places, between ``<!-- NAME -->`` and ``<!-- end -->``.

    Args:
        page: The text of the page.
        made: The tables by the names of their places, by default those of this page.

    Raises:
        ValueError: The page lacks a place.
    """
    for name, text in (tables() if made is None else made).items():
        page, n = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page, flags=re.S
        )
        if n != 1:
            raise ValueError(f"the page has no place <!-- {name} -->")
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
