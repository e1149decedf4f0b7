"""The configuration of a training run: the options of ``mpitrain train``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpitrain.algorithms.base.surviving import ON_FAILURE
from mpitrain.collectives.world.transport import TRANSPORTS
from mpitrain.collectives.world.watchdog import DEFAULT_TIMEOUT_SECONDS
from mpitrain.errors import UsageError, printable
from mpitrain.kernels.native.wire import FLOAT32
from mpitrain.kernels.native.wire import NAMES as WIRE_FORMATS
from mpitrain.loggers import BACKENDS
from mpitrain.records import KEEP
from mpitrain.records.json_file import read_json
from mpitrain.trainer.data_options import DataOptions
from mpitrain.trainer.faults import Fault
from mpitrain.trainer.objective_options import ObjectiveOptions
from mpitrain.trainer.options import (
    AT_LEAST_ONE,
    BELOW_ONE,
    NON_NEGATIVE,
    POSITIVE,
    check_ranges,
    check_types,
    flag_of,
    option,
    options_of,
    parse_settings,
    straggler,
)
from mpitrain.trainer.update_options import UpdateOptions

DEFAULT_EPOCHS = 10.0


@dataclass(frozen=True)
class TrainConfig(UpdateOptions, ObjectiveOptions, DataOptions):
    """The options of a run.

    Each field declares an option, and ``config.json`` stores its value under the name of the field. At most one budget
    may be given. If ``momentum`` is None, the momentum is 0.9, or the default of a method that makes the local update
    itself.
    """

    algorithm: str = option("easgd", "name of the method; see mpitrain algorithms", metavar="NAME")
    settings: Mapping[str, str] = option(
        {},
        "a setting of the algorithm; may be given several times",
        flag="--set",
        metavar="KEY=VALUE",
        repeated=True,
        collect=parse_settings,
    )
    data: str = option(
        "digits",
        "digits, python-text, synthetic, FILE.h5 or module:function; a resumed run takes another place of a file",
        replaceable=True,
    )
    model: str = option("mlp", "mlp, cnn7, resnet20, gpt (text) or module:function")
    epochs: float | None = option(
        None,
        "passes over the training set, by all ranks in total",
        parse=float,
        within=POSITIVE,
        group="budget",
        default_text=f"{DEFAULT_EPOCHS:g}",
        replaceable=True,
    )
    steps: int | None = option(None, "steps of each rank", parse=int, within=POSITIVE, group="budget", replaceable=True)
    gradients: int | None = option(
        None,
        "mini-batch gradients, by all ranks in total",
        parse=int,
        within=POSITIVE,
        group="budget",
        replaceable=True,
    )
    minutes: float | None = option(
        None,
        "minutes of training, without evaluations and checkpoints",
        parse=float,
        within=POSITIVE,
        group="budget",
        replaceable=True,
    )
    batch_size: int = option(32, "samples in a mini-batch of each rank", parse=int, within=POSITIVE)
    lr: float = option(0.05, "learning rate of the local optimizer", parse=float, within=NON_NEGATIVE)
    momentum: float | None = option(
        None,
        "momentum of the local SGD",
        parse=float,
        within=BELOW_ONE,
        default_text="0.9 with sgd, or the algorithm's own where it makes the update",
    )
    weight_decay: float = option(
        0.0,
        "L2 penalty, added to the gradient; adamw and lion instead shrink the weights by lr*weight_decay per step",
        parse=float,
        within=NON_NEGATIVE,
    )
    clip_norm: float | None = option(
        None,
        "clip the gradient of a step to this norm: the mean of the ranks' gradients, or each rank's own",
        parse=float,
        within=POSITIVE,
        metavar="NORM",
        default_text="no clipping",
    )
    on_nonfinite: str = option(
        "stop",
        "after 20 losses of a rank in a row that are not finite: end the run with exit code 5 (stop), or go on (skip)",
        choices=("stop", "skip"),
        replaceable=True,
    )
    on_failure: str = option(
        "stop",
        "when a rank dies and the method waits for all: end all ranks (stop), or go on without it (continue, with "
        "mpirun --with-ft ulfm)",
        choices=ON_FAILURE,
    )
    average: str | None = option(
        None, "evaluate an average of the iterates: polyak or moving:RATE", metavar="KIND", default_text="no average"
    )
    seed: int = option(
        0, "seed of the weights, sampling, augmentation and choice of peers", parse=int, within=NON_NEGATIVE
    )
    device: str = option("cpu", "device of the model", choices=("cpu", "cuda"), checks_choices=False, replaceable=True)
    transport: str = option(
        "auto",
        "how vectors on GPUs reach other ranks; auto selects the best that works",
        choices=TRANSPORTS,
        replaceable=True,
    )
    init_from: str | None = option(
        None,
        "begin with the model of a run (of its end, or of its newest checkpoint) or of a file (torch, safetensors)",
        metavar="RUN|FILE",
        default_text="random weights",
    )
    out: str | None = option(
        None, "folder for the configuration, metrics, checkpoints and plots", metavar="RUN", default_text="none"
    )
    clip_displacement: float | None = option(
        None,
        "bound on the Euclidean norm by which one worker moves the center, or a peer, in an exchange",
        parse=float,
        within=POSITIVE,
        metavar="NORM",
        default_text="no bound",
    )
    evaluate_every: int | None = option(
        None,
        "steps of rank 0 between evaluations",
        parse=int,
        within=POSITIVE,
        metavar="STEPS",
        default_text="an epoch",
        replaceable=True,
    )
    evaluate_seconds: float | None = option(
        None, "seconds between evaluations, instead of steps", parse=float, within=POSITIVE, on_command_line=False
    )
    defer_evaluation: bool = option(
        False,
        "store the vectors to evaluate, and evaluate them on all ranks after training, which is then undisturbed",
        parse=None,
        on_command_line=False,
    )
    checkpoint_every: int | None = option(
        None,
        "steps of rank 0 between checkpoints; 0 writes none",
        parse=int,
        within=NON_NEGATIVE,
        metavar="STEPS",
        default_text="an epoch",
        replaceable=True,
    )
    keep: int = option(KEEP, "checkpoints that are kept", parse=int, within=AT_LEAST_ONE, metavar="N", replaceable=True)
    straggler: tuple[int, float] | None = option(
        None,
        "slow the computation of one rank down by a factor",
        parse=straggler,
        metavar="RANK:FACTOR",
        default_text="none",
        replaceable=True,
    )
    inject: tuple[str, ...] = option(
        (),
        "a fault for a test or an experiment, such as kill:rank=2,step=50; may be given several times "
        "(docs/reliability.md)",
        metavar="FAULT",
        default_text="none",
        repeated=True,
        collect=tuple,
        replaceable=True,
    )
    replica_size: int = option(
        1,
        "ranks that form one worker, each with mini-batches of its own",
        parse=int,
        within=AT_LEAST_ONE,
        metavar="K",
    )
    wire: str = option(
        FLOAT32,
        "format of vectors between nodes; int8 sends changes of a center as 1 byte an element, all else as 2",
        choices=WIRE_FORMATS,
    )
    timeout: float = option(
        DEFAULT_TIMEOUT_SECONDS,
        "seconds that a rank waits for others before it says for whom and ends all ranks; 0 waits for ever",
        parse=float,
        within=NON_NEGATIVE,
        metavar="SECONDS",
        replaceable=True,
    )
    log: tuple[str, ...] = option(
        (),
        "log numbers also to csv, tensorboard, wandb or mlflow; may be given several times (docs/watching.md)",
        choices=tuple(BACKENDS),
        checks_choices=False,
        metavar="BACKEND",
        default_text="none",
        repeated=True,
        collect=tuple,
        replaceable=True,
    )
    timeline: bool = option(
        False,
        "record what every rank does when, as RUN/timeline.json for ui.perfetto.dev (docs/watching.md)",
        parse=None,
        replaceable=True,
    )
    quiet: bool = option(False, "show no progress bar", parse=None, replaceable=True)
    verbose: bool = option(
        False,
        "show everything that was decided at the start, every evaluation, and the messages of all ranks",
        parse=None,
        replaceable=True,
    )

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError("give one of --epochs, --steps, --gradients and --minutes, not several")
        if not given:
            object.__setattr__(self, "epochs", DEFAULT_EPOCHS)
        check_ranges(self)
        self.check_batch_sizes()
        self.check_objective()
        self.check_data(self.data)
        if self.quiet and self.verbose:
            raise UsageError("give --quiet or --verbose, not both")
        if self.defer_evaluation and (self.target is not None or self.patience is not None):
            raise UsageError("--target and --patience need evaluations during the run: they cannot be deferred")
        for text in self.inject:
            Fault.parse(text)
        if self.straggler is not None and not (math.isfinite(self.straggler[1]) and self.straggler[1] >= 1):
            raise UsageError(f"--straggler RANK:FACTOR needs a factor of 1 or more, not {self.straggler[1]:g}")

    def batch_size_of_rank(self, rank: int) -> int:
        """Return the number of samples in a mini-batch of a rank."""
        return int({int(key): size for key, size in self.batch_sizes.items()}.get(rank, self.batch_size))

    def samples_of_rank(self, rank: int) -> int:
        """Return the number of samples in a step of a rank."""
        return self.accumulate * self.batch_size_of_rank(rank)

    def samples_of_ranks(self, n_ranks: int) -> list[int]:
        """Return the number of samples in a step of each rank."""
        return [self.samples_of_rank(rank) for rank in range(n_ranks)]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON document."""
        return {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def of_run(cls, run: Path, **changes: Any) -> TrainConfig:
        """Return the configuration of an existing run, with some fields changed, for example a longer budget.

        Args:
            run: The folder of the run.
            changes: New values by field name; None keeps the value. Fields that affect the result must keep their
                values. ``data`` may name another location of the same data. ``runfolder.check_data``
                compares the data later.

        Raises:
            UsageError: ``run`` is not the folder of a run, or a change would affect the result.
        """
        path = run / "config.json"
        try:
            document = read_json(path)["config"]
            check_types(document, cls)
            straggler = document["straggler"] and tuple(document["straggler"])
            # The faults have happened. A list of JSON stands for a tuple.
            stored = cls(**{**document, "straggler": straggler, "inject": (), "log": tuple(document.get("log", ()))})
        except (OSError, AttributeError, LookupError, TypeError, ValueError) as error:
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {printable(str(error))}"
            raise UsageError(f"{run} is not the folder of a run: {path} cannot be read ({why})") from error
        changes = {name: value for name, value in changes.items() if value is not None}
        declared = options_of(cls)
        for name, value in list(changes.items()):
            flag, before = flag_of(name, declared[name]), getattr(stored, name)
            if isinstance(value, Mapping):
                for key in changes.pop(name):
                    _refuse_change(f"{flag} {key}", value[key], before.get(key))
            elif not declared[name].replaceable:
                _refuse_change(flag, value, before)
        if any(name in changes for name in BUDGETS):
            changes = {**dict.fromkeys(BUDGETS), **changes}
        return dataclasses.replace(stored, **changes)


BUDGETS = tuple(name for name, declared in options_of(TrainConfig).items() if declared.group == "budget")
"""The fields of which one says when a run ends."""


def _refuse_change(flag: str, value: Any, stored: Any) -> None:
    if value != stored:
        of_run = "the default" if stored is None else stored
        raise UsageError(
            f"{flag} is {of_run} in the run that is resumed, not {value}: leave it out, or start a new run"
        )
