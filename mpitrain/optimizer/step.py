"""One step of a rank: gradients, exchange, local update, and the repair of non-finite values."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import is_
from typing import Any, Protocol

import torch

from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import ParamGroupSlice
from mpitrain.collectives.world.watchdog import watchdog
from mpitrain.errors import UsageError
from mpitrain.log import ANY_RANK, logger
from mpitrain.optimizer.amp import Scaling, report_found_inf
from mpitrain.optimizer.checks import (
    FROZEN_TOO_LATE,
    OTHER_PARAMETERS,
    TOO_LATE_FOR_GROUPS,
    DirectStepGuard,
    FrozenParameters,
    KnownParameters,
    has_hooks,
)
from mpitrain.optimizer.flat import forget_copies
from mpitrain.optimizer.fused_sgd import FusedSGD, is_plain_sgd
from mpitrain.optimizer.gradients import Gradients
from mpitrain.optimizer.local_replica import LocalReplica

Loss = torch.Tensor | float | Callable[[], torch.Tensor]


class LocalUpdate:
    """The step of the base optimizer, which changes the parameters of this rank only.

    Args:
        base: The base optimizer. Until ``stop``, stepping it directly causes a warning.
        replica: This rank's vectors.
    """

    def __init__(self, base: torch.optim.Optimizer, replica: LocalReplica) -> None:
        self._base, self._boundary = base, replica.boundary
        layout, x = replica.flat.layout, replica.group.x.local
        self._fused = FusedSGD(base, layout, x) if replica.fuses_update else None
        self._guard = DirectStepGuard(base)

    def __call__(self) -> None:
        """Make one step, inside an exchange. Local."""
        with self._boundary.computing():
            if self._fused is not None and is_plain_sgd(self._base):
                self._fused.step()
            else:
                with self._guard.suspended():
                    self._base.step()

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state of the base optimizer. Local."""
        self._base.load_state_dict(state)

    def reset_nonfinite(self) -> None:
        """Set non-finite elements of the base optimizer's state to zero.

        A NaN in a momentum, for example, would spoil all later steps.
        """
        with self._boundary.computing():
            for state in self._base.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor) and value.is_floating_point():
                        value.nan_to_num_(0.0, 0.0, 0.0)

    def stop(self) -> None:
        """Stop warning about direct steps of the base optimizer."""
        self._guard.stop()


class ParamGroups:
    """The base optimizer's parameter groups, as slices of the vector.

    Args:
        base: The base optimizer.
        method: The method of the worker.
        replica: This rank's vectors.
    """

    def __init__(self, base: torch.optim.Optimizer, method: Method, replica: LocalReplica) -> None:
        self._base, self._flat, self._parts = base, replica.flat, replica.flat.layout.group_slices
        self._parameters = [list(group["params"]) for group in base.param_groups]
        self._must_be_plain = replica.node_shared  # the worker makes the step of ``base``
        self._replaces_step = method.owns_update or replica.node_shared
        self._name = method.name
        if self._replaces_step:
            self._check_replaceable()

    def slices(self) -> list[ParamGroupSlice]:
        """Return the groups with their current settings.

        Raises:
            UsageError: The base optimizer has been changed in a way that is only allowed before the
                DistributedOptimizer is created.
        """
        groups = self._base.param_groups
        if len(groups) != len(self._parts):
            raise UsageError(TOO_LATE_FOR_GROUPS)
        for group, known in zip(groups, self._parameters, strict=True):
            found = group["params"]
            if len(found) != len(known) or not all(map(is_, found, known)):
                raise UsageError(OTHER_PARAMETERS)
        if self._replaces_step:
            self._check_replaceable()
            if self._flat.has_frozen():
                raise UsageError(FROZEN_TOO_LATE.format(self._name))
        self._base._opt_called = True  # type: ignore[attr-defined]  # a scheduler of the base optimizer looks there
        return [
            ParamGroupSlice(
                part,
                float(group["lr"]),
                float(group.get("weight_decay", 0.0)),
                float(group.get("momentum", 0.0)),
                bool(group.get("nesterov", False)),
            )
            for part, group in zip(self._parts, groups, strict=True)
        ]

    def _check_replaceable(self) -> None:
        """Check that the worker's update can replace ``base.step()``.

        Raises:
            UsageError: The update cannot replace it; the message says what to do instead.
        """
        if has_hooks(self._base):
            raise UsageError(
                f"{self._name} makes the update itself, so hooks of the base optimizer's step() would not be called: "
                "remove them, or register them on the DistributedOptimizer"
            )
        if self._must_be_plain and not is_plain_sgd(self._base):
            raise UsageError(
                "dampening, maximize or differentiable were set in the base optimizer after the DistributedOptimizer "
                "was created: set them before"
            )
        if self._must_be_plain and any(state.get("momentum_buffer") is not None for state in self._base.state.values()):
            raise UsageError(
                "the base optimizer has momentum, which node_shared would not use because each rank keeps that of a "
                "part: use AllReduceSGD(node_shared=False), or load a state into the DistributedOptimizer"
            )


