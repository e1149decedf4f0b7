"""The gradients of a step, from the parameters to the worker's vector: collected, checked and perhaps clipped."""

from __future__ import annotations

from mpitrain.algorithms.base.method import Method
from mpitrain.errors import UsageError
from mpitrain.optimizer.amp import Scaling
from mpitrain.optimizer.local_replica import LocalReplica


class Gradients:
    """This rank's gradients between the backward pass and the step.

    Args:
        method: The method of the worker.
        replica: This rank's vectors.

    Attributes:
        are_combined: Whether the method combines the gradients of several ranks.
    """

    def __init__(self, method: Method, replica: LocalReplica) -> None:
        self._flat, self._statistics, self._node_shared = replica.flat, replica.comm.statistics, replica.node_shared
        self._boundary = replica.boundary
        self.are_combined = method.combines_gradients or replica.size > 1
        self._collects = method.needs_gradient or replica.flat.staged or replica.size > 1
        # On a GPU the number is waited for, so that methods whose workers do not wait go without it.
        self._counts_nonfinite = method.needs_gradient and (method.is_synchronous or replica.flat.layout.may_be_fused)
        self._is_combined = self._skips = False  # of the gradients that ``note_combined`` has marked

    def collect(self, scaling: Scaling | None) -> tuple[bool, bool]:
        """Copy the gradients into the vector, unless clipping has already done so. Local.

        Args:
            scaling: The values of the gradient scaler for this step; None without a scaler.

        Returns:
            Whether this rank's gradient is not finite, and whether the gradients have been combined since the last
            backward pass.
        """
        is_combined, skips, flat = self._was_combined(), self._skips, self._flat
        if scaling is not None or not self._collects:
            flat.convert_sparse_gradients()
        if scaling is not None:
            scaling.unscale([place.parameter for place in flat.layout.places])
        if not is_combined:
            if self._counts_nonfinite:
                self._boundary.wait_for_torch()
            n_nonfinite = flat.collect_gradients(counts=self._counts_nonfinite) if self._collects else 0
            skips = n_nonfinite > 0 or (scaling is not None and scaling.found_inf)
            self._statistics.n_nonfinite += max(n_nonfinite, skips)
        self.forget()
        return skips, is_combined

    def note_combined(self, *, skips: bool) -> None:
        """Note that the vector holds the combined gradient of several ranks. Local.

        The note is valid until the gradients change.

        Args:
            skips: Whether the combined gradient is not finite, so that the step will be skipped.
        """
        self._is_combined, self._skips = True, skips
        self._flat.mark_gradients()

    def forget(self) -> None:
        """Undo ``note_combined``, so that the next step combines gradients. Local."""
        self._is_combined = self._skips = False

    def _was_combined(self) -> bool:
        """Return whether the gradients are still those that were combined.

        The combination of new gradients with a mean is the mean again, but a factor that is not applied yet is lost.

        Raises:
            UsageError: Such gradients were changed.
        """
        if not self._is_combined or self._flat.has_marked_gradients():
            return self._is_combined
        if self._node_shared:
            raise UsageError(
                "gradients were changed between clip_grad_norm_ and step(): with node_shared, clip last, and zero "
                "gradients with optimizer.zero_grad()"
            )
        return False
