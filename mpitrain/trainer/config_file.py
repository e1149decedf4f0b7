"""Options of a run in a file: TOML as a user writes it, or the ``config.json`` of a run.

    algorithm = "easgd"
    batch-size = 16
    straggler = "1:4"

    [set]
    period = 10

In TOML, a key is the name of an option without the leading dashes, and an option of KEY=VALUE pairs is a table. In
``config.json``, a key is the name of a field. Both formats hold every option. A configuration that is written and read
again is equal to the original.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpitrain.errors import UsageError, reason, suggestion
from mpitrain.records.durable import replace_text
from mpitrain.trainer.config import BUDGETS, TrainConfig
from mpitrain.trainer.options import Option, default_of, flag_of, options_of

OPTIONS = options_of(TrainConfig)
KEYS = {flag_of(name, declared)[2:]: name for name, declared in OPTIONS.items()}
"""The name of the field of each key."""

KINDS = {int: "a whole number", float: "a number"}


def read(path: Path) -> dict[str, Any]:
    """Return the options in a file, by the names of their fields. Local.

    Raises:
        UsageError: The file cannot be read, a key is not an option, or a value has the wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read ({reason(error)}): check the path") from error
    try:
        return _of_run(path, json.loads(text)) if path.suffix == ".json" else _of_toml(path, tomllib.loads(text))
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} cannot be parsed ({error}): correct it") from error


def _of_toml(path: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = KEYS.get(key.replace("_", "-"))
        if name is None:
            raise UsageError(f"{path} has the key {key!r}, which is no option: {suggestion(key, KEYS)}")
        found[name] = _value(f"{path}: {key}", OPTIONS[name], default_of(TrainConfig, name), value)
    return found


def _of_run(path: Path, document: Any) -> dict[str, Any]:
    stored = document.get("config") if isinstance(document, dict) else None
    if not isinstance(stored, dict):
        raise UsageError(f"{path} is not the config.json of a run: name one, or a TOML file")
    for name in stored:
        if name not in OPTIONS:
            raise UsageError(f"{path} has the field {name!r}, which is no option: {suggestion(name, OPTIONS)}")
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in stored.items() if value is not None
    }


def _value(where: str, declared: Option, default: Any, value: Any) -> Any:
    """Return the value of a field from that of a key.

    Raises:
        UsageError: It has another type.
    """
    if isinstance(default, Mapping):
        if not isinstance(value, dict) or any(isinstance(item, (dict, list)) for item in value.values()):
            raise UsageError(f"{where} must be a table of KEY = VALUE, not {value!r}")
        return {key: item if isinstance(item, str) else _to_toml(item) for key, item in value.items()}
    if declared.parse is None:
        return _checked(where, value, bool, "true or false")
    if declared.repeated:
        return tuple(_checked(where, item, str, "a list of texts") for item in _checked(where, value, list, "a list"))
    if declared.parse is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if declared.parse in KINDS:
        kind: Any = declared.parse
        return _checked(where, value, kind, KINDS[kind])
    text = _checked(where, value, str, "a text")
    try:
        return declared.parse(text)
    except UsageError as error:
        raise UsageError(f"{where} {error}") from None


def _checked(where: str, value: Any, kind: type[Any], words: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"{where} must be {words}, not {value!r}")
    return value


def merged(in_file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a file and of the command line, which has priority.

    A budget on the command line replaces every budget in the file. Options of the form KEY=VALUE are replaced key by
    key.
    """
    found = {name: value for name, value in in_file.items() if name not in BUDGETS or not set(BUDGETS) & set(given)}
    for name, value in given.items():
        found[name] = {**found.get(name, {}), **value} if isinstance(value, Mapping) else value
    return found


def write(path: Path, config: TrainConfig) -> None:
    """Write a configuration as TOML, with the help of each option as a comment. Local.

    Raises:
        UsageError: The file cannot be written.
    """
    replace_text(path, to_text(config))


def to_text(config: TrainConfig) -> str:
    """Return a configuration as TOML. An option that has no value becomes a comment."""
    lines, tables = [], []
    for key, name in KEYS.items():
        value, comment = getattr(config, name), f"# {OPTIONS[name].help}"
        if isinstance(value, Mapping):
            tables += ["", comment, f"[{key}]", *(f"{_to_toml_key(k)} = {_to_toml(v)}" for k, v in value.items())]
        elif value is None:
            lines += [comment, f"# {key} ="]
        else:
            if isinstance(value, tuple) and not OPTIONS[name].repeated:
                value = ":".join(f"{part:g}" if isinstance(part, float) else str(part) for part in value)
            lines += [comment, f"{key} = {_to_toml(value)}"]
    return "\n".join([*lines, *tables, ""])


def _to_toml(value: Any) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_to_toml, value))}]"
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _to_toml_key(key: str) -> str:
    is_bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if is_bare else _to_toml(key)
