"""Models in safetensors files, which torch and other libraries load without mpitrain.

model.load_state_dict(safetensors.torch.load_file("RUN/model.safetensors"))
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from mpitrain.records.durable import replace_for_user


def write_model(path: Path, state: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Write the tensors of a ``state_dict``, in place of the file at ``path`` if there is one. Local.

    Tensors that share memory are stored once for each name, so that a plain ``load_state_dict`` finds all names.
    Entries that are not tensors are left out.

    Args:
        path: The file; its folder must exist.
        state: Tensors by name, on any device.
        metadata: Further values, which are stored as text.

    Raises:
        UsageError: The file cannot be written. ``path`` is unchanged.
    """
    tensors = {name: value.detach().cpu().clone() for name, value in state.items() if hasattr(value, "detach")}
    content = save(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        {"format": "pt", **{key: str(value) for key, value in metadata.items()}},
    )
    replace_for_user(path, content)
