"""The mini-batches of one rank: drawn, augmented and moved to its device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mpitrain import data, models
from mpitrain.collectives.world.agreement import require_equal
from mpitrain.collectives.world.world import World
from mpitrain.data.imported import ImportedDataset, load_imported
from mpitrain.data.node_agreement import all_ok
from mpitrain.data.sampler import torch_seed
from mpitrain.data.worker_processes import WorkerProcesses
from mpitrain.errors import UsageError
from mpitrain.models.imported import imported
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.data_options import BUILT_IN, is_imported


def widened(outputs: torch.Tensor) -> torch.Tensor:
    """Return the outputs of a model in at least 32 bits."""
    return outputs.float() if outputs.dtype.itemsize < 4 else outputs


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy, computed in float32 or float64.

    Args:
        logits: (b, classes), or (b, T, classes) for the tokens of a text, of any floating-point type.
        labels: (b,) or (b, T) integers.

    Raises:
        UsageError: The logits have another shape.
    """
    if logits.shape[:-1] != labels.shape:
        raise UsageError(
            f"the model returns {tuple(logits.shape)} for labels {tuple(labels.shape)}: it must return a row of "
            "logits for each label"
        )
    return torch.nn.functional.cross_entropy(widened(logits).flatten(0, -2), labels.flatten())


def to_model(inputs: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Return inputs on a device, numbers in the type of the model; whole numbers, such as tokens, keep their type."""
    return inputs.to(device, dtype if inputs.is_floating_point() else None)


def load(config: TrainConfig, world: data.World) -> data.Dataset:
    """Return the data set of a run. Collective over the ranks of each node."""
    if is_imported(config.data):
        function = imported("data", config.data, otherwise=f"use one of {', '.join(BUILT_IN)}, or a file")
        return load_imported(config.data, function)
    return data.load(
        config.data,
        world=world,
        sampling=config.sampling,
        verify=config.verify,
        context=models.context_of(config.model, config.model_settings),
    )


def build_model(config: TrainConfig, dataset: data.Dataset, n_outputs: int) -> torch.nn.Module:
    """Return the initial model of a run. Local; all ranks get the same."""
    return models.build(
        config.model,
        shape=dataset.shape,
        n_classes=n_outputs,
        seed=config.seed,
        settings=config.model_settings,
        on_tokens=dataset.has_tokens,
    )


class Batches:
    """The training data of a rank. Collective over the ranks of a node to create.

    Args:
        config: The options of the run.
        world: The ranks.
        dataset: The data set, if it is loaded already.

    Attributes:
        dataset: Training and test samples.
        steps_per_epoch: Steps of each rank in an epoch.
        rng: The random generator of the augmentation.
        dtype: The type of the inputs. After ``fit``, it is the type of the model's parameters.
        identity: The sizes and the digest of the data set; they are the same on all nodes.

    Raises:
        UsageError: The data cannot be loaded, or differ between nodes.
    """

    def __init__(self, config: TrainConfig, world: World, dataset: data.Dataset | None = None) -> None:
        self._config, self._device = config, world.device
        self.dataset = dataset or load(config, world)
        self.identity = _identity_on_all(self.dataset, world)
        if config.augment and not self.dataset.augmentable:
            raise UsageError(f"--augment needs photographs of 28x28 pixels or more, which {config.data} does not have")
        self._sampler = data.Sampler(
            self.dataset.n_train,
            config.samples_of_rank(world.rank),
            rank=world.rank,
            size=world.size,
            seed=config.seed,
            mode=config.sampling,
            all_sizes=config.samples_of_ranks(world.size),
            labels=self.dataset.labels,
        )
        self.steps_per_epoch = self._sampler.steps_per_epoch
        self.rng = torch.Generator().manual_seed(torch_seed(config.seed * 100_003 + 50_021 + world.rank))
        self.dtype = torch.float32
        self._staged: int | None = None
        self._workers = None
        if config.workers and isinstance(self.dataset, ImportedDataset):
            seed = torch_seed(config.seed * 100_003 + 70_001 + world.rank)
            self._workers = WorkerProcesses(self.dataset, self._indices, config.workers, seed=seed)

    def fit(self, model: torch.nn.Module) -> None:
        """Set the type of the inputs to that of the model's parameters. Local."""
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), self.dtype)

    def draw(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs (b, ...) and labels (b,) of a step of this rank. Local.

        The same step and state of ``rng`` give the same batch.
        """
        epoch = step // self.steps_per_epoch
        if self._config.sampling != "independent" and epoch != self._staged:
            self.dataset.stage(self._sampler.shard(epoch))
            self._staged = epoch
        x, y = self.dataset.batch(self._indices(step)) if self._workers is None else self._workers.batch(step)
        if self._config.augment:
            x = data.augment(x, self.rng)
        return to_model(x, self._device, self.dtype), y.to(self._device)

    def close(self) -> None:
        """End the processes that read batches. Local."""
        if self._workers is not None:
            self._workers.close()

    def _indices(self, step: int) -> NDArray[np.int64]:
        """Return the training samples of a step, (b,)."""
        return self._sampler.indices(*divmod(step, self.steps_per_epoch))


def _identity_on_all(dataset: data.Dataset, world: World) -> data.Identity:
    """Return the identity of a data set, which the first rank of each node computes. Collective.

    Raises:
        UsageError: A node has other data, as when each has a file of its own; on all ranks.
    """
    own = all_ok(world, lambda: data.identity_of(dataset) if world.local_rank == 0 else None)
    identity: data.Identity = world.allgather(own)[world.node_ranks[0]]
    settings = {f"the data ({name})": str(value) for name, value in identity.to_json().items()}
    require_equal(world.allgather, world.rank, settings, remedy="give every node a copy of the same file")
    return identity
