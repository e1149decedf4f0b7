"""A new run that begins with the model of another run or of a file: ``--init-from RUN|FILE``."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpitrain.collectives.world.survivor_collectives import broadcast
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError, reason
from mpitrain.optimizer.layout import ALIGN_BYTES
from mpitrain.optimizer.rescaled_state import Parts
from mpitrain.optimizer.state import as_array
from mpitrain.records import checkpoint
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.plan import RunPlan
from mpitrain.trainer.rescaled import OptimizerStates

Tensors = Mapping[str, torch.Tensor]

WRAPPED_IN = ("model", "state_dict", "model_state_dict")
"""The names under which scripts save the ``state_dict`` of a model beside other things."""

WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod)\.")
"""What DistributedDataParallel and ``torch.compile`` put into names."""


def load(source: Path, model: torch.nn.Module, world: World) -> None:
    """Load the parameters and buffers of a run or a file into a model. Collective.

    Rank 0 reads them. ``DistributedOptimizer`` later copies them to all ranks.

    Args:
        source: The folder of a run, or a file with a ``state_dict`` in the format of torch or safetensors. From a
            finished run, the model evaluated at the end is loaded; from an unfinished run, the model of the newest
            checkpoint.
        model: The model.
        world: The ranks.

    Raises:
        UsageError: ``source`` cannot be read, or belongs to another model. All ranks raise it.
    """

    def problem() -> str:
        try:
            is_run = source.is_dir()
            fill(model, _of_run(source) if is_run else _of_file(source), str(source), leaves_frozen=is_run)
        except UsageError as error:
            return str(error)
        return ""

    if text := broadcast(world, problem):
        raise UsageError(f"--init-from {text}", on_all_ranks=True)


def fill(model: torch.nn.Module, values: Tensors, source: str, *, leaves_frozen: bool = False) -> None:
    """Copy tensors into the parameters and buffers of a model. Local.

    Args:
        model: The model.
        values: The tensors by name. The prefixes of wrappers (``module.``, ``_orig_mod.``) are ignored.
        source: The origin of the tensors, for messages.
        leaves_frozen: Whether parameters that are not trained may be missing.

    Raises:
        UsageError: A name is missing or unknown, a shape differs, or a tensor is not finite. The model is unchanged.
    """
    given = {WRAPPERS.sub("", name): value for name, value in values.items()}
    wanted = {WRAPPERS.sub("", name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    left = {name for name, tensor in wanted.items() if leaves_frozen and name not in given and _is_frozen(tensor)}
    present = {id(wanted[name]) for name in given if name in wanted}
    left |= {name for name, tensor in wanted.items() if name not in given and id(tensor) in present}  # tied weights
    for name in (*wanted, *given):
        if name in left:
            continue
        there, here = _shape(given.get(name)), _shape(wanted.get(name))
        if there != here:
            raise UsageError(f"{source}: {name} is {there} there and {here} in this model: it holds another model")
        if not given[name].isfinite().all():
            raise UsageError(f"{source}: {name} has values that are not finite")
    with torch.no_grad():
        for name, tensor in wanted.items():
            if name not in left:
                tensor.copy_(given[name])


def _is_frozen(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad


def _shape(tensor: torch.Tensor | None) -> object:
    return "absent" if tensor is None else tuple(tensor.shape)


def _of_file(path: Path) -> Tensors:
    """Return the ``state_dict`` in a file.

    Raises:
        UsageError: There is none.
    """
    try:
        found = _of_safetensors(path) if path.suffix == ".safetensors" else _of_torch(path)
    except UsageError:
        raise
    except Exception as error:  # of any type, as the reader raises them
        raise UsageError(f"{path} cannot be read as a model ({type(error).__name__}: {reason(error)})") from error
    if not isinstance(found, Mapping) or not found or not all(isinstance(x, torch.Tensor) for x in found.values()):
        raise UsageError(f"{path} holds no state_dict: save one with torch.save(model.state_dict(), FILE)")
    return {str(name): value for name, value in found.items()}


def _of_torch(path: Path) -> Any:
    found = torch.load(path, map_location="cpu", weights_only=True)
    for name in WRAPPED_IN:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            return found[name]
    return found


def _of_safetensors(path: Path) -> Tensors:
    try:
        load_file = importlib.import_module("safetensors.torch").load_file
    except ImportError:
        raise UsageError(f"{path}: reading this format needs a package: pip install safetensors") from None
    found: Tensors = load_file(path)
    return found


def _of_run(folder: Path) -> Tensors:
    """Return parameters and buffers of a run's newest checkpoint.

    Raises:
        UsageError: It is no run, or has no checkpoint that can be read.
    """
    parts = checkpoint.newest_parts(folder / "checkpoints")
    states, last = OptimizerStates(parts), parts[0]
    vector = last.get("consensus")
    if vector is None:
        method = RunPlan.of(TrainConfig.of_run(folder)).method
        vector = method.common_start(Parts(states, int(states[0]["replica_size"]), as_array))
    dtype = as_array(states[0]["parameters"]).dtype
    values = dict(unflatten(np.asarray(as_array(vector)), str(states[0]["layout"]).split("\n"), dtype.itemsize))
    return {**values, **last["buffers"]}


def unflatten(vector: np.ndarray, layout: Iterable[str], itemsize: int) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield name and value of each parameter in a vector (n,), as ``optimizer.layout`` places them.

    Args:
        vector: The vector.
        layout: Name and shape of each parameter, in order: ``weight (3, 4)``.
        itemsize: The number of bytes of an element in the run; the alignment of parameters depends on this size.
    """
    align, begin = max(ALIGN_BYTES // itemsize, 1), 0
    for line in layout:
        name, _, text = line.rpartition(" (")
        shape = tuple(int(number) for number in re.findall(r"\d+", text))
        n = math.prod(shape)
        yield name, torch.from_numpy(vector[begin : begin + n].astype(np.float64)).reshape(shape)
        begin += -(-n // align) * align
