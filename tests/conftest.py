"""Fixtures for all tests. support/mpi_plugin.py runs tests on several ranks, run.py launches them."""

import os
from pathlib import Path

import pytest

pytest_plugins = ("support.mpi_plugin", "support.standin_gpu")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def world():
    """The world of this launch. `world.comm` is its mpi4py communicator. Collective."""
    import mpitrain

    return mpitrain.init()


@pytest.fixture(scope="session")
def cifar10_archive() -> Path:
    """CIFAR-10 as an archive of 32 x 32 images (`train/CLASS/0000.jpg`, `test/CLASS/0000.jpg`); see shared_data."""
    path = Path(os.environ.get("MPITRAIN_CIFAR10", ROOT / "shared" / "data" / "cifar10-images.tar.gz"))
    if not path.exists():
        pytest.fail(f"{path} does not exist: set MPITRAIN_CIFAR10 to the archive, or leave out --also shared_data")
    return path
