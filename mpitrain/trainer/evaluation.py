"""Evaluation of a method's consensus (center, average, leader) on the test set, while training goes on.

The evaluated model is a copy with a vector of its own, so an evaluation changes nothing in the training. It is made at
each evaluation by the lead, the first rank alive. Besides the parameters, it contains what the lead's model holds at
that moment: buffers, counters and plain attributes. Averaged parameters have no BatchNorm statistics of their own, so
these are first re-estimated from training data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mpitrain.collectives.world.phases import EVALUATION
from mpitrain.collectives.world.world import World
from mpitrain.data import Dataset
from mpitrain.models import has_batchnorm, reestimate
from mpitrain.optimizer import module_state
from mpitrain.optimizer.flat import FlatParameters
from mpitrain.optimizer.layout import FlatLayout
from mpitrain.optimizer.module_state import ModuleState
from mpitrain.optimizer.phase import phase_of
from mpitrain.trainer.batches import to_model
from mpitrain.trainer.objective import Objective, Score
from mpitrain.trainer.run import Hook, Point, Run

BATCHNORM_SAMPLES = 2000
BATCH = 500
MOST_OUTPUTS = 2**24
"""The most outputs of a model in a batch of an evaluation: for text, tokens times the size of the vocabulary."""

FIELDS = tuple(field.name for field in dataclasses.fields(Point))
N_LOGGED = 1024
"""Evaluations that a lead leaves to the next one."""


class Evaluator:
    """The computation of loss and accuracy on the test set, for any parameter vector.

    Args:
        model: The model, before a DistributedOptimizer moves its parameters.
        dataset: The data set, from ``mpitrain.data.load``.
        device: The device to compute on.
        objective: The loss and the metric.

    Attributes:
        objective: See the argument.
        evaluated: The ``state_dict`` of the model evaluated last; the next evaluation overwrites its tensors.
    """

    def __init__(self, model: torch.nn.Module, dataset: Dataset, device: str, objective: Objective) -> None:
        self.objective = objective
        self._model, self._dataset, self._device = model, dataset, device
        per_sample = dataset.n_outputs * (math.prod(dataset.shape) if dataset.predicts_tokens else 1)
        self._batch = max(1, min(BATCH, MOST_OUTPUTS // per_sample))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        copies = [torch.nn.Parameter(parameter.detach().to(device, copy=True)) for parameter in trained]
        layout = FlatLayout([{"params": copies}])
        self._vector = np.zeros(layout.n, layout.dtype)
        self._flat = FlatParameters(layout, self._vector, np.zeros_like(self._vector))
        self._dtype = layout.torch_dtype
        self._copies = dict(zip(trained, copies, strict=True))
        self._state: ModuleState | None = None
        self.evaluated: dict[str, Any] = {}

    def empty_vector(self) -> np.ndarray:
        """Return an uninitialised vector (n,) for ``evaluate``."""
        return np.empty_like(self._vector)

    def snapshot(self) -> ModuleState:
        """Return copies of the model's buffers and simple attributes, for ``of_another``. Local."""
        return module_state.snapshot(self._model)

    @contextmanager
    def of_another(self, state: ModuleState) -> Iterator[None]:
        """Use a snapshot's buffers and simple attributes in the evaluations inside the block. Local."""
        self._state = state
        try:
            yield
        finally:
            self._state = None

    @torch.no_grad()
    def evaluate(self, vector: np.ndarray) -> Score:
        """Return loss, accuracy and metric of parameters ``vector`` (n,) over the test set. Local."""
        model = self._model_with(vector)
        return self.objective.score(
            (model(to_model(x, self._device, self._dtype)).float(), y.to(self._device))
            for x, y in self._dataset.test_batches(self._batch)
        )

    @torch.no_grad()
    def state_dict(self, vector: np.ndarray) -> dict[str, Any]:
        """Return the ``state_dict`` of the evaluated model, which the next evaluation overwrites. Local."""
        self._model_with(vector)
        return self.evaluated

    def _model_with(self, vector: np.ndarray) -> torch.nn.Module:
        """Return a copy of the model with parameters ``vector`` (n,), in evaluation mode. Local."""
        self._vector[...] = vector
        self._flat.to_device()
        model = module_state.copy_with(self._model, self._copies)
        if self._state is not None:
            module_state.restore(model, self._state)
        if has_batchnorm(model):
            limit = min(BATCHNORM_SAMPLES, self._dataset.n_train)
            batches = self._dataset.train_batches(min(BATCH, limit), limit)
            reestimate(model, (to_model(x, self._device, self._dtype) for x, _ in batches))
        model.eval()
        self.evaluated = model.state_dict()
        return model


