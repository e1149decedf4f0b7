"""A model's parameters as one flat vector and its gradients as another: the torch tensors are views into them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from mpitrain import kernels
from mpitrain.errors import UsageError
from mpitrain.kernels.gpu import is_device
from mpitrain.log import logger
from mpitrain.optimizer.layout import FlatLayout
from mpitrain.optimizer.module_state import state_tensors


class FlatParameters:
    """Parameters and gradients that live in two vectors, until ``detach``.

    The constructor copies the parameters to ``x`` (n,) and makes them views of ``x``. It makes their gradients views of
    ``g`` (n,), which it sets to zero. If the parameters are on a GPU and ``x`` and ``g`` are in host memory, the
    tensors become views of two vectors on the GPU. ``to_host`` and ``to_device`` then copy between the GPU and the
    host.

    Args:
        layout: The positions of the parameters in the vectors.
        x, g: (n,) zeros, in host memory or on the GPU of the parameters.
        staged: Whether to use separate vectors even if the parameters are on the host.

    Attributes:
        layout: The positions of the parameters in the vectors.
        staged: Whether the tensors are views of separate vectors. ``x`` and ``g`` are then copies of these.
    """

    def __init__(self, layout: FlatLayout, x: Any, g: Any, *, staged: bool = False) -> None:
        self.layout = layout
        self._places = layout.places
        self._host_x, self._host_g = as_tensor(x, layout.torch_dtype), as_tensor(g, layout.torch_dtype)
        device = layout.device
        self.staged = staged or device.type != self._host_x.device.type
        self._x = torch.zeros_like(self._host_x, device=device) if self.staged else self._host_x
        self._g = torch.zeros_like(self._host_g, device=device) if self.staged else self._host_g
        self._hooks: list[Any] = []
        self._warns_of_sparse = True
        self._marked = -1  # the version of the gradients that was marked
        with torch.no_grad():
            for place in self._places:
                view = place.view(self._x)
                view.copy_(place.parameter)
                place.parameter.data = view
        size = self._x.element_size()
        self._addresses = [self._x.data_ptr() + p.start * size for p in self._places if p.parameter.numel()]
        self._nonempty = [place.parameter for place in self._places if place.parameter.numel()]
        forget_copies()
        self._gradients = [place.view(self._g) for place in self._places]
        self.zero_gradients()
        self.to_host()

    @property
    def compute_stream(self) -> int:
        """The address of torch's current stream; 0 on the host."""
        device = self.layout.device
        return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0

    def to_host(self) -> None:
        """Copy parameters and gradients to ``x`` and ``g``, if ``staged``."""
        if self.staged:
            self._host_x.copy_(self._x)
            self._host_g.copy_(self._g)

    def to_device(self) -> None:
        """Copy ``x`` and ``g`` to the parameters and gradients, if ``staged``."""
        if self.staged:
            self._x.copy_(self._host_x)
            self._g.copy_(self._host_g)

    def zero_gradients(self) -> None:
        """Set all gradients to zero, in one pass."""
        self._g.zero_()
        for place, view in zip(self._places, self._gradients, strict=True):
            place.parameter.grad = view

    def release_gradients(self) -> None:
        """Set all gradients to None: the next backward pass then stores new ones instead of adding to the old ones."""
        for place in self._places:
            place.parameter.grad = None

    def collect_gradients(self, *, counts: bool = False) -> int:
        """Copy gradients that are not in ``g`` into ``g``, and set missing ones to zero.

        After ``release_gradients`` or ``model.zero_grad()``, autograd allocates gradients outside ``g``.

        Args:
            counts: Whether to count the non-finite elements. On the host, this needs no extra pass.

        Returns:
            The number of non-finite elements; 0 if they are not counted.
        """
        elsewhere, n_nonfinite, was_collected = [], 0, True
        for place, view in zip(self._places, self._gradients, strict=True):
            grad = place.parameter.grad
            if grad is view:
                was_collected = False
                continue
            if grad is None:
                view.zero_()
                if not place.parameter.requires_grad:  # frozen since: torch leaves out parameters without a gradient
                    continue
            elif grad.layout is not torch.strided:
                elsewhere.append((view, self._dense(grad)))
            elif grad.data_ptr() != view.data_ptr():
                elsewhere.append((view, grad))
            place.parameter.grad = view
        if elsewhere and self.layout.device.type == "cuda":  # one launch instead of one for each tensor
            torch._foreach_copy_([view for view, _ in elsewhere], [grad for _, grad in elsewhere])
        else:
            for view, grad in elsewhere:
                n_nonfinite += self._copy(view, grad, counts=counts)
        if counts and not (was_collected and self.layout.may_be_fused) and not n_nonfinite:
            n_nonfinite = self._count_nonfinite()
        return n_nonfinite

    def _count_nonfinite(self) -> int:
        """Return the number of non-finite elements of ``g``; without any, in one pass that only reads."""
        if math.isfinite(float(self._g.sum(dtype=torch.promote_types(self._g.dtype, torch.float32)))):
            return 0
        return int((~torch.isfinite(self._g)).sum())

    def mark_gradients(self) -> None:
        """Remember the present gradients for ``has_marked_gradients``. All of them must be in ``g``."""
        self._marked = self._g._version

    def has_marked_gradients(self) -> bool:
        """Return whether the gradients have not changed since ``mark_gradients``."""
        return self._marked == self._g._version and all(
            place.parameter.grad is view or (place.parameter.grad is None and not place.parameter.requires_grad)
            for place, view in zip(self._places, self._gradients, strict=True)
        )

    def has_frozen(self) -> bool:
        """Return whether a parameter does not require a gradient any more."""
        return not all(place.parameter.requires_grad for place in self._places)

    def watch_gradients(self, ready: Callable[[int], object], complete: Callable[[], object]) -> None:
        """Report gradients during every backward pass, until ``detach``.

        Args:
            ready: Called with the number of a layer when its gradient is in ``g``.
            complete: Called at the end of a backward pass, when all gradients are in ``g``.
        """
        engine: Any = torch.autograd.Variable._execution_engine
        end_is_queued = False

        def end() -> None:
            nonlocal end_is_queued
            end_is_queued = False
            with torch.no_grad():
                self.collect_gradients()
                complete()

        def hook(layer: int, parameter: torch.nn.Parameter) -> None:
            nonlocal end_is_queued
            if not end_is_queued:
                end_is_queued = True
                engine.queue_callback(end)
            view, grad = self._gradients[layer], parameter.grad
            if grad is not None and grad is not view:
                with torch.no_grad():
                    self._copy(view, grad if grad.layout is torch.strided else self._dense(grad))
                parameter.grad = view
            ready(layer)

        for layer, place in enumerate(self._places):
            self._hooks.append(place.parameter.register_post_accumulate_grad_hook(partial(hook, layer)))

    def _copy(self, view: torch.Tensor, grad: torch.Tensor, *, counts: bool = False) -> int:
        """Do ``view.copy_(grad)``; on the host our kernel takes a third of torch's time.

        Returns:
            The number of non-finite elements, if they are counted; in ``view`` they are then zeros.
        """
        if self.layout.may_be_fused and grad.is_contiguous():
            copy = kernels.receive if counts else kernels.copy
            return int(copy(view.reshape(-1).numpy(), grad.reshape(-1).numpy()))
        view.copy_(grad)
        return int((~torch.isfinite(grad)).sum()) if counts else 0

    def convert_sparse_gradients(self) -> None:
        """Replace sparse gradients by dense ones."""
        for place in self._places:
            grad = place.parameter.grad
            if grad is not None and grad.layout is not torch.strided:
                place.parameter.grad = self._dense(grad)

    def _dense(self, grad: torch.Tensor) -> torch.Tensor:
        if self._warns_of_sparse:
            self._warns_of_sparse = False
            logger.warning(
                "a sparse gradient (shape %s) is converted to a dense one, because gradients are exchanged as one "
                "vector: Embedding(sparse=False) saves the conversion",
                tuple(grad.shape),
            )
        return grad.to_dense()

    @contextmanager
    def swapped_parameters(self, vector: Any, *, copies: bool = False) -> Iterator[None]:
        """Use ``vector`` (n,) as the parameters inside the block; ``x`` does not change.

        Args:
            vector: The values, in the same memory (host or GPU) as ``x``.
            copies: Whether the parameters are copies that may be kept after the block; otherwise they are views of
                ``vector``.
        """
        self._point_to(vector, copies=copies)
        try:
            yield
        finally:
            for place in self._places:
                place.parameter.data = place.view(self._x)
            forget_copies()

    def _point_to(self, vector: Any, *, copies: bool) -> None:
        with torch.inference_mode(mode=False), torch.no_grad():
            tensor = vector if isinstance(vector, torch.Tensor) else as_tensor(vector, self.layout.torch_dtype)
            other = tensor.to(self._x.device)
            for place in self._places:
                view = place.view(other)
                place.parameter.data = view.clone() if copies else view
        forget_copies()

    def detach(self, vector: Any = None) -> None:
        """Move the parameters back into ordinary memory, without gradients. Device and type do not change.

        Tensors that were taken from the model keep their values.

        Args:
            vector: (n,) the values of the parameters, in the same memory as ``x``; by default their present values.
        """
        for hook in self._hooks:
            hook.remove()
        kinds = [(place.parameter.device, place.parameter.dtype) for place in self._places]
        self._point_to(self._x if vector is None else vector, copies=True)
        for place, (device, dtype) in zip(self._places, kinds, strict=True):
            place.parameter.data = place.parameter.data.to(device=device, dtype=dtype)
            place.parameter.grad = None
        self._gradients.clear()
        for tensor in (self._x, self._g):
            _keep_values(tensor)

    def check_attached(self) -> None:
        """Refuse parameters whose memory was replaced, for example by ``model.to`` or ``model.half``.

        Raises:
            UsageError: The message says what to do instead.
        """
        if [parameter.data_ptr() for parameter in self._nonempty] != self._addresses:
            raise UsageError(
                "a parameter was moved or converted after the DistributedOptimizer was made: "
                "call model.to(...) and load weights (with copy_) before it, or after close()"
            )


