"""The training loop behind ``mpitrain train`` and the benchmark harness.

Every rank runs it; no rank waits for another unless the method does. Metrics, the progress bar, evaluation, orders to
all ranks, and checkpoints are hooks (``run.Hook``). At each event, the hooks are called in this order.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mpitrain import data
from mpitrain.algorithms.base.method import Method
from mpitrain.collectives.world.device import share_cores
from mpitrain.collectives.world.survivor_collectives import broadcast
from mpitrain.collectives.world.watchdog import watchdog
from mpitrain.collectives.world.world import World
from mpitrain.data.sampler import torch_seed
from mpitrain.errors import UsageError, option_in_words
from mpitrain.log import logger
from mpitrain.loggers.run_logger import RunLogger
from mpitrain.optimizer.distributed import DistributedOptimizer
from mpitrain.optimizer.replica_group import check_replica_size
from mpitrain.records.timeline import Timeline
from mpitrain.trainer import checkpoints, initial_model, result, runfolder, runlock
from mpitrain.trainer.agreement import require_equal_options
from mpitrain.trainer.batches import Batches, build_model
from mpitrain.trainer.budget import Budget
from mpitrain.trainer.checkpoints import Checkpoints
from mpitrain.trainer.clock import Clock
from mpitrain.trainer.commands import Commands
from mpitrain.trainer.compiler import do_without_compiler
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.control import Control
from mpitrain.trainer.counters import Counters
from mpitrain.trainer.early_stopping import EarlyStopping
from mpitrain.trainer.evaluation import Evaluations, Evaluator
from mpitrain.trainer.faults import Faults, check_ranks
from mpitrain.trainer.gradient_pass import GradientPass
from mpitrain.trainer.learning_rate import LearningRate
from mpitrain.trainer.logging_hook import LoggingHook
from mpitrain.trainer.loss_watch import LossWatch
from mpitrain.trainer.metrics import MetricsFile, tables
from mpitrain.trainer.model_files import ModelFiles
from mpitrain.trainer.objective import Objective
from mpitrain.trainer.objective_options import Target
from mpitrain.trainer.plan import RunPlan
from mpitrain.trainer.progress import Progress, ProgressHook
from mpitrain.trainer.ranking import Ranking
from mpitrain.trainer.run import Hook, Hooks, Run
from mpitrain.trainer.stop_signal import StopSignal
from mpitrain.trainer.timeline_hook import TimelineHook


def train(
    config: TrainConfig | RunPlan,
    world: World,
    *,
    resume: Path | None = None,
    dataset: data.Dataset | None = None,
    hooks: Sequence[Hook] = (),
) -> dict[str, Any]:
    """Train a model according to a configuration. Collective.

    Args:
        config: The options, or a plan created from them; the same on all ranks.
        world: The ranks.
        resume: The folder of a run; training continues from its newest checkpoint.
        dataset: The data set of ``config.data``, if it is loaded already. Several runs of one process can share it.
        hooks: Additional hooks. At each event, they are called after the evaluation and before the orders to all ranks.

    Returns:
        The contents of ``RUN/result.json``, on every rank. They lack ``test_accuracy`` if a signal has stopped the run
        early.

    Raises:
        UsageError: The configuration or the data are invalid, or the options differ between ranks.
        RankFailed: A rank has died, and the other ranks cannot continue without it.
    """
    plan = config if isinstance(config, RunPlan) else RunPlan.of(config)
    require_equal_options(plan.config, resume, world)
    _check_world(plan.config, world)
    out = plan.config.out
    folder = resume or (None if out is None else Path(out))
    # From here on a signal must not end a rank that is loading its data or writing its last checkpoint.
    with StopSignal(world.abort) as stop_signal, world.translated_errors(), runlock.held(folder, world) as lock:
        if folder is not None:
            watchdog.advice = f"resume with: mpitrain train {option_in_words('--resume', folder)}"
        hooks = [*hooks, runlock.LockHook(lock)]
        run = _prepare(plan, world, stop_signal, resume=resume, dataset=dataset, hooks=hooks)
        try:
            return _train(run)
        finally:
            run.hooks.close()
            run.batches.close()


def _train(run: Run) -> dict[str, Any]:
    """Train, evaluate the end and write the result. Collective."""
    model, optimizer, batches, passes = run.model, run.optimizer, run.batches, run.passes
    losses = LossWatch(run.plan.config.on_nonfinite == "stop")
    model.train()
    run.world.barrier()
    run.begin_first_step()
    run.hooks.on_start(run)
    while not run.is_over:
        began, exchange_before = time.perf_counter(), optimizer.exchange_seconds
        run.cpu.begin(optimizer.exchange_cpu_seconds, optimizer.statistics.n_exchanges)
        x, y = batches.draw(run.position)
        optimizer.zero_grad()
        loss = passes.backward(x, y)
        value = float(loss.detach())
        _straggle(run, time.perf_counter() - began)
        run.faults.act(run.step + 1, time.perf_counter() - began, model)
        passes.step(optimizer, loss)
        losses.add(value)
        run.end_step(value, began, exchange_before)
        run.hooks.on_step(run)
    run.hooks.on_last_step(run)
    run.is_ending = True
    if run.is_complete:
        run.world.barrier()  # no rank is reading the state for a checkpoint any more
        optimizer.finalize()
        run.publish()
        run.world.barrier()
    run.look_for_lead()
    if run.is_leader:
        run.report_totals(in_full=True)
        if run.is_complete and run.budget.gradients is None:  # nobody knew before
            _warn_of_short_run(run, run.counters.totals().gradients)
    run.hooks.on_end(run)
    found = _write_result(run)
    run.counters.free()
    optimizer.close()
    return found


def _warn_of_short_run(run: Run, gradients: int) -> None:
    """Warn if so many gradients, of all ranks in total, are fewer than the method's periods need. Local."""
    n_workers = run.plan.n_workers(run.world.size)
    for text in run.plan.budget_warnings(n_workers, gradients / run.world.size):
        logger.warning(text)


