"""The metrics of a run are stored, and continued where the checkpoint was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mpitrain.records.metrics import MetricsWriter, read_metrics
from mpitrain.trainer.metrics import MetricsFile, tables

COLUMNS = tables(2, ["distance"])


def write(path):
    writer = MetricsWriter(path, COLUMNS)
    for seconds in (1.0, 2.0, 3.0):
        for table in COLUMNS:
            writer.append(table, seconds=seconds)
    writer.close()


def test_a_resumed_run_drops_rows_from_after_its_checkpoint_in_every_table(tmp_path):
    write(tmp_path / "metrics.h5")
    file = MetricsFile(tmp_path, COLUMNS, ["distance"], continue_from=2.0)
    file.on_start(SimpleNamespace(is_leader=True))
    file.close()
    found = read_metrics(tmp_path / "metrics.h5")
    assert found.keys() == COLUMNS.keys()
    assert all(table["seconds"].tolist() == [1.0, 2.0] for table in found.values())


@pytest.mark.parametrize(("is_leader", "has_folder"), [(False, True), (True, False)])
def test_other_ranks_and_runs_without_a_folder_write_nothing(tmp_path, is_leader, has_folder):
    file = MetricsFile(tmp_path if has_folder else None, COLUMNS)
    file.on_start(SimpleNamespace(is_leader=is_leader))
    file.close()
    assert not list(tmp_path.iterdir())


def test_the_next_lead_continues_the_file_of_one_that_was_killed(tmp_path):
    write(tmp_path / "metrics.h5")
    file = MetricsFile(tmp_path, COLUMNS, ["distance"])
    run = SimpleNamespace(is_leader=False)
    file.on_start(run)
    file.on_lead(run)
    file.close()
    found = read_metrics(tmp_path / "metrics.h5")
    assert all(table["seconds"].tolist() == [1.0, 2.0, 3.0] for table in found.values())