def _keep_values(tensor: torch.Tensor) -> None:
    """Move a host tensor whose memory is about to be freed, if other tensors (a ``state_dict``) view that memory."""
    storage = tensor.untyped_storage()
    n_own = 2  # ``tensor`` and ``storage``
    if tensor.device.type == "cpu" and torch._C._storage_Use_Count(storage._cdata) > n_own:
        storage.share_memory_()  # copies the values and replaces the memory of all views


def for_each_state_tensor(model: torch.nn.Module, fn: Callable[[np.ndarray], None]) -> None:
    """Call ``fn`` with the bytes of each parameter and buffer of a model; ``fn`` may change them."""
    with torch.no_grad():
        for _, tensor in state_tensors(model):
            if tensor.numel() == 0:
                continue
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().copy()
            fn(raw)
            tensor.copy_(torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape))


def forget_copies() -> None:
    """Clear torch's caches of values that depend on the parameters.

    An open ``autocast`` region caches parameters cast to 16 bits; ``parametrize.cached()`` caches parametrized weights.
    """
    torch.clear_autocast_cache()
    parametrize = sys.modules.get("torch.nn.utils.parametrize")
    if parametrize is not None:
        parametrize._cache.clear()


def as_tensor(array: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor that shares the memory of an array."""
    if is_device(array):
        tensor: torch.Tensor = torch.from_dlpack(  # type: ignore[attr-defined]
            array.view(np.uint16) if dtype == torch.bfloat16 else array
        )
        return tensor.view(dtype)
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
