"""Images of a folder become a data file, and ranks train on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mpitrain.cli.main import main


@pytest.mark.ranks(2)
def test_images_are_imported_and_trained_on(world: Any, mpi_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = mpi_tmp_path / "images.h5"
    if world.rank == 0:
        draw_images(mpi_tmp_path / "images")
        assert main(["data", "import", "images", str(mpi_tmp_path / "images"), str(file)]) == 0
        described = f"{file}: 48 training and 16 test images of 3x32x32, 2 classes\n"
        assert capsys.readouterr().out == described
    world.barrier()
    options = ["--data", str(file), "--model", "resnet20", "--augment", "--sampling", "sharded", "--batch-size", "4"]
    assert main(["train", *options, "--steps", "6", "--algorithm", "allreduce", "--json"]) == 0
    output = capsys.readouterr().out
    if world.rank == 0:
        result = json.loads(output.splitlines()[-1])
        assert result["steps_of_ranks"] == [6, 6]
        assert 0 <= result["test_accuracy"] <= 1


def draw_images(folder: Path) -> None:
    """Write dark and light pictures into the folders of their classes."""
    draw = np.random.default_rng(0)
    for part, n in (("train", 24), ("test", 8)):
        for name, brightness in (("dark", 60), ("light", 190)):
            of_class = folder / part / name
            of_class.mkdir(parents=True)
            for k in range(n):
                pixels = (brightness + draw.integers(-50, 50, (32, 32, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(of_class / f"{k}.png")
