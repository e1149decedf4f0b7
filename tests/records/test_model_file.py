"""A model file holds every tensor by its name, and loads in plain torch."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from mpitrain import UsageError
from mpitrain.records.model_file import write_model


class Tied(nn.Module):
    """A model with tied weights, a buffer that is a view of another, and extra state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5)
        self.out.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(6.0))
        self.register_buffer("part", self.table[1:3])
        self.register_buffer("turned", torch.randn(2, 4).t())
        self.register_buffer("narrow", torch.randn(3).bfloat16())
        self.register_buffer("count", torch.tensor(7))

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        pass


def test_every_tensor_is_loaded_by_its_name(tmp_path):
    torch.manual_seed(0)
    model, other, path = Tied(), Tied(), tmp_path / "model.safetensors"
    write_model(path, model.state_dict(), {"step": 3, "test_loss": 0.5})
    found = load_file(path)
    wanted = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype is value.dtype for name, value in wanted.items())
    other.load_state_dict({**found, "_extra_state": {}})
    assert torch.equal(other.out.weight, model.embedding.weight)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "3", "test_loss": "0.5"}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_model(path, {"a": torch.zeros(2)}, {})
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(UsageError, match=r"cannot write .*model.safetensors .No space left"):
        write_model(path, {"a": torch.ones(2)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