class PointLog:
    """A copy of the lead's newest evaluations for other ranks of its node, after its death. Collective to create.

    The memory is never freed. It is allocated only if ranks can survive the death of another rank.

    Args:
        world: The ranks.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._rows: np.ndarray | None = None
        if world.survives_failures:
            self._rows = world.shared_array((N_LOGGED + 1, len(FIELDS)), np.float64)

    def write(self, points: Sequence[Point]) -> None:
        """Store the newest evaluations. Local; lead only."""
        if self._rows is not None:
            newest = points[-N_LOGGED:]
            self._rows[0, 0] = 0
            for row, point in zip(self._rows[1:], newest, strict=False):
                row[:] = [getattr(point, name) for name in FIELDS]
            self._rows[0, 0] = len(newest)

    def read(self) -> list[Point]:
        """Return the evaluations that were stored last, or none if the lead died while it stored them. Local."""
        if self._rows is None:
            return []
        points = []
        for row in self._rows[1 : 1 + int(self._rows[0, 0])]:
            values: dict[str, Any] = {name: float(value) for name, value in zip(FIELDS, row, strict=True)}
            values |= {name: int(values[name]) for name in ("step", "gradients", "bytes")}
            points.append(Point(**values))
        return points


class Evaluations(Hook):
    """The evaluations at the start, during and at the end of a run.

    Args:
        evaluator: The evaluator of this rank.
        world: The ranks.
        deferred: Whether the run stores the consensus at each evaluation, and all ranks evaluate the stored vectors at
            the end.
    """

    def __init__(self, evaluator: Evaluator, world: World, *, deferred: bool) -> None:
        self._evaluator, self._deferred = evaluator, deferred
        self._log = PointLog(world)
        self._last_seconds = 0.0
        self._snapshots: list[np.ndarray] = []  # vectors of the last points, which are not evaluated yet
        self._states: list[ModuleState] = []  # the rest of the model at these points
        self._has_evaluated_end = False  # the last point is the end of the run, after the last exchange

    def on_start(self, run: Run) -> None:
        """Evaluate the initial parameters, unless the run is resumed."""
        self._last_seconds = run.clock.seconds
        if run.is_leader and not run.points:
            self._evaluate(run)

    def on_step(self, run: Run) -> None:
        """Evaluate if an evaluation is due."""
        self._has_evaluated_end = False
        if run.is_leader and run.calendar.evaluation_is_due(run.position, run.clock.seconds - self._last_seconds):
            self._evaluate(run)

    def on_lead(self, run: Run) -> None:
        """Take over the evaluations of the dead lead. Vectors that it had stored for the end are lost."""
        run.points = [] if self._deferred else self._log.read()
        self._last_seconds = run.points[-1].seconds if run.points else run.clock.seconds
        if run.is_ending and run.is_complete:
            self._evaluate_end(run)

    def on_end(self, run: Run) -> None:
        """Evaluate the final consensus, and all stored vectors. Collective."""
        if not run.is_complete:
            return
        if run.is_leader:
            self._evaluate_end(run)
        if self._deferred:
            points = run.points[len(run.points) - len(self._snapshots) :]
            evaluate_deferred(points, self._snapshots, self._states, self._evaluator, run.world)
            self._snapshots.clear()
            self._states.clear()
            for point in points:
                run.hooks.on_evaluation(run, point)

    def state(self, run: Run) -> dict[str, Any]:
        """Return this rank's part of a checkpoint."""
        return {
            "points": [vars(point) for point in run.points],
            "snapshots": self._snapshots,
            "module_states": self._states,
            "has_evaluated_end": self._has_evaluated_end,
        }

    def load_state(self, run: Run, state: dict[str, Any]) -> None:
        """Continue from this rank's part of a checkpoint."""
        if not run.is_leader:  # the part of a rank that had died may be a copy of rank 0's
            return
        run.points = [Point(**point) for point in state["points"]]
        self._log.write(run.points)
        self._snapshots = state.get("snapshots", [])
        self._states = state.get("module_states", [self._evaluator.snapshot() for _ in self._snapshots])
        self._has_evaluated_end = state.get("has_evaluated_end", False)

    def _evaluate(self, run: Run) -> None:
        """Evaluate the consensus, or store it for later, while the clock stands still. Local; lead only."""
        with run.clock.paused(), phase_of(EVALUATION):
            self._last_seconds = run.clock.seconds
            run.report_totals(in_full=True)
            totals, vector = run.counters.totals(), run.optimizer.consensus_vector()
            distance, energy = run.optimizer.spread(vector)
            point = Point(
                seconds=self._last_seconds,
                step=run.step,
                gradients=totals.gradients,
                bytes=totals.bytes,
                epoch=run.position / run.batches.steps_per_epoch,
                consensus_distance=distance,
                elastic_energy=energy,
            )
            run.points.append(point)
            if self._deferred:
                self._snapshots.append(vector.copy())
                self._states.append(self._evaluator.snapshot())
            else:
                point.test_loss, point.test_accuracy, point.test_metric = self._evaluator.evaluate(vector)
                self._log.write(run.points)
                run.hooks.on_evaluation(run, point)

    def _evaluate_end(self, run: Run) -> None:
        """Evaluate the end of the run, when no rank is in a step and the result is exact. Local; lead only."""
        if run.points and run.points[-1].gradients == run.counters.totals().gradients:
            if self._has_evaluated_end:
                return
            run.points.pop()  # an evaluation after the same steps, before the last exchange
            if self._snapshots:
                self._snapshots.pop()
                self._states.pop()
        self._evaluate(run)
        self._has_evaluated_end = True


