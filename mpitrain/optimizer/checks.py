"""What can be wrong with what a ``DistributedOptimizer`` is given, said before anything is made of it.

And what is wrong where the optimizer that it is made from makes steps by itself.
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch

from mpitrain.algorithms.base.method import Method
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError


def check_kinds(base: object, model: object, method: object) -> None:
    """Refuse arguments that are something else than what their places are for. Local.

    Raises:
        UsageError: With what would be right.
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
        UsageError: With what would be right.
    """
    of_model = {id(p) for p in model.parameters()}
    if any(id(p) not in of_model for group in base.param_groups for p in group["params"]):
        raise UsageError("the base optimizer holds parameters the model does not have: make it from model.parameters()")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UsageError(
            f"{type(base).__name__} computes several gradients in a step, and a step here exchanges one: "
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


def check_alike(base: torch.optim.Optimizer, model: torch.nn.Module, method: Method, world: World) -> None:
    """Refuse models that differ between ranks in more than their values. Collective.

    Raises:
        UsageError: On all ranks, with the first difference between rank 0 and the first rank that differs from it.
    """
    parts = list(_described(base, model, method))
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    digests = world.run_on_survivors(lambda comm: comm.allgather((world.rank, digest)))
    first, wanted = digests[0]
    other = next((rank for rank, found in digests if found != wanted), None)
    if other is None:
        return
    described = world.run_on_survivors(
        lambda comm: dict(comm.allgather((world.rank, parts if world.rank in (first, other) else [])))
    )
    raise UsageError(_difference(described[first], described[other], first, other))


class DirectStepGuard:
    """Warns, once, when a base optimizer makes a step that its DistributedOptimizer did not ask for.

    Args:
        base: Has this as a hook until ``stop``.
    """

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._is_silent = False
        self._hook = base.register_step_post_hook(self)

    def __call__(self, base: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """A step was made."""
        if not self._is_silent:
            self._is_silent = True
            warnings.warn(
                f"{type(base).__name__}.step() was called: it updates this rank alone and exchanges nothing; "
                "call step() of the DistributedOptimizer instead",
                stacklevel=3,
            )

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, steps are those of the DistributedOptimizer."""
        before, self._is_silent = self._is_silent, True
        try:
            yield
        finally:
            self._is_silent = before

    def stop(self) -> None:
        """The optimizer is its user's again."""
        self._hook.remove()


def _described(base: torch.optim.Optimizer, model: torch.nn.Module, method: Method) -> Iterator[str]:
    """Everything that must be the same on all ranks, in order: what is broadcast, and what is exchanged."""
    yield f"the method is {method.name}"
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            yield f"{name} is {tuple(tensor.shape)} {tensor.dtype}"
    names = {id(p): name for name, p in model.named_parameters()}
    for k, group in enumerate(base.param_groups):
        for parameter in group["params"]:
            kind = "trainable" if parameter.requires_grad else "frozen"
            yield f"{names[id(parameter)]} is {kind} in parameter group {k}"


def _difference(a: Sequence[str], b: Sequence[str], rank_a: int, rank_b: int) -> str:
    here, there = next(pair for pair in zip_longest(a, b, fillvalue="there is no more") if pair[0] != pair[1])
    return (
        f"the model differs between ranks: {here} on rank {rank_a}, and {there} on rank {rank_b}; "
        "make the same model and the same base optimizer on every rank"
    )
