"""Models by name, with equal initial weights on every rank."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mpitrain.data.sampler import torch_seed
from mpitrain.errors import UsageError, unknown
from mpitrain.models.batchnorm import has_batchnorm, reestimate
from mpitrain.models.cnn7 import CNN7
from mpitrain.models.imported import imported
from mpitrain.models.mlp import MLP
from mpitrain.models.resnet import ResNet20

__all__ = ["MODELS", "build", "has_batchnorm", "reestimate"]

# A model is called with shape, n_classes and the arguments that its `read_options` parses from the text after a colon.
MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "cnn7": CNN7, "resnet20": ResNet20}


def build(name: str, *, shape: tuple[int, ...], n_classes: int, seed: int) -> nn.Module:
    """Build a model. Local.

    Equal arguments give equal weights on all ranks. The global random state does not change.

    Args:
        name: A name in `MODELS`, possibly with options, such as `mlp:hidden=256x128`. It can also be `module:function`,
            a function or class that is imported, also from the working directory. The function is called with those of
            the arguments shape, n_classes and seed that it accepts.
        shape: The shape of one input: (C, H, W) or (d,).
        n_classes: The number of outputs.
        seed: The seed of the initial weights.

    Raises:
        UsageError: The model does not exist, or cannot be built with these arguments.
    """
    head, _, rest = name.partition(":")
    function: Callable[..., Any]
    if head in MODELS:
        function = MODELS[head]
        arguments: dict[str, Any] = {"shape": shape, "n_classes": n_classes}
        if rest:
            read_options = getattr(function, "read_options", None)
            if read_options is None:
                raise UsageError(f"{head} takes no options, but was given '{rest}': write {head}")
            arguments |= read_options(rest)
    elif rest:
        function = imported("model", name, otherwise=f"use one of {', '.join(MODELS)}")
        arguments = _accepted(name, function, {"shape": shape, "n_classes": n_classes, "seed": seed})
    else:
        raise UsageError(unknown("model", name, MODELS, otherwise="module:function for your own model"))
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed GPUs, whose state fork_rng does not restore here
        torch.default_generator.manual_seed(torch_seed(seed))
        model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} returned a {type(model).__name__}, not a torch.nn.Module: return the model")
    return model


def _accepted(name: str, function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Return those of the offered arguments that the function takes by keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:  # implemented in C
        raise UsageError(f"{name} has no inspectable signature: wrap it in a Python function") from error
    by_keyword = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for p in parameters:
        required = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if required and not (p.name in by_keyword and p.name in offered):
            raise UsageError(
                f"{name} requires '{p.name}', but only {', '.join(offered)} are passed: give '{p.name}' a default"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    return {key: value for key, value in offered.items() if key in by_keyword}
