"""config.json and result.json as a disk or an adversary may leave them: one line, no traceback, no wrong type."""

import json
import os
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.errors import UsageError
from mpitrain.records.json_file import read_json
from mpitrain.report import runs
from mpitrain.report.markdown import table
from mpitrain.report.summary import summarise
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.options import check_types
from mpitrain.trainer.plan import RunPlan

CONFIG = {
    "config": TrainConfig(algorithm="easgd", settings={"period": "4"}, steps=10, out="run").to_json(),
    "algorithm": "easgd",
    "settings": {"period": 4},
}
RESULT = {
    "algorithm": "easgd", "settings": {"period": 4}, "ranks": 4, "test_accuracy": 0.9, "test_loss": 0.3, "seconds": 2.5,
    "gradients": 160, "bytes_sent": 1000, "shares": {"compute": 0.5, "exchange": 0.3, "waiting": 0.2},
}  # fmt: skip

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.sampled_from(["", "4", "\x1b[31mred\x1b[0m", "nan", "../..", "a\nb", "x" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(document, path=()):
    """Return the path of every value in a document."""
    found = [path] if path else []
    for key, value in document.items() if isinstance(document, dict) else ():
        found += places(value, (*path, key))
    return found


@st.composite
def mutated(draw, document):
    """A document with a value replaced, removed or added."""
    copy = json.loads(json.dumps(document))
    *way, last = draw(st.sampled_from(places(document)))
    inner = copy
    for key in way:
        inner = inner[key]
    if draw(st.booleans()):
        inner[last] = draw(VALUES)
    elif draw(st.booleans()):
        del inner[last]
    else:
        inner[draw(st.text(max_size=8))] = draw(VALUES)
    return json.dumps(copy)


def is_one_line(error):
    text = str(error)
    return "\n" not in text and "\x1b" not in text and len(text) < 1000


def in_folder(name, text):
    folder = Path(tempfile.mkdtemp())
    (folder / name).write_text(text)
    return folder


def remove(folder):
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@settings(max_examples=200, deadline=None)
@given(mutated(CONFIG))
def test_a_changed_configuration_is_of_the_right_types_or_refused_in_one_line(text):
    folder = in_folder("config.json", text)
    try:
        config = TrainConfig.of_run(folder)
        check_types(config.to_json(), TrainConfig)
        RunPlan.of(config)
    except UsageError as error:
        assert is_one_line(error)  # noqa: PT017 - both outcomes are right
    finally:
        remove(folder)


@settings(max_examples=200, deadline=None)
@given(mutated(RESULT), mutated(CONFIG))
def test_a_changed_result_is_reported_or_refused_in_one_line(result, config):
    folder = in_folder("result.json", result)
    (folder / "config.json").write_text(config)
    try:
        text = "\n".join(table([summarise(runs.load_run(folder))]))
        assert "\x1b" not in text
    except UsageError as error:
        assert is_one_line(error)  # noqa: PT017 - both outcomes are right
    finally:
        remove(folder)


HOSTILE = {
    "nothing": "",
    "no object": "[1, 2]",
    "nan": '{"config": NaN}',
    "infinity": '{"config": -Infinity}',
    "too large a float": '{"config": {"lr": 1e999}}',
    "a whole number of 5000 digits": '{"config": {"steps": ' + "9" * 5000 + "}}",
    "a whole number of 19 digits": '{"config": {"steps": ' + "9" * 19 + "}}",
    "deep lists": "[" * 200_000,
    "deep objects": '{"a":' * 200_000 + "1" + "}" * 200_000,
    "no text": "\udcff\udcfe",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_hostile_json_is_one_line(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    readers = [runs.load_run, *([TrainConfig.of_run] if name == "config.json" else [])]
    for read in readers:
        with pytest.raises(UsageError) as error:
            read(tmp_path)
        assert is_one_line(error.value)


def test_a_file_of_a_gigabyte_is_not_read_whole(tmp_path):
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 1 << 30)
    tracemalloc.start()
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        read_json(path)
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()
    with pytest.raises(UsageError, match="larger than 64 MiB"):
        TrainConfig.of_run(tmp_path)
