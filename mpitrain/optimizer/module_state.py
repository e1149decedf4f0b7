"""The state of a module besides its trained parameters: buffers, and attributes that are tensors or numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mpitrain.errors import UsageError

ModuleState = Mapping[str, Mapping[str, Any]]
"""``buffers`` and ``attributes``, by their full names."""

_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))
_SIMPLE = (bool, int, float, str)


def state_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the tensor of every parameter and buffer, including buffers that ``state_dict`` omits."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def snapshot(model: torch.nn.Module) -> ModuleState:
    """Return a copy of a model's buffers, and of the tensors, numbers and strings among its modules' attributes."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    attributes = {
        f"{prefix}.{name}".lstrip("."): value.detach().clone() if isinstance(value, torch.Tensor) else value
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in _OF_EVERY_MODULE and isinstance(value, (torch.Tensor, *_SIMPLE))
    }
    return {"buffers": buffers, "attributes": attributes}


def restore(model: torch.nn.Module, state: ModuleState) -> None:
    """Set the buffers and attributes of a model to those in the snapshot of a model with the same modules."""
    for name, buffer in state["buffers"].items():
        module, own = _place(model, name)
        module.register_buffer(own, buffer.clone(), persistent=own not in module._non_persistent_buffers_set)
    for name, value in state["attributes"].items():
        module, own = _place(model, name)
        setattr(module, own, value.clone() if isinstance(value, torch.Tensor) else value)


def _place(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    prefix, _, own = name.rpartition(".")
    return model.get_submodule(prefix), own


def copy_with(model: torch.nn.Module, parameters: Mapping[torch.nn.Parameter, torch.nn.Parameter]) -> torch.nn.Module:
    """Return a deep copy of a model in which some parameters are replaced.

    Tensors that the last forward pass has left in the modules are copied without their ``grad_fn``.

    Raises:
        UsageError: The model holds an object that cannot be copied.
    """
    memo: dict[int, Any] = {id(ours): theirs for ours, theirs in parameters.items()}
    for module in model.modules():
        for tensor in _tensors(vars(module)):
            if tensor.grad_fn is not None:
                memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # a module may hold anything
        raise UsageError(
            f"the model cannot be copied for an evaluation ({type(error).__name__}: {error}): give the module that "
            "holds it a method __deepcopy__"
        ) from error


def _tensors(value: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, dict | list | tuple | set):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth - 1)
