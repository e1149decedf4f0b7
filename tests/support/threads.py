"""Threads that stand for ranks: compiled code waits without the interpreter lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def in_threads(n: int, body: Callable[[int], Any]) -> list[Any]:
    """Run ``body(rank)`` on n threads at once and return the results."""
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(body, range(n)))