class Weights(Protocol):
    """An object that decides the weight of this rank's gradient in a step."""

    def weigh(self) -> None:
        """Give the gradient of this step its weight. Collective."""


class Stepper:
    """The steps of one rank.

    Args:
        method: The method of the worker.
        replica: This rank's vectors and its worker.
        update: The step of the base optimizer.
        groups: The base optimizer's parameter groups.
        frozen: The parameters that must stay frozen.
        known: The parameters that the model has had from the beginning.

    Attributes:
        join: The object that weighs the gradients while ranks may make unequal numbers of steps; else None.
    """

    def __init__(
        self,
        method: Method,
        replica: LocalReplica,
        update: LocalUpdate,
        groups: ParamGroups,
        frozen: FrozenParameters,
        known: KnownParameters,
    ) -> None:
        self._method, self._groups, self._frozen, self._known = method, groups, frozen, known
        self._flat, self._worker, self._boundary = replica.flat, replica.worker, replica.boundary
        self._statistics, self._rank = replica.comm.statistics, replica.comm.rank
        self._foreign_writes = replica.foreign_writes
        self._update = update
        self._local_update = None if method.owns_update or replica.node_shared else update
        self._gradients = Gradients(method, replica)
        self._has_reported = False
        self.join: Weights | None = None

    def step(self, loss: Loss | None, scaling: Scaling | None = None) -> Any:
        """Exchange and update. Return ``loss``, or the value of the closure.

        Collective for synchronous methods, else Local (or Collective over a replica group).

        Args:
            loss: The loss of the mini-batch, or a closure that computes it.
            scaling: The values of the gradient scaler for this step; None without a scaler.
        """
        watchdog.begin_step()

        # 1. The loss; a closure computes it again, with the gradients.
        if callable(loss):
            with torch.enable_grad():
                loss = loss()
        needs_loss = self._method.needs_loss
        if needs_loss and loss is None:
            raise UsageError(f"{self._method.name} ranks workers by their loss: call optimizer.step(loss)")

        # 2. The gradients in one vector, and the settings of this step.
        skips, is_combined = self._collect(scaling)
        self._flat.check_attached()
        self._frozen.check()
        self._known.check_sometimes()
        group_slices = self._groups.slices()

        # 3. The exchange, with the local update at the method's place in it.
        with self._boundary.exchanging(copies=True, counts=True):
            value = float(loss) if needs_loss and loss is not None else None
            found_nonfinite = self._worker.step(
                group_slices, self._local_update, value, skips=skips, is_combined=is_combined
            )

            # 4. The worker has replaced its own values that were not finite; the base optimizer's follow.
            if found_nonfinite and not self._worker.skips:
                self._update.reset_nonfinite()
                self._report_nonfinite(
                    "%d values were not finite and were kept out of the exchange; "
                    "this rank's own non-finite values were replaced with those of the consensus"
                )

        # 5. A step that is left out is reported: by the rank that caused it and, if all leave it out, by rank 0.
        if self._worker.skips:
            self._report_skip(scaling, causes=skips)
        self.accept_parameters()
        return loss

    def _collect(self, scaling: Scaling | None) -> tuple[bool, bool]:
        """Collect the gradients of a step, with their weight. Collective inside ``join``, else Local."""
        if self._foreign_writes is not None:
            self._foreign_writes.check()
        found = self._gradients.collect(scaling)
        if self.join is not None:
            self.join.weigh()
        return found

    def accompany(self) -> None:
        """Take part in a step of other ranks without a gradient, after this rank's own last step. Collective."""
        if self._method.combines_gradients:
            self.zero_gradients(set_to_none=False)
            self.step(None)
            return
        watchdog.begin_step()
        with self._boundary.exchanging(copies=True, counts=True):
            self._worker.step(self._groups.slices(), self._local_update, skips=True)
        self.accept_parameters()

    def clip_gradients(self, max_norm: float, order: float, error_if_nonfinite: bool) -> torch.Tensor:
        """Clip the gradient of the step to a norm of at most ``max_norm``; see ``DistributedOptimizer``.

        Collective if the method combines gradients, else Local (or Collective over a replica group).
        """
        if not max_norm >= 0 or not order > 0:
            raise UsageError(f"clip_grad_norm_ needs max_norm >= 0 and norm_type > 0, not {max_norm:g} and {order:g}")
        layout = self._flat.layout
        if not self._gradients.are_combined:
            self._flat.convert_sparse_gradients()
            parameters = [place.parameter for place in layout.places]
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm, order, error_if_nonfinite)
        if self.join is not None:
            raise UsageError(
                "clip_grad_norm_ inside join() would wait for ranks that have ended: clip each rank's own gradient "
                "with torch.nn.utils.clip_grad_norm_, or leave out join()"
            )
        group_slices = self._groups.slices()
        skips, is_combined = self._gradients.collect(None)
        with self._boundary.exchanging(copies=True, counts=True):
            norm = self._worker.clip_gradients(group_slices, max_norm, order, skips=skips, is_combined=is_combined)
        self._gradients.note_combined(skips=skips)
        if error_if_nonfinite and not math.isfinite(norm):
            raise RuntimeError(
                f"the norm (of order {order:g}) of the gradient is not finite, so it cannot be clipped: "
                "with error_if_nonfinite=False the step is left out or made with it"
            )
        return torch.tensor(norm, dtype=torch.promote_types(layout.torch_dtype, torch.float32), device=layout.device)

    def zero_gradients(self, *, set_to_none: bool) -> None:
        """Set all gradients to None or to zero, and forget that they were clipped. Local."""
        self._gradients.forget()
        if set_to_none:
            self._flat.release_gradients()
        else:
            self._flat.zero_gradients()

    def accept_parameters(self) -> None:
        """Clear caches of older parameters, and record that the optimizer has made the present ones. Local."""
        forget_copies()
        if self._foreign_writes is not None:
            self._foreign_writes.accept()

    def _report_skip(self, scaling: Scaling | None, *, causes: bool) -> None:
        """Log the first step that is left out; with a gradient scaler, which expects such steps, notify that."""
        if scaling is not None:
            if not scaling.found_inf:
                report_found_inf()
        elif self._rank == 0 or (causes and not self._method.takes_gradients_early):  # else ``g`` is the mean already
            all_skip = self._method.combines_gradients
            self._report_nonfinite(
                "the gradient of a rank was not finite: all ranks leave out this step (%d non-finite elements so far)"
                if all_skip
                else "this rank's gradient was not finite: it leaves out this update (%d non-finite elements so far)"
            )

    def _report_nonfinite(self, text: str) -> None:
        """Log the first time only; ``statistics.n_nonfinite`` counts all elements."""
        if not self._has_reported:
            self._has_reported = True
            logger.warning(text, int(self._statistics.n_nonfinite), extra=ANY_RANK)

    def wait(self) -> None:
        """Wait for the worker's background exchanges. Local."""
        with self._boundary.exchanging():
            self._worker.wait()

    def finalize(self) -> None:
        """Make the worker's last exchange.

        Collective for synchronous methods, else Local (or Collective over a replica group).
        """
        with self._boundary.exchanging(copies=True):
            self._worker.finalize(self._groups.slices())
        self.accept_parameters()
