"""The device on which a rank computes, and its share of the cores.

Local rank r uses GPU r modulo the number of visible GPUs. This respects a launcher that shows every rank a GPU of its
own (SLURM with --gpus-per-task, CUDA_VISIBLE_DEVICES in a wrapper). ``collectives.world.transport`` tries whether ranks
can map memory of GPUs that they do not see.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from mpitrain.errors import UsageError
from mpitrain.kernels import gpu
from mpitrain.kernels.gpu import Gpu
from mpitrain.log import logger

CPU_INSTEAD = "run with --device cpu, in a script mpitrain.init(device='cpu')"


def bind(device: str, local_rank: int) -> str:
    """Return the device of a rank, ``cpu`` or ``cuda:K``. Local.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:K``.
        local_rank: The number of this rank on its node.

    Raises:
        UsageError: The device is unknown or absent.
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
        raise UsageError(f"no GPU can be used ({why}): {CPU_INSTEAD}")
    if index and int(index) >= n_gpus:
        raise UsageError(f"there is no {device}: this machine has {n_gpus} GPU(s), cuda:0 to cuda:{n_gpus - 1}")
    return device if index else f"cuda:{local_rank % n_gpus}"


def bind_all(device: str, comm: Any, local_rank: int) -> tuple[str, Gpu | None]:
    """Return the device of this rank, and its GPU, which becomes the current GPU. Collective.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:K``.
        comm: The ranks.
        local_rank: The number of this rank on its node.

    Raises:
        UsageError: A rank cannot use its device. All ranks raise it.
    """
    bound, own_gpu, problem = "", None, ""
    try:
        bound = bind(device, local_rank)
        if bound != "cpu":
            own_gpu = gpu.use(select_gpu(bound))
    except UsageError as error:
        problem = str(error)
    except ImportError as error:
        problem = f"vectors on GPUs need CuPy ({error}): pip install 'mpitrain[gpu]', or {CPU_INSTEAD}"
    except Exception as error:
        problem = f"the GPU {bound} of {socket.gethostname()} cannot be used: {type(error).__name__}: {error}"
    problems = [text for text in comm.allgather(problem) if text]
    if problems:
        raise UsageError(problems[0])
    return bound, own_gpu


def select_gpu(device: str) -> int:
    """Make ``device`` the current GPU of torch, and return its index. Local."""
    import torch

    torch.cuda.set_device(device)
    return torch.device(device).index


def share_cores(cores: float) -> None:
    """Limit torch's threads to this rank's share of the cores of the node. Local.

    Args:
        cores: The share.
    """
    limit_threads(max(int(cores), 1))


def limit_threads(most: int) -> None:
    """Limit the number of torch's threads, unless the user has chosen it. Local.

    A user chooses it by ``OMP_NUM_THREADS`` or ``torch.set_num_threads``. The number of cores and half of it are
    torch's defaults; they do not count as a choice.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    n_cores, n_threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    if n_threads > most and n_threads in (n_cores, n_cores // 2):
        torch.set_num_threads(most)


def gpu_names() -> list[str]:
    """Return the names of the GPUs that this process sees. Local."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]


def shared_gpus(places: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield a message for each GPU that several ranks share.

    Args:
        places: For each rank, its host and the identity of its GPU.
    """
    for host, identity in dict.fromkeys(places):
        ranks = [rank for rank, place in enumerate(places) if place == (host, identity)]
        if len(ranks) > 1:
            yield (
                f"ranks {', '.join(map(str, ranks))} share one GPU ({identity} of {host}): they take turns on it; "
                "for one each, start as many ranks on a node as it has GPUs"
            )


def report_shared_gpus(host: str, identity: str, comm: Any) -> None:
    """Log each GPU that several ranks share, on rank 0. Collective.

    Args:
        host: The host of this rank.
        identity: The identity of this rank's GPU.
        comm: The ranks.
    """
    places = comm.allgather((host, identity))
    if comm.Get_rank() == 0:
        for text in shared_gpus(places):
            logger.info(text)