def _straggle(run: Run, seconds: float) -> None:
    """Slow this rank down if it is the straggler. Its computation took ``seconds``. Local."""
    straggler = run.plan.config.straggler
    if straggler is not None and straggler[0] == run.world.rank:
        time.sleep((straggler[1] - 1) * seconds)


def _write_result(run: Run) -> dict[str, Any]:
    """Write the result on the lead, and return it on all ranks. Collective."""

    def make() -> dict[str, Any]:
        run.look_for_lead()
        document = result.document(run)
        if run.is_complete and run.folder is not None:
            runfolder.write_json(run.folder / "result.json", document)
        return document

    found: dict[str, Any] = broadcast(run.world, make)
    return found


def _prepare(
    plan: RunPlan,
    world: World,
    stop_signal: StopSignal,
    *,
    resume: Path | None,
    dataset: data.Dataset | None,
    hooks: Sequence[Hook],
) -> Run:
    """Load the data, build the model and its optimizer, and restore the newest checkpoint if asked to. Collective."""
    config, method = plan.config, plan.method
    batches = _load_data(config, world, resume=resume, dataset=dataset)
    objective, per_epoch = Objective(config, batches.dataset), batches.steps_per_epoch
    model = _build_model(config, batches, objective, world, is_new=resume is None)
    evaluator = Evaluator(model, batches.dataset, world.device, objective)
    evaluations = Evaluations(evaluator, world, deferred=config.defer_evaluation)
    optimizer = _optimizer(plan, model, world)
    budget = plan.budget(steps_per_epoch=per_epoch, n_ranks=world.size)
    hooks = [*_hooks_of_options(plan, budget, evaluator, world, resume), *hooks]  # may refuse an option
    folder = resume or runfolder.create(config, method.settings(), batches.identity, world)
    state = None if resume is None else checkpoints.load_newest(resume, config, world)
    gradients, seconds = (0, 0.0) if state is None else (state["gradients"], state["seconds"])
    counters = Counters(world, method.metrics, *(() if state is None else (state["loss"],)))
    metrics_file = _metrics_file(method, folder, world, continue_from=None if state is None else seconds)
    control = Control(world, synchronous=method.is_synchronous, group=optimizer.group)
    progress = _progress(plan, budget, world, gradients=gradients * world.size, seconds=seconds)
    saving = Checkpoints(evaluations, saved_at=None if state is None else state["step"])
    commands, shown = Commands(control, stop_signal, saving), ProgressHook(progress, verbose=config.verbose)
    run = Run(
        plan=plan,
        world=world,
        folder=folder,
        batches=batches,
        model=model,
        optimizer=optimizer,
        passes=GradientPass(plan, model, objective, world),
        budget=budget,
        calendar=plan.calendar(budget, steps_per_epoch=per_epoch),
        counters=counters,
        faults=Faults(config.inject, world.rank),
        clock=Clock(seconds),
        hooks=Hooks([metrics_file, shown, evaluations, *hooks, commands, saving]),
    )
    if budget.gradients is not None:
        _warn_of_short_run(run, budget.gradients)
    if resume is not None and state is not None:
        saving.restore(run, state)
        runfolder.reopen(resume, config, world)
    run.publish()
    return run


