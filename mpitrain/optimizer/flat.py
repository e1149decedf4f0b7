"""A model's parameters as one flat vector, and its gradients as another; the torch tensors are views into them.

Parameters are laid out group by group, so that a parameter group is a segment of the vector with its own learning rate
and weight decay, and each tensor begins on a 64-byte boundary (the padding stays zero). Tensors that are shared
between modules are there once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from mpitrain import kernels
from mpitrain.errors import UsageError
from mpitrain.kernels.gpu import is_device

ALIGN_BYTES = 64


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter lies in the vector."""

    parameter: torch.nn.Parameter
    start: int

    def view(self, vector: torch.Tensor) -> torch.Tensor:
        """The parameter's part of a vector, in its shape."""
        return vector[self.start : self.start + self.parameter.numel()].view(self.parameter.shape)


class FlatParameters:
    """Lays out the parameters of an optimizer; ``attach`` moves them into vectors.

    Args:
        groups: ``optimizer.param_groups``.

    Attributes:
        n: Elements of the vector, padding included.
        dtype: NumPy's name of the parameters' type.
        segments: One slice for each parameter group.
        layers: One slice for each parameter tensor.
        places: Where each parameter lies.

    Raises:
        UsageError: No parameters, parameters that are not floating point, or of several types.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        trainable = [[p for p in group["params"] if p.requires_grad] for group in groups]
        self.torch_dtype = _common_dtype([p for group in trainable for p in group])
        self.dtype = _numpy_dtype(self.torch_dtype)
        align = max(ALIGN_BYTES // self.torch_dtype.itemsize, 1)
        self.places: list[Place] = []
        self.group_slices: list[slice] = []
        end = 0
        for parameters in trainable:
            begin = end
            for parameter in parameters:
                self.places.append(Place(parameter, end))
                end += -(-parameter.numel() // align) * align
            self.group_slices.append(slice(begin, end))
        self.n = end
        self.layers = tuple(slice(place.start, place.start + place.parameter.numel()) for place in self.places)
        self._hooks: list[Any] = []
        self.n_parameters = sum(place.parameter.numel() for place in self.places)

    @property
    def may_be_fused(self) -> bool:
        """Whether the kernels can make the local update: on the host, and not in 16 bits: torch rounds more there."""
        return self.device.type == "cpu" and self.torch_dtype.itemsize >= 4

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.places[0].parameter.device

    @property
    def compute_stream(self) -> int:
        """The address of the stream on which torch computes now; 0 on the host."""
        return int(torch.cuda.current_stream(self.device).cuda_stream) if self.device.type == "cuda" else 0

    def attach(self, x: Any, g: Any, *, staged: bool = False) -> None:
        """Move the parameters into ``x`` (n,) and their gradients into ``g`` (n,): the tensors become views.

        Parameters on a GPU while ``x`` and ``g`` are in host memory become views into vectors there, and ``x`` and
        ``g`` are their copies: ``to_host`` and ``to_device`` carry one to the other.

        Args:
            x, g: Zeros, in host memory or in that of the parameters' GPU.
            staged: Keep copies although the parameters are on the host.
        """
        self._host_x, self._host_g = _as_tensor(x, self.torch_dtype), _as_tensor(g, self.torch_dtype)
        device = self.device
        self.staged = staged or device.type != self._host_x.device.type
        self._x = torch.zeros_like(self._host_x, device=device) if self.staged else self._host_x
        self._g = torch.zeros_like(self._host_g, device=device) if self.staged else self._host_g
        with torch.no_grad():
            for place in self.places:
                view = place.view(self._x)
                view.copy_(place.parameter)
                place.parameter.data = view
        self._gradients = [place.view(self._g) for place in self.places]
        self.zero_gradients()
        self.to_host()

    def to_host(self) -> None:
        """Bring parameters and gradients to the vectors in host memory, where they are not there anyway."""
        if self.staged:
            self._host_x.copy_(self._x)
            self._host_g.copy_(self._g)

    def to_device(self) -> None:
        """Bring the vectors in host memory to the parameters and gradients, where they are not there anyway."""
        if self.staged:
            self._x.copy_(self._host_x)
            self._g.copy_(self._host_g)

    def zero_gradients(self) -> None:
        """Set all gradients to zero, in one pass."""
        self._g.zero_()
        for place, view in zip(self.places, self._gradients, strict=True):
            place.parameter.grad = view

    def release_gradients(self) -> None:
        """Let the next backward pass put its gradients where it computes them, instead of adding them to old ones."""
        for place in self.places:
            place.parameter.grad = None

    def collect_gradients(self) -> None:
        """Bring gradients back into the vector that were allocated elsewhere (after ``model.zero_grad()``)."""
        elsewhere = []
        for place, view in zip(self.places, self._gradients, strict=True):
            grad = place.parameter.grad
            if grad is view:
                continue
            if grad is None:
                view.zero_()
            elif grad.data_ptr() != view.data_ptr():
                elsewhere.append((view, grad))
            place.parameter.grad = view
        if elsewhere and self.device.type == "cuda":  # one launch instead of one for each tensor
            torch._foreach_copy_([view for view, _ in elsewhere], [grad for _, grad in elsewhere])
            return
        for view, grad in elsewhere:
            self._copy(view, grad)

    def when_ready(self, ready: Callable[[int], object], complete: Callable[[], object]) -> None:
        """Be told of gradients during backward passes, until ``detach``.

        Args:
            ready: Called with the number of a layer whose gradient is in the vector.
            complete: Called at the end of a backward pass, when all are.
        """
        engine: Any = torch.autograd.Variable._execution_engine
        is_expected = False

        def end() -> None:
            nonlocal is_expected
            is_expected = False
            with torch.no_grad():
                self.collect_gradients()
                complete()

        def hook(layer: int, parameter: torch.nn.Parameter) -> None:
            nonlocal is_expected
            if not is_expected:
                is_expected = True
                engine.queue_callback(end)
            view, grad = self._gradients[layer], parameter.grad
            if grad is not None and grad is not view:
                with torch.no_grad():
                    self._copy(view, grad)
                parameter.grad = view
            ready(layer)

        for layer, place in enumerate(self.places):
            self._hooks.append(place.parameter.register_post_accumulate_grad_hook(partial(hook, layer)))

    def _copy(self, view: torch.Tensor, grad: torch.Tensor) -> None:
        """``view.copy_(grad)``; on the host our kernel does it in a third of torch's time."""
        if self.may_be_fused and grad.is_contiguous():
            kernels.copy(view.reshape(-1).numpy(), grad.reshape(-1).numpy())
        else:
            view.copy_(grad)

    @contextmanager
    def swapped_parameters(self, vector: Any) -> Iterator[None]:
        """The model's parameters are views into ``vector`` (n,) inside; its own vector stays as it is."""
        other = _as_tensor(vector, self.torch_dtype).to(self._x.device)
        for place in self.places:
            place.parameter.data = place.view(other)
        try:
            yield
        finally:
            for place in self.places:
                place.parameter.data = place.view(self._x)

    def detach(self) -> None:
        """Give the parameters memory of their own again, with the values they have."""
        for hook in self._hooks:
            hook.remove()
        for place in self.places:
            place.parameter.data = place.parameter.data.clone()
            place.parameter.grad = None

    def check_attached(self) -> None:
        """Raise when somebody has replaced a parameter's memory (``model.to``, ``model.half``).

        Raises:
            UsageError: With what to do instead.
        """
        for place in self.places:
            where = self._x.data_ptr() + place.start * self._x.element_size()
            if place.parameter.data_ptr() != where and place.parameter.numel():
                raise UsageError(
                    "a parameter was moved or converted after the DistributedOptimizer was made: "
                    "call model.to(...) and load weights (with copy_) before it"
                )


