"""What a script does to parameters by hand has the effect that it has in one process, or is refused.

With the same data on every rank, all-reduce SGD equals the wrapped optimizer, whatever the script does in between.
"""

import copy

import pytest
import torch
from torch import nn

from mpitrain import EASGD, AllReduceSGD, DistributedOptimizer, UsageError

# The first optimizer imports a large part of torch, which is slow where ranks share a core.
pytestmark = [pytest.mark.ranks(2), pytest.mark.time_limit(180)]

X = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(12, 5)
SHARED = AllReduceSGD(node_shared=True)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)).double()


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})


def backward(model, optimizer):
    optimizer.zero_grad()
    (model(X) - X.sin()).square().mean().backward()


def decay(model, optimizer):
    """Decay a weight in place after the step."""
    backward(model, optimizer)
    optimizer.step()
    with torch.no_grad():
        model[0].weight.mul_(0.99)


def clamp_data(model, optimizer):
    """Clip the weights as WGAN does."""
    backward(model, optimizer)
    optimizer.step()
    for parameter in model.parameters():
        parameter.data.clamp_(-0.2, 0.2)


def ascend_and_descend(model, optimizer):
    """Make the two steps of sharpness-aware minimization."""
    backward(model, optimizer)
    with torch.no_grad():
        moves = [0.05 * parameter.grad / parameter.grad.norm() for parameter in model.parameters()]
        for parameter, move in zip(model.parameters(), moves, strict=True):
            parameter.add_(move)
    backward(model, optimizer)
    with torch.no_grad():
        for parameter, move in zip(model.parameters(), moves, strict=True):
            parameter.sub_(move)
    optimizer.step()


def initialize_again(model, optimizer):
    """Draw a layer anew after the optimizer is made."""
    torch.manual_seed(3)
    nn.init.normal_(model[2].weight)
    backward(model, optimizer)
    optimizer.step()


