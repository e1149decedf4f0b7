"""One step of a rank: gradients, exchange, local update, and the repair of non-finite values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import ParamGroupSlice
from mpitrain.collectives.world.watchdog import watchdog
from mpitrain.errors import UsageError
from mpitrain.log import ANY_RANK, logger
from mpitrain.optimizer.checks import TOO_LATE_FOR_GROUPS, DirectStepGuard, FrozenParameters
from mpitrain.optimizer.fused_sgd import FusedSGD, is_plain_sgd
from mpitrain.optimizer.local_replica import LocalReplica

Loss = torch.Tensor | float | Callable[[], torch.Tensor]


class LocalUpdate:
    """The step of the base optimizer, which changes this rank's parameters alone.

    Args:
        base: The base optimizer. Until ``stop``, a direct step of this optimizer causes a warning.
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
        if self._fused is not None:
            self._fused.adopt_state()

    def reset_nonfinite(self) -> None:
        """Zero non-finite elements of the base optimizer's state; in a momentum they would spoil all later steps."""
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
        replica: This rank's vectors.
    """

    def __init__(self, base: torch.optim.Optimizer, replica: LocalReplica) -> None:
        self._base, self._parts = base, replica.flat.layout.group_slices
        self._must_be_plain = replica.node_shared  # the worker makes the step of ``base``

    def slices(self) -> list[ParamGroupSlice]:
        """Return the groups with their current settings.

        Raises:
            UsageError: The base optimizer was changed in a way that must precede the DistributedOptimizer.
        """
        if len(self._base.param_groups) != len(self._parts):
            raise UsageError(TOO_LATE_FOR_GROUPS)
        if self._must_be_plain and not is_plain_sgd(self._base):
            raise UsageError(
                "hooks, a scheduler, dampening or maximize were added to the base optimizer after the "
                "DistributedOptimizer was created: add them before, and pass the DistributedOptimizer to the scheduler"
            )
        return [
            ParamGroupSlice(
                part,
                float(group["lr"]),
                float(group.get("weight_decay", 0.0)),
                float(group.get("momentum", 0.0)),
                bool(group.get("nesterov", False)),
            )
            for part, group in zip(self._parts, self._base.param_groups, strict=True)
        ]


class Stepper:
    """Makes the steps of one rank.

    Args:
        method: Of the worker.
        replica: This rank's vectors and its worker.
        update: The base optimizer's step.
        groups: The base optimizer's parameter groups.
        frozen: Parameters that must stay frozen.
    """

    def __init__(
        self, method: Method, replica: LocalReplica, update: LocalUpdate, groups: ParamGroups, frozen: FrozenParameters
    ) -> None:
        self._method, self._groups, self._frozen = method, groups, frozen
        self._flat, self._worker, self._boundary = replica.flat, replica.worker, replica.boundary
        self._statistics = replica.comm.statistics
        self._update = update
        self._local_update = None if method.owns_update or replica.node_shared else update
        self._collects_gradients = method.needs_gradient or replica.flat.staged or replica.size > 1
        self._has_reported = False

    def step(self, loss: Loss | None) -> Any:
        """Exchange and update. Collective for synchronous methods, Local for the others (or Collective over a group).

        Returns:
            ``loss``, or what it returned when it is a closure.
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
        if self._collects_gradients:
            self._flat.collect_gradients()
        self._flat.check_attached()
        self._frozen.check()
        group_slices = self._groups.slices()

        # 3. The exchange, with the local update at the method's place in it.
        with self._boundary.exchanging(copies=True, counts=True):
            value = float(loss) if needs_loss and loss is not None else None
            found_nonfinite = self._worker.step(group_slices, self._local_update, value)

            # 4. The worker has replaced its own values that were not finite; the base optimizer's follow.
            if found_nonfinite:
                self._update.reset_nonfinite()
                self._report_nonfinite()
        return loss

    def _report_nonfinite(self) -> None:
        """Log the first time only; ``statistics.n_nonfinite`` counts all elements."""
        if not self._has_reported:
            self._has_reported = True
            logger.warning(
                "%d values were not finite and were kept out of the exchange; "
                "this rank's own non-finite values were replaced with those of the consensus",
                int(self._statistics.n_nonfinite),
                extra=ANY_RANK,
            )

    def wait(self) -> None:
        """Wait for the worker's exchanges in the background. Local."""
        with self._boundary.exchanging():
            self._worker.wait()

    def finalize(self) -> None:
        """Make the worker's last exchange. Collective for synchronous methods, else Local (or over a group)."""
        with self._boundary.exchanging(copies=True):
            self._worker.finalize(self._groups.slices())
