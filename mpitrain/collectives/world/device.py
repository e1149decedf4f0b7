"""Which device a rank computes on.

Local rank r takes GPU r modulo the number of those that it sees. A launcher that shows every rank one of its own (SLURM
with --gpus-per-task, CUDA_VISIBLE_DEVICES in a wrapper) is thereby obeyed; whether ranks can map memory of GPUs that
they do not see is tried (``collectives.world.transport``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from mpitrain.errors import UsageError

CPU_INSTEAD = "run with --device cpu, in a script mpitrain.init(device='cpu')"


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
        raise UsageError(f"there is no GPU to be used ({why}): {CPU_INSTEAD}")
    if index and int(index) >= n_gpus:
        raise UsageError(f"there is no {device}: this machine has {n_gpus} GPU(s), cuda:0 to cuda:{n_gpus - 1}")
    return device if index else f"cuda:{local_rank % n_gpus}"


def select_gpu(device: str) -> int:
    """Make a GPU the one on which torch, too, works when nobody says where; its index."""
    import torch

    torch.cuda.set_device(device)
    return torch.device(device).index


def share_cores(cores: float) -> None:
    """Share the cores of the node between its ranks: without this torch would start a thread on every core. Local.

    Args:
        cores: This rank's share of them.
    """
    limit_threads(max(int(cores), 1))


def limit_threads(most: int) -> None:
    """Let torch compute with this many threads at most, unless the user has said otherwise. Local.

    That is by OMP_NUM_THREADS, or by ``torch.set_num_threads`` with any number but torch's own default: that of the
    cores, or of their halves (of two hyperthreads it takes one).
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    n_cores, n_threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    if n_threads > most and n_threads in (n_cores, n_cores // 2):
        torch.set_num_threads(most)


def gpu_names() -> list[str]:
    """The GPUs that this process sees."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]


def shared_gpus(places: Sequence[tuple[str, str]]) -> Iterator[str]:
    """What there is to say of GPUs that several ranks share, one line each.

    Args:
        places: The host of each rank, and which of its GPUs the rank has.
    """
    for host, identity in dict.fromkeys(places):
        ranks = [rank for rank, place in enumerate(places) if place == (host, identity)]
        if len(ranks) > 1:
            yield (
                f"ranks {', '.join(map(str, ranks))} share one GPU ({identity} of {host}): they take turns on it; "
                "for one each, start as many ranks on a node as it has GPUs"
            )
