"""``mpitrain train``: train a model under mpirun or srun."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpitrain.cli.failure import exit_code, fail
from mpitrain.cli.options import add_options
from mpitrain.errors import UsageError, option_in_words
from mpitrain.log import decoration, logger
from mpitrain.trainer import config_file
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.objective_options import metric_in_words
from mpitrain.trainer.options import values_of
from mpitrain.trainer.plan import RunPlan

SECTIONS = {
    "method, data and model": (
        *("algorithm", "settings", "data", "model", "model_settings", "loss", "metric", "init_from", "seed"),
        *("sampling", "augment", "verify", "workers"),
    ),
    "length of the run": ("epochs", "steps", "gradients", "minutes", "target", "patience"),
    "local updates": (
        *("optimizer", "optimizer_settings", "lr", "momentum", "weight_decay", "schedule", "schedule_settings"),
        *("warmup", "clip_norm", "precision", "batch_size", "batch_sizes", "accumulate", "on_nonfinite"),
    ),
    "exchanges": (
        "average",
        "clip_displacement",
        "replica_size",
        "wire",
        "transport",
        "timeout",
        "device",
        "on_failure",
    ),
    "files and reports": (
        *("out", "evaluate_every", "checkpoint_every", "keep", "log", "timeline", "quiet", "verbose"),
    ),
    "experiments": ("straggler", "inject"),
}
"""The headings of the help, with the options under each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command: those of ``TrainConfig``, of files, and ``--json``."""
    parser.usage = "[mpirun -n P] %(prog)s [OPTION ...]"
    add_options(parser, TrainConfig, sections=SECTIONS)
    parser.add_argument(
        "--resume", metavar="RUN", type=Path, help="continue a run from its newest checkpoint, with its settings"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="options in a TOML file, or the config.json of a run; options on the command line replace those of the "
        "file",
    )
    parser.add_argument(
        "--write-config",
        metavar="FILE",
        type=Path,
        help="write all options, as given and by default, to a TOML file for --config, and exit",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document on the last line")


def run(args: argparse.Namespace) -> int:
    """Train and print the result; return the exit code."""
    # What can be refused without starting MPI is refused first: without messages of a launcher around the line.
    from mpitrain.collectives.world.launch import init

    try:
        plan = RunPlan.of(configuration(args))
        if args.write_config is not None:
            config_file.write(args.write_config, plan.config)
            return 0
    except UsageError as error:
        if args.resume is None and (args.config is None or args.config.exists()):
            return fail(str(error), on_all_ranks=True)
        init()  # a folder or a file may be missing on one node only: MPI must be there for this rank to end all
        raise
    config = plan.config
    if config.verbose:
        logger.setLevel(logging.DEBUG)  # all ranks speak
    world = init(config.device, config.transport, config.timeout)
    for text in plan.warnings(plan.n_workers(world.size)):
        logger.warning(text)
    with _without_garbage_collection():
        from mpitrain.trainer.loop import train

    result = train(plan, world, resume=args.resume)
    if world.rank == world.leader:
        with decoration("the summary on standard output"):
            print_result(result, as_json=args.json)
            sys.stdout.flush()
    return exit_code(result)


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Import torch in this block faster: a collection visits the objects of all modules, and none of them is garbage.

    Later collections leave them out too.
    """
    if "torch" in sys.modules or not gc.isenabled():  # not the first run of this process, whose garbage would stay
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def configuration(args: argparse.Namespace) -> TrainConfig:
    """Return the configuration from a command line, with defaults from a file or from the resumed run if there is one.

    Raises:
        UsageError: An option is invalid, or would change the result of the resumed run.
    """
    given = values_of(vars(args), TrainConfig)
    if args.config is not None:
        given = config_file.merged(config_file.read(args.config), given)
    if args.resume is None:
        return TrainConfig(**given)
    if Path(given.pop("out", args.resume)) != args.resume:
        raise UsageError(f"{option_in_words('--resume', args.resume)} continues in the same folder: remove --out")
    return TrainConfig.of_run(args.resume, **given)


def print_result(result: dict[str, Any], *, as_json: bool) -> None:
    """Print a result, and write the report of the run. Local; lead only."""
    folder = Path(result["out"]) if result["out"] else None
    if result["complete"]:
        print(_sentence(result))
        if result["n_nonfinite"]:
            print(f"{result['n_nonfinite']} non-finite elements were kept out of the exchanges: try a smaller --lr")
        if result["n_clipped"]:
            print(f"{result['n_clipped']} displacements exceeded clip_displacement and were scaled")
        if folder is not None:
            _write_report(folder)
    else:
        how = (
            f"continue on {_ranks(result)} with: mpitrain train {option_in_words('--resume', folder)}"
            if folder
            else "the run cannot be continued: there was no --out"
        )
        logger.info("stopped at step %d; %s", result["steps"], how)
    if as_json:
        from mpitrain.trainer.runfolder import to_json

        print(to_json(result))


def _sentence(result: dict[str, Any]) -> str:
    ranks = _ranks(result)
    if result["died"]:
        from mpitrain.collectives.world.failure_detector import names_of

        ranks += f" ({names_of(result['died'])} died)"
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result["shares"].items())
    return (
        f"{result['algorithm']} on {ranks}: test {metric_in_words(result['metric'], result['test_metric'])}, "
        f"test loss {result['test_loss']:.4f} after {result['gradients']} gradients in {result['seconds']:.1f} s "
        f"({result['samples_per_second']:,.0f} samples/s; {shares})"
    )


def _ranks(result: dict[str, Any]) -> str:
    ranks = f"{result['ranks']} rank{'s' * (result['ranks'] > 1)}"
    if result["replica_size"] > 1:
        ranks += f" ({result['workers']} worker{'s' * (result['workers'] > 1)})"
    return ranks


def _write_report(folder: Path) -> None:
    with decoration("the report"):
        from mpitrain.report import load_run, write_report

        write_report([load_run(folder)], folder)
        print(f"report and plots: {folder / 'report.md'}")
