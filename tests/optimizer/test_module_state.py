"""Copies of models and of their state besides the trained parameters."""

import threading

import pytest
import torch
from torch import nn

from mpitrain import UsageError
from mpitrain.optimizer import module_state


class Counting(nn.Module):
    """A module with every kind of state."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("mask", torch.ones(2), persistent=False)
        self.plain = torch.zeros(2)
        self.n_calls = 0
        self.history = []
        self.extra = {"scale": 1.0}

    def forward(self, x):
        if self.training:
            self.n_calls += 1
            self.mean = self.mean + x.mean(0)  # replaced, not changed
            self.mask.mul_(0.5)
            self.plain = self.plain + 1
            self.extra["scale"] += 1
            if "late" not in self._buffers:
                self.register_buffer("late", torch.full((2,), 7.0))
        y = self.layer(x)
        self.history = [y]  # with its gradient function
        return y

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def trained(n=3):
    model = Counting()
    for _ in range(n):
        model(torch.ones(4, 2))
    return model


def test_a_copy_has_the_present_state_and_other_parameters():
    model = trained()
    others = {p: nn.Parameter(torch.zeros_like(p)) for p in model.parameters()}
    copied = module_state.copy_with(model, others)
    assert copied.layer.weight is others[model.layer.weight]
    assert copied.mean.tolist() == [3, 3]
    assert copied.mask.tolist() == [0.125] * 2
    assert copied.plain.tolist() == [3, 3]
    assert copied.late.tolist() == [7, 7]
    assert copied.n_calls == 3
    assert copied.get_extra_state() == {"scale": 4.0}
    copied(torch.ones(4, 2))
    assert model.n_calls == 3
    assert model.extra == {"scale": 4.0}
    assert model.mean.tolist() == [3, 3]
    assert model.mask.tolist() == [0.125] * 2


def test_a_snapshot_is_restored_in_a_copy():
    model = trained()
    kept = module_state.snapshot(model)
    model(torch.ones(4, 2))
    other = Counting()
    module_state.restore(other, kept)
    assert other.mean.tolist() == [3, 3]
    assert other.mask.tolist() == [0.125] * 2
    assert other.plain.tolist() == [3, 3]
    assert other.late.tolist() == [7, 7]
    assert other.n_calls == 3
    assert "mask" not in other.state_dict()
    assert "late" in other.state_dict()


def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(UsageError, match=r"cannot be copied for an evaluation .*__deepcopy__") as error:
        module_state.copy_with(model, {})
    assert "\n" not in str(error.value)


def test_parameters_and_all_buffers_are_state():
    names = [name for name, _ in module_state.state_tensors(Counting())]
    assert names == ["layer.weight", "layer.bias", "mean", "mask"]