def _common_dtype(parameters: Iterable[torch.nn.Parameter]) -> torch.dtype:
    dtypes = {p.dtype for p in parameters}
    if not dtypes:
        raise UsageError("the optimizer has no trainable parameter: requires_grad is False for all of them")
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise UsageError(f"the parameters have several types ({names}): convert the model to one, e.g. model.float()")
    (dtype,) = dtypes
    if not dtype.is_floating_point:
        raise UsageError(f"the parameters are {dtype}, not floating point: convert the model, e.g. model.float()")
    return dtype


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    if dtype == torch.bfloat16:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    known = {torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16}
    if dtype not in known:
        raise UsageError(f"parameters of type {dtype} cannot be exchanged: use float32, float64, bfloat16 or float16")
    return np.dtype(known[dtype])


def _as_tensor(array: Any, dtype: torch.dtype) -> torch.Tensor:
    """The same memory as a tensor."""
    if is_device(array):
        tensor: torch.Tensor = torch.from_dlpack(  # type: ignore[attr-defined]
            array.view(np.uint16) if dtype == torch.bfloat16 else array
        )
        return tensor.view(dtype)
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@contextmanager
def keeping_buffers(model: torch.nn.Module) -> Iterator[None]:
    """What happens to a model's buffers inside is undone at the end, whether they are changed or replaced."""
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in saved:
                module._buffers[name] = buffer.copy_(values)


def for_each_state_tensor(model: torch.nn.Module, fn: Callable[[np.ndarray], None]) -> None:
    """Call ``fn`` with the bytes of every parameter and buffer of a model and keep what it writes there."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
                continue
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().copy()
            fn(raw)
            tensor.copy_(torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape))
