"""Re-estimation of BatchNorm statistics."""

import pytest
import torch
from torch import nn

from mpitrain.models import build, has_batchnorm, reestimate

X = torch.randn(48, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 2


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=0.3))


def test_statistics_are_the_means_over_batches():
    model = net()
    model(X * 100)  # leaves statistics behind
    batches = X.split(16)
    reestimate(model, ((x, torch.zeros(16)) for x in batches))
    first, conv, second = model[0], model[2], model[3]

    def mean(values):
        return torch.stack(list(values)).mean(0)

    torch.testing.assert_close(first.running_mean, mean(x.mean((0, 2, 3)) for x in batches))
    torch.testing.assert_close(first.running_var, mean(x.var((0, 2, 3), unbiased=True) for x in batches))
    with torch.no_grad():  # the second layer sees what the first normalised by the batch, without dropout
        normalised = [
            (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + first.eps).sqrt()
            for x in batches
        ]
        features = [conv(x) for x in normalised]
    torch.testing.assert_close(second.running_mean, mean(y.mean((0, 2, 3)) for y in features), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second.running_var, mean(y.var((0, 2, 3)) for y in features), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_modes_momenta_weights_gradients_and_random_state_are_unchanged(training):
    model = net().train(training)
    model[2].eval()  # frozen by hand
    before = {name: p.clone() for name, p in model.named_parameters()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    reestimate(model, X.split(16))
    assert [module.training for module in model.modules()] == modes
    assert [model[0].momentum, model[3].momentum] == [0.1, 0.3]
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_restores_modes_too():
    model = net()
    with pytest.raises(RuntimeError):
        reestimate(model, [X, X[:, :2]])
    assert all(module.training for module in model.modules())
    assert model[3].momentum == 0.3


def test_without_batchnorm_no_batch_is_read():
    def batches():
        raise AssertionError
        yield

    for model in (nn.Linear(2, 2), nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3)):
        assert not has_batchnorm(model)
        reestimate(model, batches())


def test_no_batch_is_an_error_and_the_model_is_unchanged():
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="at least one"):
        reestimate(model, [])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_evaluation_matches_training_mode_on_the_same_batch():
    model = build("resnet20", shape=(3, 8, 8), n_classes=3, seed=0)
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert has_batchnorm(model)
    with torch.no_grad():
        trained = model(x)  # training mode: normalised by the batch
        reestimate(model, [x])
        evaluated = model.eval()(x)
    torch.testing.assert_close(evaluated, trained, atol=0.02, rtol=0.02)  # but for the n / (n - 1) of the variance
