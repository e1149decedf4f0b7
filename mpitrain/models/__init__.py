"""Models by name, with equal initial weights on every rank."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mpitrain.algorithms.base.settings import literal, settings_taken
from mpitrain.data.option_parsing import positive
from mpitrain.data.sampler import torch_seed
from mpitrain.errors import UsageError, unknown
from mpitrain.models.batchnorm import has_batchnorm, reestimate
from mpitrain.models.cnn7 import CNN7
from mpitrain.models.gpt import GPT
from mpitrain.models.imported import imported
from mpitrain.models.mlp import MLP
from mpitrain.models.resnet import ResNet20

__all__ = ["MODELS", "build", "context_of", "has_batchnorm", "reestimate"]

# A model is called with shape, n_classes and the arguments that its `read_options` parses from the text after a colon.
MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "cnn7": CNN7, "resnet20": ResNet20, "gpt": GPT}

DEFAULT_CONTEXT = 128
CONTEXT = "context"


def build(
    name: str,
    *,
    shape: tuple[int, ...],
    n_classes: int,
    seed: int,
    settings: Mapping[str, str] | None = None,
    on_tokens: bool = False,
) -> nn.Module:
    """Build a model. Local.

    Equal arguments give equal weights on all ranks. The global random state does not change.

    Args:
        name: A name in `MODELS`, possibly with options, such as `mlp:hidden=256x128`. It can also be `module:function`,
            a function or class that is imported, also from the working directory. The function is called with those of
            the arguments shape, n_classes and seed that it accepts, and with the settings.
        shape: The shape of one input: (C, H, W), (d,), or (T,) tokens.
        n_classes: The number of outputs.
        seed: The seed of the initial weights.
        settings: Options of the model as texts.
        on_tokens: Whether inputs are tokens of a text.

    Raises:
        UsageError: The model does not exist, or cannot be built with these arguments.
    """
    head, _, rest = name.partition(":")
    settings = settings or {}
    function: Callable[..., Any]
    if head in MODELS:
        function = MODELS[head]
        _check_inputs(head, function, on_tokens)
        arguments: dict[str, Any] = {"shape": shape, "n_classes": n_classes, **_options(head, rest, settings)}
    elif rest:
        function = imported("model", name, otherwise=f"use one of {', '.join(MODELS)}")
        arguments = _accepted(name, function, {"shape": shape, "n_classes": n_classes, "seed": seed})
        given = {key: literal(value) for key, value in settings.items()}
        if on_tokens and CONTEXT not in _keywords(function):
            given.pop(CONTEXT, None)  # it is the length of a sample, which the shape says
        arguments |= settings_taken(function, name, given)
    else:
        raise UsageError(unknown("model", name, MODELS, otherwise="module:function for your own model"))
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed GPUs, whose state fork_rng does not restore here
        torch.default_generator.manual_seed(torch_seed(seed))
        model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} returned a {type(model).__name__}, not a torch.nn.Module: return the model")
    return model


def context_of(name: str, settings: Mapping[str, str]) -> int:
    """Return the number of tokens of a sample of text: the setting ``context`` of the model, or 128.

    Raises:
        UsageError: It is not a whole number above 0.
    """
    head, _, rest = name.partition(":")
    if head == "gpt":
        return int(_options(head, rest, settings).get(CONTEXT, DEFAULT_CONTEXT))
    try:
        return positive(settings[CONTEXT]) if CONTEXT in settings else DEFAULT_CONTEXT
    except ValueError as error:
        raise UsageError(f"--model-set {CONTEXT}={settings[CONTEXT]}: {error}") from error


def _options(head: str, rest: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of a model of this package from the text after its colon and from its settings."""
    text = ",".join([*([rest] if rest else []), *(f"{key}={value}" for key, value in settings.items())])
    if not text:
        return {}
    read_options = getattr(MODELS[head], "read_options", None)
    if read_options is None:
        raise UsageError(f"{head} takes no options, but was given '{text}': write {head}")
    found: dict[str, Any] = read_options(text)
    return found


def _check_inputs(head: str, function: Callable[..., Any], on_tokens: bool) -> None:
    """Raise `UsageError` if a model for text gets numbers, or another model gets text."""
    takes_tokens = getattr(function, "takes_tokens", False)
    if on_tokens and not takes_tokens:
        raise UsageError(f"{head} cannot read text: use --model gpt, or module:function for a model of your own")
    if takes_tokens and not on_tokens:
        raise UsageError(f"{head} reads text: use --data python-text, or a file of 'mpitrain data import text'")


def _keywords(function: Callable[..., Any]) -> set[str]:
    """Return the names of the arguments that a function takes by keyword."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _accepted(name: str, function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Return those of the offered arguments that the function takes by keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:  # implemented in C
        raise UsageError(f"{name} has no inspectable signature: wrap it in a Python function") from error
    by_keyword = _keywords(function)
    for p in parameters:
        required = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if required and not (p.name in by_keyword and p.name in offered):
            raise UsageError(
                f"{name} requires '{p.name}', but only {', '.join(offered)} are passed: give '{p.name}' a default"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    return {key: value for key, value in offered.items() if key in by_keyword}
