"""Parameters and gradients as vectors, and their layout."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpitrain import UsageError
from mpitrain.optimizer.flat import FlatParameters, for_each_state_tensor
from mpitrain.optimizer.layout import FlatLayout

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
shapes = st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=1, max_size=6)


def numbered(*shapes, dtype=torch.float32):
    """Return parameters that hold 1, 2, 3, ..., so that every element has a value of its own."""
    made, end = [], 0
    for shape in shapes:
        n = int(np.prod(shape))
        values = torch.arange(end + 1, end + n + 1, dtype=torch.float64).to(dtype).reshape(shape)
        made.append(nn.Parameter(values))
        end += n
    return made


def attached(parameters, *, staged=False):
    layout = FlatLayout([{"params": parameters}])
    x, g = np.zeros((2, layout.n), layout.dtype)
    return FlatParameters(layout, x, g, staged=staged), x, g


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@given(shapes=shapes)
def test_parameters_keep_their_values(dtype, staged, shapes):
    if not any(np.prod(shape) for shape in shapes):
        shapes = [*shapes, (1,)]
    parameters = numbered(*shapes, dtype=dtype)
    before = [p.detach().clone() for p in parameters]
    flat, x, _ = attached(parameters, staged=staged)
    for parameter, wanted in zip(parameters, before, strict=True):
        assert torch.equal(parameter, wanted)
    in_order = np.concatenate([b.double().numpy().ravel() for b in before])
    values = x.astype(np.float64)
    assert np.array_equal(values[values != 0], in_order)  # in their order, with zeros between them
    assert flat.layout.n_parameters == in_order.size
    flat.check_attached()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_every_tensor_begins_on_a_64_byte_boundary(sizes):
    parameters = numbered(*[(n,) for n in sizes])
    attached(parameters)
    base = min(p.data_ptr() for p in parameters)
    assert [(p.data_ptr() - base) % 64 for p in parameters] == [0] * len(sizes)


def test_tensors_are_views_of_the_vector():
    parameters = numbered((2, 3), (4,))
    _, x, g = attached(parameters)
    x[...] = 7
    assert all((p == 7).all() for p in parameters)
    with torch.no_grad():
        parameters[1].fill_(5)
    assert (x[16:20] == 5).all()
    sum((p * p).sum() for p in parameters).backward()
    assert g[:6].tolist() == [14.0] * 6
    assert g[16:20].tolist() == [10.0] * 4
    assert not g[6:16].any()


def test_staged_vectors_are_copied_in_both_directions():
    parameters = numbered((3,))
    flat, x, g = attached(parameters, staged=True)
    assert x[:3].tolist() == [1, 2, 3]
    parameters[0].grad.fill_(4)
    assert not g.any()
    flat.to_host()
    assert g[:3].tolist() == [4, 4, 4]
    x[:3] = 9
    flat.to_device()
    assert parameters[0].tolist() == [9, 9, 9]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_collected_after_zero_grad_of_the_model(set_to_none):
    model = nn.Linear(3, 2)
    flat, _, g = attached(list(model.parameters()))
    model(torch.ones(1, 3)).sum().backward()
    model.zero_grad(set_to_none=set_to_none)
    model(2 * torch.ones(1, 3)).sum().backward()
    flat.collect_gradients()
    assert g[:6].tolist() == [2.0] * 6
    assert g[16:18].tolist() == [1.0] * 2
    assert model.weight.grad.data_ptr() == g.ctypes.data


def test_a_missing_gradient_is_zero():
    parameters = numbered((3,), (2,))
    flat, _, g = attached(parameters)
    g[...] = 1
    parameters[1].grad = None
    flat.collect_gradients()
    assert g[:3].tolist() == [1, 1, 1]
    assert g[16:18].tolist() == [0, 0]
    assert parameters[1].grad.tolist() == [0, 0]


def test_zeroing_gradients_keeps_them_in_the_vector():
    parameters = numbered((3,))
    flat, _, g = attached(parameters)
    parameters[0].grad = torch.ones(3)
    flat.zero_gradients()
    (3 * parameters[0]).sum().backward()
    assert g[:3].tolist() == [3, 3, 3]


def test_tied_weights_occur_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    flat, x, _ = attached(list(model.parameters()))
    assert flat.layout.n_parameters == 16
    x[...] = 0.5
    assert (second.weight == 0.5).all()
    assert first.weight is second.weight


def test_groups_are_slices():
    a, b, c, d = numbered((3,), (20,), (2, 2), (5,))
    d.requires_grad_(False)
    layout = FlatLayout([{"params": [a, b]}, {"params": [d]}, {"params": [c]}])
    assert layout.group_slices == [slice(0, 48), slice(48, 48), slice(48, 64)]
    assert layout.n == 64
    assert layout.n_parameters == 27


def test_frozen_parameters_stay_where_they_are():
    trained, frozen = numbered((2,), (3,))
    frozen.requires_grad_(False)
    where = frozen.data_ptr()
    attached([trained, frozen])
    assert frozen.data_ptr() == where
    assert frozen.tolist() == [3, 4, 5]


def test_parameters_are_swapped_inside_the_block_only():
    parameters = numbered((2,), (3,))
    flat, x, _ = attached(parameters)
    other = np.full(flat.layout.n, 9, np.float32)
    with flat.swapped_parameters(other):
        assert parameters[1].tolist() == [9, 9, 9]
    assert parameters[1].tolist() == [3, 4, 5]
    with pytest.raises(KeyError), flat.swapped_parameters(other):
        raise KeyError
    assert parameters[0].tolist() == [1, 2]
    assert x[:2].tolist() == [1, 2]
    flat.check_attached()


def test_detached_parameters_keep_their_values_in_memory_of_their_own():
    parameters = numbered((2,), (3,))
    flat, x, _ = attached(parameters)
    flat.detach()
    x[...] = 0
    assert parameters[1].tolist() == [3, 4, 5]
    assert all(p.grad is None for p in parameters)


def test_gradients_are_reported_until_the_parameters_are_detached():
    model = nn.Linear(3, 2)
    flat, _, g = attached(list(model.parameters()))
    parts = (slice(0, 6), slice(16, 18))
    reports = []
    flat.watch_gradients(lambda layer: reports.append((layer, g[parts[layer]].tolist())), lambda: reports.append("end"))
    for factor in (1.0, 3.0):
        flat.release_gradients()
        (factor * model(torch.ones(1, 3))).sum().backward()
        assert sorted(reports[:2]) == [(0, [factor] * 6), (1, [factor] * 2)]
        assert reports[2:] == ["end"]
        reports.clear()
    flat.detach()
    model(torch.ones(1, 3)).sum().backward()
    assert reports == []


@pytest.mark.parametrize(
    "move", [lambda m: m.double(), lambda m: m.half(), lambda m: setattr(m.weight, "data", m.weight.data.clone())]
)
def test_a_model_moved_afterwards_is_noticed(move):
    model = nn.Linear(3, 2)
    flat, _, _ = attached(list(model.parameters()))
    model.float()  # moves nothing
    flat.check_attached()
    move(model)
    with pytest.raises(UsageError, match="moved or converted after"):
        flat.check_attached()


def one_line(error):
    return "\n" not in str(error.value)


def test_parameters_of_several_types_are_refused():
    with pytest.raises(UsageError, match=r"torch\.float16, torch\.float32.*model\.float\(\)") as error:
        FlatLayout([{"params": [*numbered((2,)), *numbered((2,), dtype=torch.float16)]}])
    assert one_line(error)


def test_parameters_that_are_not_real_are_refused():
    with pytest.raises(UsageError, match=r"torch\.complex64, not floating point") as error:
        FlatLayout([{"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}])
    assert one_line(error)


def test_integers_are_not_trainable_parameters():
    whole = nn.Parameter(torch.arange(3), requires_grad=False)
    with pytest.raises(UsageError, match="no trainable parameter") as error:
        FlatLayout([{"params": [whole]}])
    assert one_line(error)
    flat, _, _ = attached([whole, *numbered((2,))])
    assert flat.layout.n_parameters == 2
    assert whole.tolist() == [0, 1, 2]


def test_state_tensors_are_visited_as_bytes_and_written_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(torch.bfloat16)
    model.register_buffer("flags", torch.tensor([True, False]))
    model.register_buffer("empty", torch.zeros(0))
    model[0].weight.data = model[0].weight.data.t()  # not contiguous
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []

    def keep(raw):
        assert raw.dtype == np.uint8
        seen.append(raw.copy())

    for_each_state_tensor(model, keep)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    recorded = iter(seen)
    for_each_state_tensor(model, lambda raw: np.copyto(raw, next(recorded)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
