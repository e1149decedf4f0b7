"""DistributedOptimizer with vectors in device memory: its results, and the order of the GPU's streams."""

import numpy as np
import pytest
import torch
from support.on_gpus import TRANSPORTS, gpus
from support.on_ranks import ranks
from torch import nn

from mpitrain import EAMSGD, EASGD, AllReduceSGD, Average, DistributedOptimizer, GossipSGD, RobustSGD
from mpitrain.kernels import gpu

pytestmark = [pytest.mark.ranks(3), pytest.mark.time_limit(180)]

STEPS = 12
WHERE = [(1, transport) for transport in TRANSPORTS] + [(2, "ipc"), (2, "staged")]


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).to(dtype)


def numbers(model):
    return np.concatenate([p.detach().double().numpy().ravel() for p in model.parameters()])


def batch(rank, t, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * rank + t)
    return (
        torch.randn(8, 6, generator=generator).to(dtype),
        torch.randint(4, (8,), generator=generator),
    )


def train(comm, method, steps=STEPS, dtype=torch.float32, set_to_none=True, **options):
    """Return this rank's parameters and the consensus. Collective."""
    model = mlp(dtype)
    momentum = 0.0 if method.owns_update else 0.9
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, weight_decay=0.01)
    with DistributedOptimizer(base, model, method, world=comm.world, **options) as optimizer:
        assert gpu.is_device(optimizer._parts.replica.group.x.local) == (comm._gpu is not None and not method.on_host)
        for t in range(steps):
            x, y = batch(comm.rank, t, dtype)
            optimizer.zero_grad(set_to_none)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        comm.world.barrier()
        evaluated = optimizer.consensus_vector().astype(np.float64)
        distance, _ = optimizer.spread(optimizer.consensus_vector())
        with optimizer.consensus():
            shown = numbers(model)
        comm.world.barrier()
    assert type(evaluated) is np.ndarray
    assert np.isfinite(distance)
    return numbers(model), shown


SYNCHRONOUS = {
    "allreduce": AllReduceSGD(),
    "easgd": EASGD(synchronous=True, period=3),
    "eamsgd": EAMSGD(synchronous=True, period=3, momentum=0.9),
}


