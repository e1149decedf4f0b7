"""Hooks of MkDocs: pages that are made from files outside docs/, and links between the two.

The documentation is written to be read in the repository, where README.md is the first page and a link names a file. On
the site, README.md is the home page, each method has a page of its own, and the examples are pages.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import posixpath
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
SITE = "docs/site"

# Files outside docs/ that become pages: path in the repository -> path on the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "jobs/README.md": "jobs.md",
}
METHODS = "docs/methods.md"
LINK = re.compile(r"(?<!!)\[(?P<text>[^\[\]]+)\]\((?P<target>[^()\s]+)\)")
FENCE = re.compile(r"^( *)(```.*?^\1```)", re.MULTILINE | re.DOTALL)


def example_files() -> list[Path]:
    """Return the scripts and notebooks of examples/ that are pages."""
    return sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb"))


@cache
def site_paths() -> dict[str, str]:
    """Return the path on the site of every file of the repository that is a page."""
    found = dict(PAGES)
    for path in sorted((ROOT / "docs").rglob("*.md")):
        found[path.relative_to(ROOT).as_posix()] = path.relative_to(ROOT / "docs").as_posix()
    for path in example_files():
        found[f"examples/{path.name}"] = f"examples/{path.stem}.md"
    found[METHODS] = "methods/index.md"
    return found


@cache
def page_titles() -> dict[str, str]:
    """Return the title of each page by the names that links use for it: ``docs/gpus.md`` and ``gpus.md``."""
    found = {}
    for path in [*(ROOT / "docs").glob("*.md"), *map(ROOT.joinpath, PAGES)]:
        title = path.read_text().partition("\n")[0].removeprefix("# ")
        found |= {path.name: title, path.relative_to(ROOT).as_posix(): title}
    return found | {"README.md": "overview", "README": "overview"}


def link_on_site(target: str, source: str, page: str) -> str | None:
    """Return where a link leads on the site.

    Args:
        target: The link as it is written.
        source: The file that has the link, relative to the repository.
        page: The page on the site that the file becomes.

    Returns:
        The link relative to `page`; None if it names a file that is not on the site.
    """
    if re.match(r"[a-z]+:", target):
        return target
    path, _, anchor = target.partition("#")
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path)) if path else source
    paths = site_paths()
    if file == METHODS and anchor in methods()[1]:
        place, anchor = f"methods/{anchor}.md", ""
    elif file in paths:
        place = paths[file]
    elif (ROOT / file).exists() and not file.startswith("docs/"):
        return None
    else:
        return target
    link = posixpath.relpath(place, posixpath.dirname(page) or ".")
    return f"{link}#{anchor}" if anchor else link


def rewrite_links(text: str, source: str, page: str) -> str:
    """Return a page with the links that it needs on the site; code is left as it is.

    A link whose text is the name of a page gets the title of the page.
    """
    titles = page_titles()

    def replace(match: re.Match[str]) -> str:
        link = link_on_site(match["target"], source, page)
        text = titles.get(match["text"], match["text"])
        return text if link is None else f"[{text}]({link})"

    parts = FENCE.split(text)  # text, indentation, code, text, ...
    return "".join(LINK.sub(replace, part) if k % 3 == 0 else part for k, part in enumerate(parts))


@cache
def methods() -> tuple[str, dict[str, str]]:
    """Return the introduction of docs/methods.md, and the section of each method."""
    introduction, *sections = re.split(r"^## ", (ROOT / METHODS).read_text(), flags=re.MULTILINE)
    return introduction, {section.partition("\n")[0].strip(): section.partition("\n")[2] for section in sections}


def example_page(path: Path) -> str:
    """Return the page of an example: its docstring, then the script."""
    source = path.read_text()
    title = (ast.get_docstring(ast.parse(source)) or path.stem).partition("\n")[0].rstrip(".")
    return f"# {title}\n\n`examples/{path.name}`\n\n```python\n{source}```\n"


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return the page of a notebook with its outputs, and the pictures of the page by their names."""
    parts, pictures = [], {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(png)
                parts.append(f"![output]({name})")
            elif text := "".join(output.get("text", [])):
                parts.append(f"```text\n{text}```")
    return "\n\n".join(parts) + "\n", pictures


def reference_pages() -> dict[str, str]:
    """Return the pages of the reference: mkdocstrings fills in what `SITE`/reference.yml lists."""
    groups: list[dict[str, Any]] = yaml.safe_load((ROOT / SITE / "reference.yml").read_text())
    pages = {}
    for group in groups:
        objects = "\n\n".join(f"::: {name}" for name in group["objects"])
        pages[f"reference/{group['page']}.md"] = f"# {group['title']}\n\n{group['text']}\n\n{objects}\n"
    return pages


def curve(name: str, curves: dict[str, Any]) -> str:
    """Return an SVG of a method's test loss beside that of all-reduce SGD."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    shown = ["allreduce"] if name == "allreduce" else ["allreduce", name]
    for method, color in zip(shown, ("0.6", "C0"), strict=False):
        run = curves["runs"][method]
        axes.plot(run["gradients"], run["test_loss"], label=method, color=color)
    axes.set(xlabel="gradients of all workers", ylabel="test loss", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    out = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the parts of the navigation that list whole folders."""
    for cached in (site_paths, page_titles, methods):
        cached.cache_clear()  # mkdocs serve builds again in the same process
    groups = yaml.safe_load((ROOT / SITE / "reference.yml").read_text())
    results = sorted(path for path in (ROOT / "docs").glob("*/*.md") if path.parent.name != "site")
    listed: dict[str, list[Any]] = {
        "Examples": [f"examples/{path.stem}.md" for path in example_files()],
        "Methods": ["methods/index.md", *(f"methods/{name}.md" for name in methods()[1])],
        "Reference": [f"reference/{group['page']}.md" for group in groups],
        "Results": [path.relative_to(ROOT / "docs").as_posix() for path in results],
    }
    for part in config.nav or []:
        for title in part:
            part[title] += listed.get(title, [])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose sources are outside docs/."""
    introduction, sections = methods()
    curves = json.loads((ROOT / SITE / "curves.json").read_text())

    def add(page: str, text: str, source: str) -> None:
        files.append(File.generated(config, page, content=rewrite_links(text, source, page)))

    for source, page in PAGES.items():
        add(page, (ROOT / source).read_text(), source)
    for path in sorted((ROOT / "examples").glob("*.py")):
        add(f"examples/{path.stem}.md", example_page(path), f"examples/{path.name}")
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        text, pictures = notebook_page(path)
        add(f"examples/{path.stem}.md", text, f"examples/{path.name}")
        for name, png in pictures.items():
            files.append(File.generated(config, f"examples/{name}", content=png))
    add("methods/index.md", introduction, METHODS)
    for name, section in sections.items():
        picture = f"![The test loss of {name} beside that of all-reduce SGD]({name}.svg)"
        text = f"# {name}\n{section}\n## Example run\n\n{picture}\n\n{curves['caption']}\n"
        add(f"methods/{name}.md", text, METHODS)
        files.append(File.generated(config, f"methods/{name}.svg", content=curve(name, curves)))
    for page, text in reference_pages().items():
        add(page, text, page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of the pages in docs/; those of the other pages have been rewritten."""
    if page.file.generated_by is not None:
        return markdown
    source = os.path.relpath(str(page.file.abs_src_path), ROOT)
    return rewrite_links(markdown, source, page.file.src_uri)
