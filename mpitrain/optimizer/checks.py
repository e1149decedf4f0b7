"""Checks of the arguments of a ``DistributedOptimizer``, when it is created and while it is used."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from mpitrain.algorithms.base.method import Method
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError
from mpitrain.optimizer.module_state import state_tensors

TOO_LATE_FOR_GROUPS = "add the parameter group to the base optimizer, before the DistributedOptimizer is made"
OTHER_PARAMETERS = (
    "the base optimizer's groups hold other parameters than when the DistributedOptimizer was made: "
    "close() it, and make another one"
)

FROZEN_TOO_LATE = (
    "requires_grad was set to False after the DistributedOptimizer was made, but {} makes the update itself and would "
    "still change the parameter: put it into a parameter group of its own and set its learning rate to 0 (with "
    "allreduce, node_shared=False leaves it out)"
)


def check_kinds(base: object, model: object, method: object) -> None:
    """Check the types of the arguments. Local.

    Raises:
        UsageError: An argument has the wrong type; the message names the right one.
    """
    if isinstance(base, torch.nn.Module) or isinstance(model, torch.optim.Optimizer):
        raise UsageError("the base optimizer comes first, then the model: DistributedOptimizer(base, model, method)")
    if not isinstance(base, torch.optim.Optimizer):
        raise UsageError(f"base must be a torch optimizer such as torch.optim.SGD(...), not {_short(base)}")
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"model must be a torch.nn.Module, not {_short(model)}")
    if not isinstance(method, Method):
        raise UsageError(f"method must be a Method such as mpitrain.EASGD(), not {_short(method)}")


def _short(value: object) -> str:
    return f"the class {value.__name__}: write {value.__name__}()" if isinstance(value, type) else f"{value!r:.60}"


def check_base(base: torch.optim.Optimizer, model: torch.nn.Module, method: Method) -> None:
    """Refuse a base optimizer that does not fit the model or the method. Local.

    Raises:
        UsageError: The message names a base optimizer that fits.
    """
    of_model = {id(p) for p in model.parameters()}
    if any(id(p) not in of_model for p in _parameters(base)):
        raise UsageError("the base optimizer holds parameters the model does not have: make it from model.parameters()")
    if isinstance(base, torch.optim.SparseAdam):
        raise UsageError(
            "SparseAdam needs sparse gradients, which DistributedOptimizer converts to dense ones: use torch.optim.Adam"
        )
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UsageError(
            f"{type(base).__name__} computes several gradients per step, but DistributedOptimizer exchanges one: "
            "use an optimizer that works without a closure, e.g. torch.optim.SGD"
        )
    if not method.owns_update:
        return
    is_plain = all(not group.get("momentum") and not group.get("maximize") for group in base.param_groups)
    if not isinstance(base, torch.optim.SGD) or not is_plain:
        raise UsageError(
            f"{method.name} makes the update itself: pass torch.optim.SGD(..., momentum=0) as the base optimizer, "
            f"and the momentum to {type(method).__name__}(momentum=...)"
        )


def check_unshared(base: torch.optim.Optimizer, in_use: Iterable[torch.nn.Parameter]) -> None:
    """Refuse parameters that another DistributedOptimizer has moved into its flat vector. Local.

    Raises:
        UsageError: The message says how to release them.
    """
    own = {id(p) for p in _parameters(base)}
    if any(id(p) in own for p in in_use):
        raise UsageError(
            "another DistributedOptimizer already has these parameters: close() it first, "
            "and create the new one from the torch optimizer"
        )


def check_memory(base: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Refuse trainable parameters that share memory with another parameter or with a buffer. Local.

    Such tensors would no longer share memory after the optimizer has moved each parameter into its flat vector.

    Raises:
        UsageError: The message says how to tie parameters instead.
    """
    moved = {id(parameter) for parameter in _parameters(base) if parameter.requires_grad}
    placed = [(*_extent(tensor), name, tensor) for name, tensor in state_tensors(model) if _is_in_memory(tensor)]
    placed.sort(key=lambda place: place[:2])
    for (_, stop, first, a), (start, _, second, b) in pairwise(placed):
        if start < stop and (id(a) in moved or id(b) in moved):
            raise UsageError(
                f"{first} and {second} share memory, which the DistributedOptimizer would part: tie them by making "
                "them one parameter (one.weight = other.weight), or clone() one of them"
            )


