"""What ``mpitrain info`` says: this MPI, this machine, these GPUs, and what will be used of them."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from typing import Any

from mpitrain.collectives.device import gpu_names
from mpitrain.collectives.memory import SHARED_MEMORY
from mpitrain.collectives.world import World
from mpitrain.kernels import cache_root
from mpitrain.trainer.runfolder import versions


def describe(world: World) -> dict[str, Any]:
    """The facts as one JSON document. Local."""
    shared = shutil.disk_usage(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else None
    return {
        "world": world.describe(),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "shared_memory": f"{shared.free / 2**30:.1f} GiB free" if shared else None,
            "kernel_cache": str(cache_root()),
        },
        "gpus": {"visible": gpu_names(), "cupy": importlib.util.find_spec("cupy") is not None},
        "versions": versions(),
    }


def _processor() -> str:
    """The model, as Linux calls it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show(document: dict[str, Any]) -> str:
    """The same for people."""
    lines = []
    for section, facts in document.items():
        lines.append(section)
        width = max(len(name) for name in facts)
        for name, fact in facts.items():
            first, *others = _words(fact)
            lines.append(f"  {name.replace('_', ' '):{width}s}  {first}")
            lines += [f"  {'':{width}s}  {other}" for other in others]
    return "\n".join(lines)


def _words(fact: Any) -> list[str]:
    if isinstance(fact, dict):
        return [f"{name}: {value}" for name, value in fact.items()]
    if isinstance(fact, list):
        return [", ".join(map(str, fact)) or "none"]
    if isinstance(fact, bool) or fact is None:
        return [{True: "yes", False: "no", None: "unknown"}[fact]]
    return [str(fact)]
