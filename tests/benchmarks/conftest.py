"""The benchmarks are modules of the package ``benchmarks``, imported when a test needs them."""

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def load() -> Callable[[str], ModuleType]:
    """Import a benchmark by its module name."""
    return importlib.import_module