def evaluate_deferred(
    points: list[Point], vectors: list[np.ndarray], states: list[ModuleState], evaluator: Evaluator, world: World
) -> None:
    """Distribute the lead's vectors over all ranks, evaluate them, and complete the lead's points. Collective.

    Args:
        points, vectors, states: The lead's points, vectors and model states; empty on other ranks.
        evaluator: The evaluator of this rank.
        world: The ranks.
    """
    found: np.ndarray = world.run_on_survivors(
        lambda comm: _evaluate_on(comm, vectors, states, evaluator), "the evaluations of the others"
    )
    for point, scores in zip(points, found, strict=False):
        point.test_loss, point.test_accuracy, point.test_metric = map(float, scores)


def _evaluate_on(comm: Any, vectors: list[np.ndarray], states: list[ModuleState], evaluator: Evaluator) -> np.ndarray:
    """Return loss, accuracy and metric of each vector of the first rank: (n, 3). Collective."""
    rank, size = comm.Get_rank(), comm.Get_size()
    n_points = np.array([len(vectors)], np.int64)
    comm.Bcast(n_points)
    mine = np.zeros((int(n_points[0]), len(Score._fields)))
    for k in range(len(mine)):
        worker = k % size
        if rank == 0 and worker != 0:
            comm.Send(vectors[k].view(np.uint8), worker, k)
            comm.send(states[k], worker, k)
        if rank == worker:
            vector = vectors[k] if rank == 0 else evaluator.empty_vector()
            if rank != 0:
                comm.Recv(vector.view(np.uint8), 0, k)
            with evaluator.of_another(states[k] if rank == 0 else comm.recv(source=0, tag=k)):
                mine[k] = evaluator.evaluate(vector)
    found = np.zeros_like(mine)
    comm.Allreduce(mine, found)
    return found