def load_weights(model, optimizer):
    """Load weights after the optimizer is made."""
    state = {name: tensor.clone().mul_(0.9) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    backward(model, optimizer)
    optimizer.step()


def average_in_place(model, optimizer):
    """Move the parameters towards their own running average."""
    backward(model, optimizer)
    optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.lerp_(0.5 * parameter, 0.1)


BY_HAND = [decay, clamp_data, ascend_and_descend, initialize_again, load_weights, average_in_place]
METHODS = {"allreduce": AllReduceSGD(), "overlap": AllReduceSGD(overlap=True)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("act", BY_HAND, ids=lambda act: act.__name__)
def test_a_change_by_hand_is_that_of_one_process(world, act, method):
    alone, ours = mlp(), mlp()
    base = sgd(alone)
    with DistributedOptimizer(sgd(ours), ours, METHODS[method]) as optimizer:
        for _ in range(6):
            act(alone, base)
            act(ours, optimizer)
        for wanted, found in zip(alone.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)
        of_all = world.comm.allgather([p.detach().numpy().tobytes() for p in ours.parameters()])
        assert all(found == of_all[0] for found in of_all)


@pytest.mark.parametrize("method", [AllReduceSGD(), EASGD(period=100)], ids=["allreduce", "easgd"])
def test_fifty_decays_by_hand_are_fifty_and_not_fifty_per_rank(world, method):
    model = mlp()
    before = model[0].weight.detach().norm()
    with DistributedOptimizer(sgd(model, lr=0.0), model, method) as optimizer:
        for _ in range(50):
            decay(model, optimizer)
        assert float(model[0].weight.detach().norm() / before) == pytest.approx(0.99**50, rel=1e-12)


@pytest.mark.parametrize("act", BY_HAND, ids=lambda act: act.__name__)
def test_a_change_by_hand_of_shared_parameters_is_refused(world, act):
    model = mlp()
    optimizer = DistributedOptimizer(sgd(model), model, SHARED)
    step = optimizer.step

    def step_together():
        step()
        world.barrier()  # otherwise a rank may see the change of another as the result of the step

    optimizer.step = step_together

    def act_twice():
        act(model, optimizer)
        act(model, optimizer)

    with pytest.raises(UsageError, match=r"parameter [02]\.(weight|bias) was changed outside .*node_shared=F") as error:
        act_twice()
    assert "\n" not in str(error.value)
    world.barrier()
    optimizer.load_state_dict(optimizer.state_dict())  # the values are accepted
    optimizer.close()


def test_shared_parameters_are_changed_by_nobody_else_in_a_plain_run(world):
    alone, ours = mlp(), mlp()
    base = sgd(alone)
    with DistributedOptimizer(sgd(ours), ours, SHARED) as optimizer:
        for t in range(6):
            for model, one in ((alone, base), (ours, optimizer)):
                backward(model, one)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                one.step()
            with optimizer.consensus(), torch.no_grad():
                ours[0].weight.mul_(2.0)  # of the consensus, which is dropped
            if t == 3:
                optimizer.load_state_dict(optimizer.state_dict())
        optimizer.finalize()
        backward(ours, optimizer)
        optimizer.step()
        backward(alone, base)
        base.step()
        for wanted, found in zip(alone.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)),
        lambda: nn.utils.spectral_norm(nn.Linear(5, 5)),
    ],
    ids=["spectral_norm", "weight_norm", "old_spectral_norm"],
)
@pytest.mark.parametrize("method", [AllReduceSGD(), SHARED], ids=["own", "shared"])
def test_layers_that_compute_their_weights_train_as_in_one_process(world, layer, method):
    torch.manual_seed(0)
    alone = nn.Sequential(layer(), nn.Tanh(), nn.Linear(5, 5)).double()
    ours = copy.deepcopy(alone)
    base = sgd(alone)
    with DistributedOptimizer(sgd(ours), ours, method) as optimizer:
        for _ in range(4):
            for model, one in ((alone, base), (ours, optimizer)):
                backward(model, one)
                one.step()
        for wanted, found in zip(alone.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_parameters_that_share_memory_without_being_one_are_refused(world):
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(UsageError, match=r"0\.weight and 1\.weight share memory.*one parameter") as error:
        DistributedOptimizer(sgd(model), model, AllReduceSGD())
    assert "\n" not in str(error.value)
    model[1].weight = model[0].weight
    DistributedOptimizer(sgd(model), model, AllReduceSGD()).close()


def test_a_buffer_that_is_a_view_of_a_parameter_is_refused(world):
    model = nn.Linear(5, 5)
    model.register_buffer("row", model.weight.data[2])
    with pytest.raises(UsageError, match="weight and row share memory"):
        DistributedOptimizer(sgd(model), model, EASGD())


@pytest.mark.parametrize(
    "method",
    [AllReduceSGD(), AllReduceSGD(overlap=True), SHARED, EASGD(period=100)],
    ids=["allreduce", "overlap", "shared", "easgd"],
)
@pytest.mark.parametrize("make", [sgd, lambda model: torch.optim.Adam(model.parameters())], ids=["sgd", "adam"])
def test_sparse_gradients_are_converted_and_said_so_once(world, make, method, caplog):
    def embedding(sparse):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(8, 3, sparse=sparse), nn.Linear(3, 2)).double()

    def train(model, optimizer):
        for t in range(4):
            optimizer.zero_grad()
            model(torch.tensor([t, 3, 3])).square().sum().backward()
            optimizer.step()

    dense, sparse = embedding(False), embedding(True)
    train(dense, make(dense))
    with DistributedOptimizer(make(sparse), sparse, method) as optimizer:
        train(sparse, optimizer)
        for wanted, found in zip(dense.parameters(), sparse.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)
    said = [record for record in caplog.records if "sparse gradient" in record.getMessage()]
    assert len(said) == (world.rank == 0)


@pytest.mark.parametrize("name", ["SparseAdam", "LBFGS"])
def test_optimizers_that_cannot_be_distributed_are_refused(world, name):
    model = mlp()
    with pytest.raises(UsageError, match=rf"{name} .*: use .*torch\.optim\.") as error:
        DistributedOptimizer(getattr(torch.optim, name)(model.parameters()), model, EASGD())
    assert "\n" not in str(error.value)
