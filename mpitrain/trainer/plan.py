"""The plan of a run: the objects that follow from its options, built once and passed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpitrain import algorithms, loggers
from mpitrain.algorithms import Method
from mpitrain.algorithms.base.iterate_average import Average
from mpitrain.algorithms.base.settings import settings_of
from mpitrain.algorithms.base.surviving import check_on_failure
from mpitrain.errors import UsageError
from mpitrain.trainer import optimizers, schedules
from mpitrain.trainer.budget import Budget, Calendar
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.optimizers import LocalOptimizer, Rates
from mpitrain.trainer.schedules import RateCurve, Schedule

DEFAULT_MOMENTUM = 0.9


@dataclass(frozen=True)
class RunPlan:
    """The options of a run and the objects created from them. It needs neither MPI nor torch.

    Attributes:
        config: The options.
        method: The method with its settings.
        average: The average of the iterates to evaluate; None to evaluate the method's own consensus.
        base_momentum: The momentum of the local SGD. It is 0 if the method makes the update itself, or if the optimizer
            has no momentum.
        optimizer: The local optimizer.
        schedule: The learning rate over the steps of a rank.
    """

    config: TrainConfig
    method: Method
    average: Average | None
    base_momentum: float
    optimizer: LocalOptimizer
    schedule: Schedule

    @classmethod
    def of(cls, config: TrainConfig) -> RunPlan:
        """Return the plan of a configuration.

        Raises:
            UsageError: The method, the optimizer, the schedule, the average or a logger does not exist, or refuses its
                settings or another option.
        """
        method = _method(config)
        if config.accumulate > 1 and method.takes_gradients_early:
            raise UsageError(
                f"{method.name} sums gradients during the backward pass, before --accumulate has all: remove "
                "--set overlap=true or --accumulate"
            )
        if config.timeline and config.out is None:
            raise UsageError("--timeline writes to the folder of the run: add --out RUN")
        loggers.check(config.log, has_folder=config.out is not None)
        check_on_failure(
            config.on_failure, method, replica_size=config.replica_size, has_average=config.average is not None
        )
        optimizer = _optimizer(config, method)
        momentum = config.momentum
        if momentum is None:
            momentum = DEFAULT_MOMENTUM if optimizer.name == "sgd" else 0.0
        return cls(
            config=config,
            method=method,
            average=None if config.average is None else Average.parse(config.average),
            base_momentum=0.0 if method.owns_update else momentum,
            optimizer=optimizer,
            schedule=_schedule(config),
        )

    @property
    def rates(self) -> Rates:
        """The learning rate, momentum and weight decay with which the local optimizer begins."""
        is_users_own = self.optimizer.name == "imported" and self.config.momentum is None
        return Rates(self.config.lr, None if is_users_own else self.base_momentum, self.config.weight_decay)

    def gradient_weight(self, rank: int, members: Sequence[int]) -> float:
        """Return the factor by which a rank multiplies its gradient before gradients are averaged.

        The mean of the multiplied gradients is then the mean over all samples of these ranks.

        Args:
            rank: The rank.
            members: The ranks that take part in the steps, in ascending order.
        """
        sizes, k = self.config.samples_of_ranks(members[-1] + 1), self.config.replica_size
        first = rank - rank % k
        group = members if self.method.averages_gradients else range(first, first + k)
        averaged = [sizes[member] for member in group]
        return sizes[rank] * len(averaged) / sum(averaged)

    def n_samples(self, steps_of_ranks: Sequence[int]) -> int:
        """Return the total number of samples in the given number of steps of each rank."""
        sizes = self.config.samples_of_ranks(len(steps_of_ranks))
        return sum(steps * size for steps, size in zip(steps_of_ranks, sizes, strict=True))

    def n_workers(self, n_ranks: int) -> int:
        """Return the number of workers that ``n_ranks`` ranks form."""
        return n_ranks // self.config.replica_size

    def warnings(self, n_workers: int) -> list[str]:
        """Return a line for each setting outside the region in which the method is proven to converge."""
        return list(self.method.warnings(n_workers, self.config.lr))

    def budget_warnings(self, n_workers: int, steps: float) -> list[str]:
        """Return a line for each period that is too long for ``steps`` local steps of each worker."""
        own = self.method.budget_warnings(n_workers, steps)
        return [*own, *(() if self.average is None else self.average.budget_warnings(steps))]

    def budget(self, *, steps_per_epoch: int, n_ranks: int) -> Budget:
        """Return the end of the run."""
        return Budget(
            self.config, steps_per_epoch=steps_per_epoch, n_ranks=n_ranks, synchronous=self.method.is_synchronous
        )

    def rate_curve(self, budget: Budget, *, n_ranks: int) -> RateCurve | None:
        """Return the factor of the learning rate at each step; None if it is always 1.

        Raises:
            UsageError: The warm-up is as long as the run.
        """
        if self.schedule == schedules.Constant() and not self.config.warmup:
            return None
        curve = RateCurve(self.schedule, self.config.warmup, budget.steps_of_rank(n_ranks))
        curve(self.config.warmup)  # a function of the user's is imported
        return curve

    def calendar(self, budget: Budget, *, steps_per_epoch: int) -> Calendar:
        """Return the steps after which the run is evaluated and saved."""
        return Calendar(self.config, budget, steps_per_epoch=steps_per_epoch)


def _method(config: TrainConfig) -> Method:
    """Return the method; ``--momentum`` is its own setting where it makes the update itself.

    Only the optimizer changes parameters here, so the ranks of a node share them where the method can. With
    ``on_failure="continue"`` they do not, because a rank that dies may leave its part half updated.
    """
    settings = dict(config.settings)
    if "node_shared" in settings_of(algorithms.METHODS.get(config.algorithm, Method)):
        settings.setdefault("node_shared", str(config.on_failure == "stop").lower())
    if config.clip_displacement is not None:
        names = [name for name, kind in algorithms.METHODS.items() if "clip_displacement" in settings_of(kind)]
        if config.algorithm in algorithms.METHODS and config.algorithm not in names:
            raise UsageError(f"--clip-displacement is not for {config.algorithm}, but for {', '.join(names)}")
        settings["clip_displacement"] = str(config.clip_displacement)
    method = algorithms.create(config.algorithm, settings)
    if not method.owns_update or config.momentum is None:
        return method
    if "momentum" not in method.settings():
        raise UsageError(f"{method.name} makes the update itself, without momentum: remove --momentum")
    if "momentum" in config.settings:
        raise UsageError(f"{method.name}: give --momentum or --set momentum=..., not both")
    return algorithms.create(config.algorithm, {**settings, "momentum": str(config.momentum)})


def _optimizer(config: TrainConfig, method: Method) -> LocalOptimizer:
    """Return the local optimizer.

    Raises:
        UsageError: The method makes the update itself, or the optimizer refuses a setting.
    """
    optimizer = optimizers.create(config.optimizer, config.optimizer_settings)
    if method.owns_update and optimizer != optimizers.SGD():
        given = "--optimizer" if config.optimizer != "sgd" else "--optimizer-set"
        raise UsageError(f"{method.name} makes the update itself: remove {given}, or choose another --algorithm")
    if config.momentum is not None and not optimizer.has_momentum:
        raise UsageError(f"{optimizer.name} has no momentum: remove --momentum (its settings: --optimizer-set)")
    if isinstance(optimizer, optimizers.SGD) and optimizer.nesterov and (config.momentum == 0 or optimizer.dampening):
        raise UsageError("sgd: nesterov needs a --momentum above 0, and no dampening")
    return optimizer


def _schedule(config: TrainConfig) -> Schedule:
    """Return the schedule of the learning rate.

    Raises:
        UsageError: It refuses a setting, or needs to know the number of steps.
    """
    schedule = schedules.create(config.schedule, config.schedule_settings)
    if config.minutes is not None and schedule.needs_total:
        raise UsageError(
            f"--schedule {config.schedule} needs the number of steps: give --steps, --epochs or --gradients instead of "
            "--minutes"
        )
    return schedule
