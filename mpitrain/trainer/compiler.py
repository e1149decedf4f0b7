"""Optimizers without an import of torch's compiler.

torch imports ``torch._dynamo`` when the first optimizer is made, to mark four methods of an optimizer as not to be
compiled. The import takes 1.1 s on every rank, and a run whose model is not compiled has no use for it. This module
therefore marks the methods itself, without the import. If the model itself imports the compiler, before or afterwards,
its optimizers behave as without this module.
"""

from __future__ import annotations

import sys

import torch

COMPILER = "torch._dynamo"
MARK = "__dynamo_disable"
"""The attribute in which torch (2.6 to 2.13, ``torch._compile``) stores the function it calls instead of a method."""


def do_without_compiler() -> None:
    """Exclude the methods of optimizers from ``torch.compile``, unless the compiler has been imported already."""
    if COMPILER in sys.modules:
        return
    for method in vars(torch.optim.Optimizer).values():
        marked = getattr(method, "__wrapped__", None)
        is_torchs = getattr(method, "__globals__", {}).get("__name__") == "torch._compile"
        if marked is not None and is_torchs and not hasattr(marked, MARK):
            setattr(marked, MARK, marked)
