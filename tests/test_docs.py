"""The documentation: code compiles or runs, commands are understood, links lead somewhere, the site builds."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpitrain.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "jobs/README.md"))]
)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LAUNCHER = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:(?:jobs/local\.sh|mpirun -n|srun -n) \d+ (?:--\S+(?: ulfm)? )*)?")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(language: str) -> Iterator[Any]:
    """Yield the code blocks of a language in all pages."""
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            if match[2] == language:
                line = text.count("\n", 0, match.start()) + 2
                yield pytest.param(textwrap.dedent(match[3]), id=f"{name(page)}:{line}")


def commands() -> Iterator[Any]:
    """Yield the commands of all blocks without a language, each as its words without the launcher and the comment."""
    for parameter in blocks(""):
        (block,) = parameter.values
        page, _, line = str(parameter.id).rpartition(":")
        joined = block.replace("\\\n", " " * 2)
        for k, text in enumerate(joined.splitlines()):
            command = LAUNCHER.sub("", text.strip())
            if re.match(r"(mpitrain|python|make|sbatch|jobs/\S+\.sh) ", command):
                yield pytest.param(shlex.split(command, comments=True), id=f"{page}:{int(line) + k}")


@pytest.mark.parametrize("code", list(blocks("python")))
def test_python_compiles(code: str) -> None:
    is_entry_of_a_dict = re.match(r'"\w+":', code) is not None
    compile(f"{{{code}}}" if is_entry_of_a_dict else code, "block", "exec")


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_is_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *rest = words
    if program == "mpitrain" and rest[0] in cli.COMMANDS:
        ran = []
        monkeypatch.setattr(
            importlib.import_module(f"mpitrain.cli.{rest[0]}"), "run", lambda args: ran.append(args) or 0
        )
        assert cli.main(rest) == 0
        assert ran
    elif program == "mpitrain":
        assert rest in (["--version"], ["--help"])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in rest if "=" not in word and word not in targets] == []
    elif program == "sbatch" or program.endswith(".sh"):
        scripts = [word for word in words if word.startswith("jobs/")]
        assert scripts
        assert [word for word in scripts if not (ROOT / word).exists()] == []
    elif rest[0] == "benchmarks/compare.py":
        from benchmarks.comparison import plan

        assert plan.configurations(plan.parser().parse_args(rest[1:]))
    elif rest[0] == "-m":
        assert rest[1] in ("venv", "pip", "pytest") or importlib.util.find_spec(rest[1]) is not None
    else:
        assert rest[0] in ("train.py", "-c") or (ROOT / rest[0]).exists()


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^()\s]+)\)", FENCE.sub("", page.read_text())):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert missing == []


def ours() -> list[Any]:
    page = "docs/coming-from.md"
    return [
        parameter for parameter in blocks("python") if page in str(parameter.id) and "mpitrain" in parameter.values[0]
    ]


@pytest.mark.parametrize("code", ours())
def test_a_script_from_another_library_runs_with_mpitrain(code: str) -> None:
    """Every block trains: in one process it is a world of one rank."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    x, y = torch.randn(8, 4), torch.randint(2, (8,))
    before = torch.nn.functional.cross_entropy(model(x), y).item()
    names = {
        "model": model,
        "base": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": torch.nn.functional.cross_entropy,
        "loader": [(x, y)] * 40,
    }
    exec(compile(code, "block", "exec"), names)
    assert torch.nn.functional.cross_entropy(model(x), y).item() < before


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make site`` builds it: each warning is an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_the_site_has_a_page_for_every_method_with_its_curve(site: Path) -> None:
    from mpitrain.algorithms import METHODS

    for method in METHODS:
        page = (site / "methods" / f"{method}.html").read_text()
        assert f'src="{method}.svg"' in page
        assert "<svg" in (site / "methods" / f"{method}.svg").read_text()


def test_the_site_has_every_public_name(site: Path) -> None:
    import mpitrain

    text = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    homes = {**mpitrain._HOME_OF, "UsageError": "mpitrain.errors"}
    renamed = {"reestimate_batchnorm": "reestimate"}
    missing = [name for name, home in homes.items() if f'id="{home}.{renamed.get(name, name)}"' not in text]
    assert missing == []


def test_the_site_asks_no_other_server_for_anything(site: Path) -> None:
    """Scripts, styles, fonts and pictures come with the pages."""
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link)\b[^>]*?(?:src|href)=\"?(https?:[^\s\">]+)", page.read_text())
        assert [address for address in loaded if "canonical" not in address] == [], page
