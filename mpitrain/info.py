"""What ``mpitrain info`` says: this MPI, this machine, these GPUs, and what will be used of them."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from typing import Any

from mpitrain.collectives.memory import SHARED_MEMORY
from mpitrain.collectives.world import World
from mpitrain.kernels import cache_root
from mpitrain.runfolder import versions


def describe(world: World) -> dict[str, Any]:
    """The facts as one JSON document. Local."""
    import torch

    shared = shutil.disk_usage(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else None
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "world": world.describe(),
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "shared_memory_bytes": shared.free if shared else None,
            "kernel_cache": str(cache_root()),
        },
        "gpus": {
            "visible": [torch.cuda.get_device_name(i) for i in range(n_gpus)],
            "cupy": importlib.util.find_spec("cupy") is not None,
        },
        "versions": versions(),
    }


def show(document: dict[str, Any]) -> str:
    """The same for people."""
    lines = []
    for section, facts in document.items():
        lines.append(section)
        width = max(len(name) for name in facts)
        for name, fact in facts.items():
            lines += _lines(name, fact, width)
    return "\n".join(lines)


def _lines(name: str, fact: Any, width: int) -> list[str]:
    label = f"  {name.replace('_', ' '):{width}s}  "
    if isinstance(fact, dict):
        return [f"{label}{key}: {value}" if k == 0 else f"{'':{len(label)}}{key}: {value}"
                for k, (key, value) in enumerate(fact.items())]  # fmt: skip
    if name.endswith("_bytes") and fact is not None:
        return [f"  {name.removesuffix('_bytes').replace('_', ' '):{width}s}  {fact / 2**30:.1f} GiB free"]
    if isinstance(fact, list):
        fact = ", ".join(map(str, fact)) or "none"
    return [label + {True: "yes", False: "no", None: "unknown"}.get(fact, str(fact)) if not isinstance(fact, (int, float)) or isinstance(fact, bool) else label + str(fact)]
