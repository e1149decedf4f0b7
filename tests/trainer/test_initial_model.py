"""A new run begins with the model of a run or a file, or says in one line why it cannot."""

import numpy as np
import pytest
import torch
from support.lone_world import LoneWorld
from torch import nn

from mpitrain import UsageError
from mpitrain.optimizer.layout import FlatLayout
from mpitrain.optimizer.state import describe
from mpitrain.trainer import initial_model
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.loop import train
from mpitrain.trainer.run import Hook


def small():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_a_state_dict_of_torch_is_loaded(tmp_path, prefix, key):
    source, target = small(), small()
    saved = {prefix + name: value for name, value in tensors(source).items()}
    torch.save(saved if key is None else {key: saved, "epoch": 3}, tmp_path / "model.pt")
    initial_model.load(tmp_path / "model.pt", target, LoneWorld())
    assert equal(tensors(source), tensors(target))


def without(name):
    return lambda values: values.pop(name)


REFUSED = {
    "missing": (without("2.bias"), r"2\.bias is absent there and \(2,\) in this model"),
    "unknown": (lambda values: values.update(extra=torch.ones(1)), r"extra is \(1,\) there and absent in this model"),
    "shape": (
        lambda values: values.update({"0.weight": torch.ones(5, 4)}),
        r"0\.weight is \(5, 4\) there and \(5, 3\)",
    ),
    "nan": (lambda values: values["0.bias"].fill_(float("nan")), r"0\.bias has values that are not finite"),
    "no tensor": (lambda values: values.update(extra="text"), "holds no state_dict"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_another_model_is_one_line_and_changes_nothing(tmp_path, change, words):
    target = small()
    before, saved = tensors(target), tensors(small())
    change(saved)
    torch.save(saved, tmp_path / "model.pt")
    with pytest.raises(UsageError, match=words) as error:
        initial_model.load(tmp_path / "model.pt", target, LoneWorld())
    assert "\n" not in str(error.value)
    assert equal(before, tensors(target))


def test_a_format_that_needs_a_package_names_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"pip install safetensors|cannot be read as a model"):
        initial_model.load(tmp_path / "model.safetensors", small(), LoneWorld())


def test_code_in_a_file_does_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (print, ("this must not run",))

    torch.save({"weight": Harmful()}, tmp_path / "model.pt")
    with pytest.raises(UsageError, match="cannot be read as a model") as error:
        initial_model.load(tmp_path / "model.pt", small(), LoneWorld())
    assert "\n" not in str(error.value)


def test_parameters_are_found_in_a_vector_where_the_layout_places_them():
    model = small().double()
    layout = FlatLayout([{"params": list(model.parameters())}])
    vector = np.zeros(layout.n)
    for place in layout.places:
        place.view(torch.from_numpy(vector)).copy_(place.parameter.detach())
    found = dict(initial_model.unflatten(vector, describe(layout, model), 8))
    assert equal(found, dict(model.named_parameters()))


class Beginning(Hook):
    def on_start(self, run):
        self.vector = run.optimizer.consensus_vector().copy()
        run.world.barrier()  # until then no rank moves it

    def on_end(self, run):
        self.end = run.optimizer.consensus_vector().copy()


TINY = {"data": "synthetic:n=96,shape=64,classes=10", "model": "support.small_models:watched", "batch_size": 8}


@pytest.mark.ranks(2)
def test_a_run_begins_with_what_another_one_has_evaluated(world, mpi_tmp_path):
    first, second = Beginning(), Beginning()
    run, other = str(mpi_tmp_path / "run"), str(mpi_tmp_path / "other")
    config = TrainConfig("easgd", **TINY, steps=7, quiet=True, out=run)
    end = train(config, world, hooks=[first])
    config = TrainConfig("gossip", **TINY, steps=1, quiet=True, out=other, init_from=run, seed=5)
    begin = train(config, world, hooks=[second])
    np.testing.assert_array_equal(second.vector, first.end)
    assert begin["evaluation"][0]["test_accuracy"] == end["test_accuracy"]


class Tied(nn.Module):
    """A model whose last layer shares the weight of the first, which a run stores once."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.last.weight = self.first.weight


def test_tied_weights_may_be_stored_under_one_name():
    value = torch.arange(15.0).reshape(5, 3)
    model = Tied()
    initial_model.fill(model, {"first.weight": value}, "file")
    assert torch.equal(model.last.weight, value)
    other = Tied()
    other.last.weight = nn.Parameter(torch.zeros(5, 3))
    with pytest.raises(UsageError, match=r"last\.weight is absent there"):
        initial_model.fill(other, {"first.weight": value}, "file")
