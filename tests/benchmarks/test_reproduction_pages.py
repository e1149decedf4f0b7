"""The pages of the reproductions and the guide to methods say what the checked-in results say."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from benchmarks.pages import choosing, reproductions
from benchmarks.reproduce.__main__ import QUICK, options_of, scripts

RESULTS = reproductions.results()


def test_every_script_has_a_result_and_every_result_a_script() -> None:
    assert sorted(RESULTS) == scripts()
    assert set(QUICK) <= set(scripts())


@pytest.mark.parametrize("path", reproductions.pages(RESULTS), ids=lambda path: path.stem)
def test_a_page_is_that_of_its_result(path: Path) -> None:
    assert path.read_text() == reproductions.pages(RESULTS)[path], "run make docs"


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_as_expected_and_whole(name: str) -> None:
    result = RESULTS[name]
    assert result["name"] == name
    assert (reproductions.FOLDER / result["figure"]).read_bytes().startswith(b"\x89PNG")
    assert not result["options"].get("quick"), "the page shows a whole run"
    for one in result["criteria"]:
        assert one["passed"] != bool(one.get("contradicts")), one["criterion"]
    page = (reproductions.FOLDER / f"{name}.md").read_text()
    assert page.index("## Criteria") < page.index("## Result")


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_has_the_wording_of_its_script(name: str) -> None:
    """Compare the recorded criteria and reasons with the strings of the script, whose placeholders match anything."""
    known = {
        "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else re.escape(str(node.value))
        for node in ast.walk(ast.parse((reproductions.SCRIPTS / f"{name}.py").read_text()))
        if isinstance(node, ast.Constant | ast.JoinedStr)
    }
    for one in RESULTS[name]["criteria"]:
        for words in filter(None, (one["criterion"], one.get("contradicts"))):
            assert any(len(pattern) > 30 and re.fullmatch(pattern, words) for pattern in known), words


def test_the_guide_has_the_numbers_of_the_results() -> None:
    page = choosing.PAGE.read_text()
    assert choosing.filled(page) == page, "run make docs"
    assert len(page.split()) < 1300, "it is read in five minutes"
    for name in re.findall(r"\(reproductions/(\w+)\.md\)", page):
        assert name in RESULTS


def test_the_guide_changes_with_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    page = choosing.PAGE.read_text()
    changed = json.loads(json.dumps(RESULTS))
    changed["crossover"]["costs"]["base"]["gossip"]["16"][0] *= 1.5
    monkeypatch.setattr(reproductions, "results", lambda: changed)
    assert choosing.filled(page) != page


def test_quick_runs_are_those_of_scripts_that_take_long() -> None:
    assert options_of("leaders", quick=True) == ["--quick"]
    assert options_of("leaders", quick=False) == []
    assert options_of("admm_stability", quick=True) == QUICK["admm_stability"]
    assert options_of("warm_start", quick=True) == []


def test_verdicts_count_contradictions_apart() -> None:
    criteria = [{"passed": True}, {"passed": False}, {"passed": False, "contradicts": "too small"}]
    assert reproductions.verdict({"criteria": criteria}) == ("1 of 3 criteria met, 1 contradicts the paper, 1 missed")