@pytest.mark.parametrize(
    ("name", "where"),
    [("allreduce", where) for where in WHERE] + [("easgd", (1, "ipc")), ("eamsgd", (2, "staged"))],
    ids=str,
)
def test_gpus_and_hosts_agree(world, name, where):
    with ranks(where[0]) as comm:
        wanted = train(comm, SYNCHRONOUS[name])
    with gpus(*where) as comm:
        found = train(comm, SYNCHRONOUS[name])
    # Both round each operation to float32; torch's step and the fused one group them differently.
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("where", [(1, "ipc"), (1, "staged")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_every_type_can_be_views_of_device_memory(world, dtype, where):
    with gpus(*where) as comm:
        found, _ = train(comm, EASGD(period=2), 4, dtype)
    assert np.isfinite(found).all()
    assert np.abs(found - numbers(mlp(dtype))).max() > 1e-3


@pytest.mark.parametrize(("overlap", "where"), [(False, where) for where in WHERE] + [(True, (2, "staged"))], ids=str)
def test_asynchronous_workers_stay_together(world, where, overlap):
    with gpus(*where) as comm:
        found, center = train(comm, EASGD(period=2, overlap=overlap), 20)
        centers = comm.world.comm.allgather(center)
    assert np.abs(found - center).max() < 1.0
    if not overlap:  # else other ranks may still change the center
        assert all(np.array_equal(c, centers[0]) for c in centers)
    assert np.abs(center - numbers(mlp())).max() > 1e-3


@pytest.mark.parametrize("where", [(1, "ipc"), (2, "staged")], ids=str)
def test_gossip_and_an_average_of_the_iterates(world, where):
    with gpus(*where) as comm:
        found, evaluated = train(comm, GossipSGD(), 8, average=Average("polyak"))
    assert np.isfinite(found).all()
    assert np.isfinite(evaluated).all()


def test_a_method_that_computes_on_the_host_has_its_vectors_there(world):
    with ranks(1) as comm:
        wanted = train(comm, RobustSGD())
    with gpus(1, "ipc") as comm:
        found = train(comm, RobustSGD())
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_state_from_a_gpu_loads_on_a_host(world, transport):
    def run(comm, steps, state=None):
        model = mlp()
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with DistributedOptimizer(base, model, EASGD(synchronous=True, period=3), world=comm.world) as optimizer:
            if state is not None:
                optimizer.load_state_dict(state)
            for t in steps:
                x, y = batch(comm.rank, t)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            return numbers(model), optimizer.state_dict()

    with gpus(1, transport) as comm:
        whole, _ = run(comm, range(10))
        _, state = run(comm, range(4))
        assert state["parameters"].device.type == "cpu"
        tensors = [value for value in state["method"].values() if isinstance(value, torch.Tensor)]
        assert all(tensor.device.type == "cpu" for tensor in tensors)
        resumed, _ = run(comm, range(4, 10), state)
    with ranks(1) as comm:
        on_hosts, _ = run(comm, range(4, 10), state)
    np.testing.assert_array_equal(resumed, whole)
    np.testing.assert_allclose(on_hosts, whole, rtol=2e-5, atol=2e-6)


class Late(torch.optim.SGD):
    """Its step is done when something waits for the compute stream; until then the parameters are NaN."""

    def __init__(self, parameters, device, **options):
        super().__init__(parameters, **options)
        self._device = device

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        held = [(p, p.detach().clone(), p.grad.detach().clone()) for p in parameters]
        eta = self.param_groups[0]["lr"]

        def arrive():
            with torch.no_grad():
                for p, before, gradient in held:
                    p.copy_(before - eta * gradient)

        for p, _, _ in held:
            p.fill_(float("nan"))
        self._device.compute.begin(arrive)


@pytest.mark.parametrize("where", WHERE, ids=str)
@pytest.mark.parametrize("method", [EASGD(period=1, grad_point="post"), GossipSGD("push", period=1, grad_point="post")])
def test_an_exchange_waits_for_the_compute_stream(world, method, where):
    with gpus(*where) as comm:
        model = mlp()
        base = Late(model.parameters(), comm.world.gpu, lr=0.1)
        with DistributedOptimizer(base, model, method, world=comm.world) as optimizer:
            for t in range(3):
                x, y = batch(comm.rank, t)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                assert np.isfinite(numbers(model)).all()
            comm.world.barrier()
            assert np.isfinite(optimizer.consensus_vector()).all()
            assert optimizer.statistics.n_nonfinite == 0


@pytest.mark.parametrize("where", WHERE, ids=str)
def test_an_exchange_waits_for_gradients(world, where):
    """The vector of gradients holds NaN until the compute stream has written it."""
    with gpus(*where) as comm:
        model = mlp()
        base = torch.optim.SGD(model.parameters(), lr=1.0)
        before = numbers(model)
        with DistributedOptimizer(base, model, AllReduceSGD(), world=comm.world) as optimizer:
            optimizer.zero_grad(set_to_none=False)
            gradients = [p.grad for p in model.parameters()]

            def arrive():
                for gradient in gradients:
                    gradient.fill_(comm.rank + 1.0)

            for gradient in gradients:
                gradient.fill_(float("nan"))
            comm.world.gpu.compute.begin(arrive)
            optimizer.step()
            mean = sum(range(1, comm.size + 1)) / comm.size
            np.testing.assert_allclose(numbers(model), before - mean, rtol=1e-6, atol=1e-6)


def test_replica_groups_train_on_gpus_through_host_memory(world):
    with gpus(1, "ipc") as comm:
        size = comm.size
        model = mlp()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        with DistributedOptimizer(base, model, EASGD(period=1), world=comm.world, replica_size=size) as optimizer:
            x, y = batch(comm.rank, 0)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            of_all = comm.world.comm.allgather(numbers(model))
    assert all(np.array_equal(vector, of_all[0]) for vector in of_all)


def test_a_model_on_another_device_is_refused(world):
    from mpitrain import UsageError

    with gpus(1, "ipc") as comm:
        model = mlp().to("meta")
        with pytest.raises(
            UsageError, match=r"the model is on meta and this rank on cpu: call model.to\(world.device\)"
        ):
            DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, EASGD(), world=comm.world)