def _is_in_memory(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.numel() > 0 and not tensor.is_meta


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first address of a tensor's elements and the one after the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_device(parameters: Iterable[torch.nn.Parameter], world: World) -> None:
    """Refuse parameters that are not on this rank's GPU. Local.

    Raises:
        UsageError: The message says how to move them.
    """
    wanted = torch.device(world.device)
    other = next((p.device for p in parameters if p.device != wanted), None)
    if world.gpu is not None and other is not None:
        raise UsageError(f"the model is on {other} and this rank on {wanted}: call model.to(world.device) first")


class FrozenParameters:
    """The parameters that do not require a gradient when the DistributedOptimizer is created.

    They are not part of the flat vector that is exchanged.

    Args:
        base: The base optimizer. Old gradients of its frozen parameters are removed, since ``base.step()`` would use
            them.
        model: The model, for the names of the parameters.
    """

    def __init__(self, base: torch.optim.Optimizer, model: torch.nn.Module) -> None:
        self._model = model
        self._frozen = [p for p in _parameters(base) if not p.requires_grad]
        for parameter in self._frozen:
            parameter.grad = None

    def check(self) -> None:
        """Check that no frozen parameter has become trainable, since no rank would exchange it.

        Raises:
            UsageError: A frozen parameter has become trainable.
        """
        for parameter in self._frozen:
            if parameter.requires_grad:
                names = (name for name, known in self._model.named_parameters() if known is parameter)
                raise UsageError(
                    f"the parameter {next(names, '')} requires a gradient but did not when the DistributedOptimizer "
                    "was created, so it is not exchanged: set requires_grad=True before, and keep the parameter fixed "
                    "by a parameter group of its own with learning rate 0"
                )


class KnownParameters:
    """The parameters that a model has when the DistributedOptimizer is created.

    Args:
        model: The model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self._known = model, {id(parameter) for parameter in model.parameters()}
        self._n_steps = 0

    def check_sometimes(self) -> None:
        """Call ``check``, but only in steps 1, 2, 4, 8, ..., because it takes milliseconds."""
        self._n_steps += 1
        if self._n_steps & (self._n_steps - 1) == 0:
            self.check()

    def check(self) -> None:
        """Check that the model has no new trainable parameters, because they would not be exchanged.

        ``load_state_dict(assign=True)`` and new layers add parameters.

        Raises:
            UsageError: There is a new parameter; the message names it and a remedy.
        """
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and id(parameter) not in self._known:
                raise UsageError(
                    f"the model has a parameter {name} that it did not have when the DistributedOptimizer was made, "
                    "and that is not exchanged: complete the model before, and load weights without assign=True"
                )


class DirectStepGuard:
    """A hook that warns once when the base optimizer is stepped directly.

    Args:
        base: The base optimizer, on which the hook is installed until ``stop``.
    """

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._is_silent = False
        self._hook = base.register_step_post_hook(self)

    def __call__(self, base: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Handle a step of the optimizer."""
        if not self._is_silent:
            self._is_silent = True
            warnings.warn(
                f"{type(base).__name__}.step() was called: it updates this rank alone and exchanges nothing; "
                "call step() of the DistributedOptimizer instead",
                stacklevel=3,
            )

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Suspend the warning inside the block, where the DistributedOptimizer itself steps the base optimizer."""
        before, self._is_silent = self._is_silent, True
        try:
            yield
        finally:
            self._is_silent = before

    def stop(self) -> None:
        """Remove the hook."""
        self._hook.remove()


def _has_own_step(base: torch.optim.Optimizer) -> bool:
    """Return whether ``base.step`` is that of its class; a scheduler may have wrapped it to count calls."""
    step = vars(base).get("step")
    if step is None:
        return True
    return hasattr(step, "_wrapped_by_lr_sched") and getattr(step, "__wrapped__", None) is type(base).step


def has_hooks(base: torch.optim.Optimizer) -> bool:
    """Return whether ``base`` has hooks on its step, or a ``step`` that was replaced on this object."""
    post = base._optimizer_step_post_hooks.values()
    is_ours = all(isinstance(hook, DirectStepGuard) for hook in post)
    return bool(base._optimizer_step_pre_hooks) or not is_ours or not _has_own_step(base)


def _parameters(base: torch.optim.Optimizer) -> Iterator[torch.nn.Parameter]:
    return (parameter for group in base.param_groups for parameter in group["params"])
