"""The page about all methods, generated from their declarations, is up to date."""

import json
from pathlib import Path

from mpitrain.algorithms import METHODS, catalogue
from mpitrain.cli.main import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"


def test_the_page_is_current():
    assert PAGE.read_text() == catalogue.markdown(), "run `make docs` and commit docs/methods.md"


def test_every_method_has_its_equations_settings_communication_and_source():
    for name, method in METHODS.items():
        section = catalogue._section(name, method)
        assert "\n    " in section, f"{name}: no equations in the docstring of {method.__module__}"
        assert "Source: " in section
        for text in (method.communication, f"mpitrain.{method.__name__}"):
            assert text in section.replace("\\*", "*")
        for field, row in zip(method().settings(), section.split("|---|---|---|---|")[-1].strip().splitlines()):
            assert row.startswith(f"| `{field}` |")
            assert row.replace("\\|", "").count("|") == 5


def test_the_command_prints_all_in_each_form(capsys):
    for form in ([], ["--markdown"], ["--json"]):
        assert main(["algorithms", *form]) == 0
        printed = capsys.readouterr().out
        assert all(name in printed and method.summary in printed for name, method in METHODS.items())
    assert list(json.loads(printed)) == list(METHODS)
