"""The GPU of this machine: whether it can be measured, and its description."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import subprocess
from collections.abc import Sequence
from typing import Any

DRIVER = "libcuda.so.1"
PACKAGES = ("numpy", "torch", "cupy")
MISSING = {"cupy": "pip install cupy-cuda13x"}


def problem(packages: Sequence[str] = PACKAGES, driver: str = DRIVER) -> str | None:
    """Return why nothing can be measured here and what to do about it, or None. Local.

    Args:
        packages: What this Python must have.
        driver: NVIDIA's library.
    """
    try:
        cuda = ctypes.CDLL(driver)
    except OSError:
        return f"there is no NVIDIA GPU here ({driver} cannot be loaded): run this on a machine with one"
    n_gpus, code = ctypes.c_int(), cuda.cuInit(0)
    if code == 0:
        code = cuda.cuDeviceGetCount(ctypes.byref(n_gpus))
    if code != 0 or n_gpus.value == 0:
        why = f"error {code} of its driver" if code else "its driver sees none; is CUDA_VISIBLE_DEVICES empty?"
        return f"there is no NVIDIA GPU to be used here ({why}): run this on a machine with one"
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        ways = "; ".join(MISSING.get(name, f"pip install {name}") for name in absent)
        return f"this Python lacks {', '.join(absent)} ({ways}): choose another one by make bench-gpu PYTHON=..."
    return None


def describe() -> dict[str, Any]:
    """Describe CuPy's current GPU and its driver versions. Local."""
    import cupy
    import torch

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(cupy.cuda.Device().id)
    return {
        "name": properties["name"].decode(),
        "n_gpus": runtime.getDeviceCount(),
        "memory_gib": round(properties["totalGlobalMem"] / 2**30, 1),
        "multiprocessors": properties["multiProcessorCount"],
        "l2_mib": round(properties["l2CacheSize"] / 2**20, 1),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "driver": driver_version(),
        "cuda_of_driver": version_of(runtime.driverGetVersion()),
        "cuda_of_cupy": version_of(runtime.runtimeGetVersion()),
        "cuda_of_torch": torch.version.cuda,
    }


def versions() -> dict[str, str]:
    """Return the versions that decide how a run behaves, including CuPy's. Local."""
    import cupy

    from mpitrain.trainer import runfolder

    return runfolder.versions() | {"cupy": cupy.__version__}


def version_of(number: int) -> str:
    """Format CUDA's 13000 as ``13.0``."""
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_version() -> str:
    """Return the version of NVIDIA's driver, such as ``580.159.03``, or ``unknown`` without ``nvidia-smi``."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(found.stdout.split()), "unknown")


def line(gpu: dict[str, Any]) -> str:
    """Format a description of the GPU as one line."""
    several = f"{gpu['n_gpus']} x " if gpu["n_gpus"] > 1 else ""
    return (
        f"{several}{gpu['name']}, {gpu['memory_gib']:g} GiB, L2 {gpu['l2_mib']:g} MiB, driver {gpu['driver']}, "
        f"CUDA {gpu['cuda_of_driver']} (CuPy {gpu['cuda_of_cupy']}, torch {gpu['cuda_of_torch']})"
    )


def free_bytes() -> int:
    """Return the free device memory after the libraries have emptied their caches. Local."""
    import cupy
    import torch

    gc.collect()  # optimizers are in cycles with their hooks
    cupy.get_default_memory_pool().free_all_blocks()
    torch.cuda.empty_cache()
    free: int = cupy.cuda.runtime.memGetInfo()[0]
    return free
