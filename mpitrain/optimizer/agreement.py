"""The settings of a ``DistributedOptimizer`` that all ranks must share, compared when it is created."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mpitrain.algorithms.base.method import Method
from mpitrain.collectives.world.agreement import differences, require_equal
from mpitrain.collectives.world.world import World
from mpitrain.log import logger

IMPLEMENTATION = ("params", "foreach", "fused", "capturable", "differentiable", "initial_lr")
"""Entries of a parameter group that do not change what a step computes."""


def check_equal(
    base: torch.optim.Optimizer, model: torch.nn.Module, method: Method, world: World, options: Mapping[str, Any]
) -> None:
    """Compare method, model and optimizer of all ranks. Collective.

    The values of the parameters may differ, because all ranks start with those of rank 0. The learning rates and the
    other settings of the parameter groups must be equal if ``Method.needs_equal_updates``. Otherwise rank 0 only warns
    of a difference.

    Args:
        base, model, method: The base optimizer, the model and the method of this rank.
        world: All ranks.
        options: Other arguments that must be equal, by name.

    Raises:
        UsageError: The ranks differ. All ranks raise it; the message names the first difference.
    """
    settings = {**_of_method(method), **{name: str(value) for name, value in options.items()}, **_of_model(base, model)}
    numbers = dict(_of_groups(base))

    def gather(value: Any) -> list[Any]:
        found: list[Any] = world.run_on_survivors(lambda comm: comm.allgather(value))
        return found

    if method.needs_equal_updates:
        settings |= numbers
    remedy = "create the same model, base optimizer and method on every rank"
    require_equal(gather, world.rank, settings, remedy=remedy)
    if method.needs_equal_updates:
        return
    found = differences(gather, world.rank, numbers)
    if found and world.rank == 0:
        listed = "; ".join(f"{name} is {values}" for name, values in found.items())
        logger.warning("%s: %s allows it, but is it meant?", listed, method.name)


def _of_method(method: Method) -> dict[str, str]:
    settings = {f"{field.name} of {method.name}": field.name for field in dataclasses.fields(method)}
    return {"the method": method.name, **{name: _text(getattr(method, key)) for name, key in settings.items()}}


def _of_model(base: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, str]:
    """Return shapes and types of everything that is broadcast or exchanged, and the places of parameters."""
    settings = {"the base optimizer": type(base).__name__}
    settings["the number of parameter groups"] = str(len(base.param_groups))
    names = {id(p): name for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        settings[f"parameter {name}"] = f"{_shape(parameter)} {_kind(parameter)}"
    for name, buffer in model.named_buffers():
        settings[f"buffer {name}"] = _shape(buffer)
    for k, group in enumerate(base.param_groups):
        for i, parameter in enumerate(group["params"]):
            settings[f"number {i} of parameter group {k}"] = f"{names[id(parameter)]} ({_kind(parameter)})"
    return settings


def _of_groups(base: torch.optim.Optimizer) -> Iterator[tuple[str, str]]:
    for k, group in enumerate(base.param_groups):
        for name, value in group.items():
            if name not in IMPLEMENTATION:
                yield f"{name} of parameter group {k}", _text(value)


def _shape(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _kind(parameter: torch.nn.Parameter) -> str:
    return "trainable" if parameter.requires_grad else "frozen"


def _text(value: Any) -> str:
    """Return a value as text; a tensor of one element, as a learning rate may be, as its number."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return f"{value!r}"
