"""JSON files of a run. A file is refused if its contents show that it is damaged or hostile."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20
"""The largest file that is read. A result with 100,000 evaluations has a third of that."""

MOST_DIGITS = 18
"""The longest whole number, which then fits in 64 bits."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds. Local.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is larger than ``MOST_BYTES``, is not standard JSON (NaN, Infinity), is nested too deeply,
            has a number that no option or result can have, or holds something other than an object.
    """
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
    try:
        document = json.loads(content, parse_constant=_refuse, parse_int=_whole_number, parse_float=_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("it holds no JSON object")
    return document


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not standard JSON")


def _whole_number(text: str) -> int:
    if len(text.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"a whole number has {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number