def _metrics_file(method: Method, folder: Path | None, world: World, *, continue_from: float | None) -> MetricsFile:
    """Return the hook that writes the metrics; rows later than ``continue_from`` seconds are removed."""
    return MetricsFile(folder, tables(world.size, method.metrics), method.metrics, continue_from)


def _hooks_of_options(
    plan: RunPlan, budget: Budget, evaluator: Evaluator, world: World, resume: Path | None
) -> list[Hook]:
    """Return the hooks that options ask for: a schedule, an early end, files of models, a timeline, and loggers."""
    config, hooks = plan.config, list[Hook]()
    folder = resume or (None if config.out is None else Path(config.out))
    curve = plan.rate_curve(budget, n_ranks=world.size)
    if curve is not None:
        hooks.append(LearningRate(curve))
    target = None if config.target is None else Target.parse(config.target)
    ranking = Ranking(target, higher_is_better=evaluator.objective.higher_is_better)
    if target is not None or config.patience is not None:
        hooks.append(EarlyStopping(ranking, config.patience))
    if config.out is not None:
        hooks.append(ModelFiles(evaluator, ranking, deferred=config.defer_evaluation))
    if config.timeline and folder is not None:
        hooks.append(TimelineHook(Timeline(folder, world=world)))
    if config.log:
        document = {"config": config.to_json(), "algorithm": config.algorithm, "settings": plan.method.settings()}
        document |= {"world": world.describe(), "versions": runfolder.versions()}
        hooks.append(LoggingHook(RunLogger(config.log, folder, world=world), document))
    return hooks


def _load_data(config: TrainConfig, world: World, *, resume: Path | None, dataset: data.Dataset | None) -> Batches:
    """Load the data, and refuse them if the run to resume was trained on other data. Collective."""
    batches = Batches(config, world, dataset)
    if resume is not None:
        runfolder.check_data(resume, config.data, batches.identity, world)
    return batches


def _build_model(
    config: TrainConfig, batches: Batches, objective: Objective, world: World, *, is_new: bool
) -> torch.nn.Module:
    """Build the model for the data on the rank's device. Collective if it begins as the model of another run."""
    model = build_model(config, batches.dataset, objective.n_outputs).to(world.device)
    if config.init_from is not None and is_new:
        initial_model.load(Path(config.init_from), model, world)
    batches.fit(model)
    return model


def _check_world(config: TrainConfig, world: World) -> None:
    """Refuse options that do not fit the ranks, and share the cores between them. Local.

    Raises:
        UsageError: There is no rank that an option names, or the workers cannot be formed.
    """
    if config.straggler is not None and not 0 <= config.straggler[0] < world.size:
        raise UsageError(f"--straggler names rank {config.straggler[0]}: there are ranks 0 to {world.size - 1}")
    for rank in map(int, config.batch_sizes):
        if rank >= world.size:
            raise UsageError(f"--batch-size-of names rank {rank}: there are ranks 0 to {world.size - 1}")
    check_ranks(config.inject, world.size)
    check_replica_size(config.replica_size, world)
    share_cores(world.cores)


def _optimizer(plan: RunPlan, model: torch.nn.Module, world: World) -> DistributedOptimizer:
    """Return the distributed optimizer of a model. Collective."""
    config = plan.config
    torch.manual_seed(torch_seed(config.seed * 100_003 + world.rank))  # of dropout: each rank has its own
    do_without_compiler()
    base = plan.optimizer.make(model.parameters(), plan.rates)
    return DistributedOptimizer(
        base,
        model,
        plan.method,
        world=world,
        seed=config.seed,
        average=plan.average,
        replica_size=config.replica_size,
        wire=config.wire,
        on_failure=config.on_failure,
    )


def _progress(plan: RunPlan, budget: Budget, world: World, *, gradients: int, seconds: float) -> Progress:
    """Return the bar of a run, of which a resumed run has some behind it."""
    return Progress(
        plan.method.name,
        gradients=budget.gradients,
        seconds=budget.seconds,
        done=gradients if budget.gradients else seconds,
        show=world.rank == 0 and not plan.config.quiet,
    )
