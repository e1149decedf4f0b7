"""The gradient of a step: precision, accumulation and the weight of a rank."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mpitrain import data
from mpitrain.errors import UsageError
from mpitrain.trainer.batches import cross_entropy
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.gradient_pass import GradientPass
from mpitrain.trainer.plan import RunPlan

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3


def computed(*, rank=0, size=1, x=X, y=Y, **options):
    """Return the loss, the gradient of a linear model, and the types and sizes of its outputs."""
    torch.manual_seed(0)
    model, seen = nn.Linear(5, 3), []
    model.register_forward_hook(lambda module, inputs, output: seen.append((output.dtype, len(output))))
    plan, world = RunPlan.of(TrainConfig(**options)), SimpleNamespace(rank=rank, size=size, device="cpu")
    passes = GradientPass(plan, model, SimpleNamespace(loss=cross_entropy), world)
    loss = passes.backward(x, y)
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())
    return float(loss.detach()), torch.cat([p.grad.reshape(-1) for p in model.parameters()]), seen, passes


def test_accumulated_gradients_are_that_of_all_samples():
    loss, gradient, seen, _ = computed(batch_size=12)
    parts_loss, parts_gradient, parts_seen, _ = computed(batch_size=4, accumulate=3)
    assert [size for _, size in seen] == [12]
    assert [size for _, size in parts_seen] == [4, 4, 4]
    assert parts_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(parts_gradient, gradient)


@pytest.mark.parametrize(("precision", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_a_narrow_precision_computes_in_it_and_keeps_the_parameters(precision, bits):
    loss, gradient, _, _ = computed()
    narrow_loss, narrow_gradient, seen, passes = computed(precision=precision)
    assert seen == [(getattr(torch, precision), 12)]
    assert narrow_loss == pytest.approx(loss, rel=2.0**-bits)
    assert narrow_loss != loss
    scale = passes.state()["scale"] if precision == "float16" else 1.0
    torch.testing.assert_close(narrow_gradient / scale, gradient, rtol=0.05, atol=2 * 2.0**-bits)


def test_the_scale_of_float16_gradients_is_saved():
    *_, passes = computed(precision="float16")
    state = passes.state()
    assert state["scale"] == 2.0**16
    *_, other = computed(precision="float16")
    other.load_state({**state, "scale": 8.0})
    assert other.state()["scale"] == 8.0
    assert computed(precision="bfloat16")[-1].state() == {}


def test_the_mean_of_unequal_ranks_is_the_gradient_of_all_samples():
    _, whole, _, _ = computed()
    options = {"algorithm": "allreduce", "batch_size": 4, "batch_sizes": {"1": "8"}, "size": 2}
    _, first, _, _ = computed(rank=0, x=X[:4], y=Y[:4], **options)
    _, second, _, _ = computed(rank=1, x=X[4:], y=Y[4:], **options)
    torch.testing.assert_close((first + second) / 2, whole)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"algorithm": "allreduce"}, [4 / 5, 4 / 5, 8 / 5, 4 / 5]),
        ({"algorithm": "easgd"}, [1, 1, 1, 1]),
        ({"algorithm": "robust"}, [1, 1, 1, 1]),
        ({"algorithm": "easgd", "replica_size": 2}, [1, 1, 4 / 3, 2 / 3]),
        ({"algorithm": "allreduce", "accumulate": 3}, [4 / 5, 4 / 5, 8 / 5, 4 / 5]),
    ],
)
def test_ranks_count_by_their_samples_where_gradients_are_averaged(options, expected):
    plan = RunPlan.of(TrainConfig(batch_size=10, batch_sizes={"2": "20"}, **options))
    assert [plan.gradient_weight(rank, range(4)) for rank in range(4)] == pytest.approx(expected)


def test_samples_of_unequal_ranks_are_counted():
    plan = RunPlan.of(TrainConfig(batch_size=10, batch_sizes={"1": "3"}, accumulate=2))
    assert plan.n_samples([5, 7, 1]) == 2 * (5 * 10 + 7 * 3 + 1 * 10)


@pytest.mark.parametrize("mode", data.MODES)
def test_ranks_with_unequal_batches_draw_from_one_epoch(mode):
    sizes = [3, 5, 2]
    samplers = [
        data.Sampler(47, size, rank=rank, size=3, mode=mode, all_sizes=sizes) for rank, size in enumerate(sizes)
    ]
    assert {sampler.steps_per_epoch for sampler in samplers} == {4}
    drawn = [[sampler.indices(2, step).tolist() for step in range(4)] for sampler in samplers]
    assert [len(batch) for rank in drawn for batch in rank] == [3] * 4 + [5] * 4 + [2] * 4
    if mode == "sharded":
        whole = data.Sampler(47, 10, mode=mode)
        for step in range(4):
            assert np.concatenate([rank[step] for rank in drawn]).tolist() == whole.indices(2, step).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float8"}, "unknown value 'float8': did you mean float"),
        ({"accumulate": 0}, "--accumulate must be 1 or more, not 0"),
        ({"batch_sizes": {"one": "4"}}, "--batch-size-of takes RANK=N, such as --batch-size-of 1=16, not 'one=4'"),
        ({"batch_sizes": {"1": "0"}}, "--batch-size-of takes RANK=N"),
        (
            {"algorithm": "allreduce", "settings": {"overlap": "true"}, "accumulate": 2},
            "sums gradients during the backward pass, before --accumulate has all",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        RunPlan.of(TrainConfig(**options))
