"""A start without torch's compiler.

torch imports torch._dynamo when the first optimizer is made, for the sake of a mark: four methods of an optimizer are
not to be compiled. The import takes 1.1 s of every rank, and a run whose model is not compiled needs nothing of it. So
the methods are marked as they are. Where the model has imported the compiler, or does so later, nothing else changes.
"""

from __future__ import annotations

import sys

import torch

COMPILER = "torch._dynamo"
MARK = "__dynamo_disable"
"""Where torch (2.6 to 2.13, ``torch._compile``) keeps what it calls instead of a method."""


def do_without_compiler() -> None:
    """Make optimizers without importing the compiler, unless it has been imported."""
    if COMPILER in sys.modules:
        return
    for method in vars(torch.optim.Optimizer).values():
        marked = getattr(method, "__wrapped__", None)
        is_torchs = getattr(method, "__globals__", {}).get("__name__") == "torch._compile"
        if marked is not None and is_torchs and not hasattr(marked, MARK):
            setattr(marked, MARK, marked)
