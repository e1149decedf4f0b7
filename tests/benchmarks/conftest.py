"""What stands in benchmarks/ is scripts: they are loaded from their files."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """Loads ``benchmarks/NAME.py``, under a name that clashes with nothing."""

    def load(name: str) -> ModuleType:
        full = f"benchmark_{name}"
        if full not in sys.modules:
            spec = importlib.util.spec_from_file_location(full, BENCHMARKS / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[full] = module  # dataclasses look their module up
            spec.loader.exec_module(module)
        return sys.modules[full]

    return load
