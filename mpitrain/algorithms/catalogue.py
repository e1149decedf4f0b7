"""The catalogue of the methods, made from their declarations: ``mpitrain algorithms`` and docs/methods.md."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from mpitrain.algorithms import METHODS
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.settings import settings_of

PREFACE = """\
# Methods

`make docs` generates this page from the declarations in `mpitrain/algorithms/`; `mpitrain algorithms` prints the same.

Every method runs under `mpirun` (`mpitrain train --algorithm NAME --set KEY=VALUE`), in your own loop
(`mpitrain.DistributedOptimizer(base, model, mpitrain.CLASS(...))`), in `benchmarks/compare.py` and in
`mpitrain simulate`.

**Symbols.** p workers; x_i the parameters of worker i, v_i its velocity; c the center; g a mini-batch gradient; eta the
learning rate, delta the momentum, alpha = eta*rho the moving rate, tau the period in local steps; n the number of
parameters.

**Exchanged parameters.** Workers exchange the trainable parameters of the optimizer. Buffers, such as the running
statistics of BatchNorm, stay local. Averaged parameters have no statistics of their own, so these are estimated anew
from training data before an evaluation: `mpitrain train` does it; in your own loop call
`mpitrain.reestimate_batchnorm`.

**Learning-rate schedules.** A `moving_rate` stays constant while the learning rate decays; with `rho` it follows,
alpha = eta*rho. Give one of the two.

**Communication** is counted in vectors of n numbers that a worker sends and receives per local step.

**Running averages.** Any method can be combined with a Polyak average or a moving average of its iterates, which is
then evaluated in their place: `--average polyak`, `mpitrain.Average("moving", 0.001)`.
"""

SETTINGS_HEAD = "| setting | default | range | meaning |\n|---|---|---|---|\n"


def catalogue() -> dict[str, dict[str, Any]]:
    """Return the description of each method by its name, as JSON types."""
    return {
        name: {
            "class": method.__name__,
            "summary": method.summary,
            "source": method.source,
            "communication": method.communication,
            "synchronous": method().is_synchronous,
            "owns_update": method.owns_update,
            "needs_loss": method.needs_loss,
            "short_run": dict(method.short_run),
            "learning_rate_factor": method.learning_rate_factor,
            "metrics": list(method.metrics),
            "settings": {
                key: {"default": setting.default, "range": setting.describe(), "help": setting.help}
                for key, setting in settings_of(method).items()
            },
        }
        for name, method in METHODS.items()
    }


def text() -> str:
    """Return the catalogue as text for the terminal."""
    parts: list[str] = []
    for name, method in catalogue().items():
        lines = [f"{name}  ({method['class']})", f"    {method['summary']}", f"    {method['source']}"]
        lines += [
            f"      {key} = {_shown(setting['default'])}   {setting['range']}; {setting['help']}"
            for key, setting in method["settings"].items()
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def markdown() -> str:
    """Return the catalogue as Markdown: the contents of docs/methods.md."""
    methods = catalogue()
    rows = [
        f"| [`{name}`](#{_anchor(name)}) | {method['summary']} | {'yes' if method['synchronous'] else 'no'} "
        f"| {_product(method['communication'])} |"
        for name, method in methods.items()
    ]
    table = "\n".join(["| method | what it does | waits for others | communication |", "|---|---|---|---|", *rows])
    return "\n".join([PREFACE, table, "", *(_section(name, METHODS[name]) for name in methods)])


def _section(name: str, method: type[Method]) -> str:
    declared = catalogue()[name]
    facts = [
        f"- **Class** `mpitrain.{declared['class']}`",
        f"- **Communication** {_product(declared['communication'])}",
        f"- **Waits for other workers** {'yes' if declared['synchronous'] else 'no'}, with the default settings",
    ]
    if declared["owns_update"]:
        facts.append("- **Local update** its own: pass `torch.optim.SGD` without momentum")
    else:
        facts.append("- **Local update** that of any torch optimizer")
    if declared["needs_loss"]:
        facts.append("- **Needs the loss** `optimizer.step(loss)`")
    if declared["metrics"]:
        facts.append(
            f"- **Metrics of each worker** {', '.join(word.replace('_', ' ') for word in declared['metrics'])}"
        )
    if declared["learning_rate_factor"] != 1:
        facts.append(
            f"- **Learning rate** about {declared['learning_rate_factor']:g} times that of SGD with momentum 0.9"
        )
    if declared["short_run"]:
        settings = ", ".join(f"`{key}={_shown(value)}`" for key, value in declared["short_run"].items())
        facts.append(f"- **For a few hundred steps** {settings}")
    rows = [
        f"| `{key}` | {_shown(setting['default'])} | {_cell(setting['range'])} | {_cell(setting['help'])} |"
        for key, setting in declared["settings"].items()
    ]
    settings = SETTINGS_HEAD + "\n".join(rows) if rows else "This method has no settings."
    module = inspect.cleandoc(sys.modules[method.__module__].__doc__ or "")
    words = [_in_markdown(text) for text in (module, _first_part(method))]
    return "\n\n".join([f"## {name}", *words, "\n".join(facts), settings]) + "\n"


def _first_part(method: type[Method]) -> str:
    """Return the docstring of the class up to its list of arguments."""
    paragraphs = inspect.cleandoc(method.__doc__ or "").split("\n\n")
    fields = []
    for paragraph in paragraphs:
        if paragraph.startswith(("Args:", "Example:", "Attributes:", "Raises:")):
            break
        fields.append(paragraph)
    if fields[-1].endswith(", and:"):  # "The arguments are those of ..., and:"
        fields.pop()
    return "\n\n".join(fields)


def _in_markdown(text: str) -> str:
    """Return a docstring as Markdown: equations stay as they are, an asterisk in a sentence is a product."""
    paragraphs = [
        paragraph if paragraph.startswith("    ") else re.sub(r"::$", ":", _product(paragraph))
        for paragraph in text.split("\n\n")
    ]
    return "\n\n".join(paragraphs)


def _product(words: str) -> str:
    """Escape the asterisks of products outside code, which Markdown would take for emphasis."""
    parts = re.split(r"(`+[^`]+`+)", words)
    return "".join(part if k % 2 else re.sub(r"(?<=\S)\*(?=\S)", r"\\*", part) for k, part in enumerate(parts))


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _cell(words: str) -> str:
    return _product(words).replace("|", "\\|")
