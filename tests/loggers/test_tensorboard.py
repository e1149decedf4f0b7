"""The event files of TensorBoard: their records, decoded by the format's own definition, hold what was logged."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog

from mpitrain.loggers.tensorboard import TensorBoardLogger


def events(folder: Path) -> Iterator[Any]:
    """Yield the events of all files in the order of their names (TFRecord: length, crc, data, crc)."""
    for path in sorted((folder / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            yield Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4


def test_an_event_file_has_every_number_with_its_step_and_the_options(tmp_path: Path) -> None:
    one = TensorBoardLogger(tmp_path)
    one.begin({"lr": 0.25})
    one.log(3, {"train/loss": 1.5, "test/loss": 2.5})
    one.log(7, {"train/loss": 0.5})
    one.end({})
    found, texts = [], []
    for event in events(tmp_path):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.append((event.step, value.tag, value.simple_value))
            else:
                texts.append(value.tensor.string_val[0].decode())
    assert found == [(3, "train/loss", 1.5), (3, "test/loss", 2.5), (7, "train/loss", 0.5)]
    assert ['"lr": 0.25' in text for text in texts] == [True]


def test_a_continued_log_hides_the_steps_that_are_made_again(tmp_path: Path) -> None:
    for steps in ((1, 2, 3, 4), (3, 4)):
        one = TensorBoardLogger(tmp_path)
        one.begin({})
        for step in steps:
            one.log(step, {"a": 0.0})
        one.end({})
    starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert sorted(starts) == [1, 3]


def test_nothing_logged_leaves_nothing_behind(tmp_path: Path) -> None:
    one = TensorBoardLogger(tmp_path)
    one.begin({})
    one.end(None)
    assert list(tmp_path.iterdir()) == []
