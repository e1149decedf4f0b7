"""Which device a rank computes on."""

from __future__ import annotations

from mpitrain.errors import UsageError


def bind(device: str, local_rank: int) -> str:
    """The device of a rank: local rank r takes GPU r modulo the number of visible ones.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:K``.
        local_rank: Of this rank on its node.

    Raises:
        UsageError: A device that is unknown or not there.
    """
    if device == "cpu":
        return device
    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise UsageError(f"unknown device {device!r}: it must be cpu or cuda")
    import torch

    n_gpus = len(gpu_names())
    if n_gpus == 0:
        why = "this torch is a CPU build" if torch.version.cuda is None else "torch sees none"
        raise UsageError(f"there is no GPU to be used ({why}): run with --device cpu")
    if index and int(index) >= n_gpus:
        raise UsageError(f"there is no {device}: this machine has {n_gpus} GPU(s), cuda:0 to cuda:{n_gpus - 1}")
    return device if index else f"cuda:{local_rank % n_gpus}"


def gpu_names() -> list[str]:
    """The GPUs that this process sees."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
