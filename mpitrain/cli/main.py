"""``mpitrain info | algorithms | train | data | report | simulate``

Each command prints on one rank only. With ``--json`` the last line of standard output is one JSON document. What a user
got wrong is one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpitrain.collectives.world.transport import TRANSPORTS
from mpitrain.errors import OUTPUT_SECONDS, TURN_SECONDS, RankFailed, UsageError
from mpitrain.kernels.native.wire import NAMES as WIRE_FORMATS
from mpitrain.version import __version__

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_STOPPED = 3
"""A run that was asked to stop by SIGUSR1 and can be continued with --resume."""

GRACE_SECONDS = 5.0
"""How long a rank other than 0 waits with its message: if all ranks have the same problem, rank 0 tells it."""

DELEGATED = {
    "data": ("mpitrain.data.importers", "import data sets into HDF5 files"),
    "report": ("mpitrain.report", "plots and a table of runs"),
    "simulate": ("mpitrain.cli.simulate", "the same methods with many workers in one process, under a virtual clock"),
}
"""Commands whose module knows their options: it is imported only when it is asked for."""

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")


def main(arguments: Sequence[str] | None = None) -> int:
    """The ``mpitrain`` command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words and words[0] in DELEGATED:
            return _delegate(words[0], words[1:])
        args = _parser().parse_args(words)
        code: int = args.run(args)
        return code
    except UsageError as error:
        return fail(str(error))
    except RankFailed as error:
        return fail(str(error), code=EXIT_FAILURE)
    except BrokenPipeError:  # mpitrain algorithms | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's last flush succeeds
        return 1


def fail(text: str, *, on_all_ranks: bool = False, code: int = EXIT_USAGE) -> int:
    """Tell the problem once, and end all ranks.

    Args:
        text: One line.
        on_all_ranks: Whether every rank is sure to find it, as with a wrong argument: then only rank 0 tells it.
        code: The exit code.
    """
    rank = _rank()
    if rank != 0:
        turn = rank * TURN_SECONDS if code == EXIT_FAILURE else 0.0
        time.sleep(GRACE_SECONDS + turn)  # a launcher may end all ranks when the first ends, and rank 0 has to be heard
        if on_all_ranks:
            return code
    where = f" (rank {rank})" if rank else ""
    print(f"mpitrain: error{where}: {text}", file=sys.stderr, flush=True)
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and mpi.COMM_WORLD.Get_size() > 1:
        sys.stdout.flush()
        time.sleep(OUTPUT_SECONDS)
        mpi.COMM_WORLD.Abort(code)  # the others may be waiting for this rank
    return code


def _rank() -> int:
    """This rank, as the launcher calls it: MPI may not have started."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if os.environ.get(name, "").isdigit()), 0)


class Parser(argparse.ArgumentParser):
    """Fails like everything else does: one line, on one rank."""

    def error(self, message: str) -> Any:
        """Exit with code 2."""
        raise SystemExit(fail(f"{message} (see {self.prog} --help)", on_all_ranks=True))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mpitrain", description="Train PyTorch models over MPI.")
    parser.add_argument("--version", action="version", version=f"mpitrain {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    info = commands.add_parser("info", help="what this MPI, these GPUs and this machine can do, and what will be used")
    info.add_argument("--json", action="store_true", help="one JSON document")
    info.add_argument("--device", choices=("cpu", "cuda"), help="what a run on it would use (default: cpu)")
    info.add_argument(
        "--probe",
        action="store_true",
        help="try again which operations of this MPI work with which memory (on several ranks tried once in any case)",
    )
    info.set_defaults(run=_info)

    methods = commands.add_parser("algorithms", help="every method, its paper and its settings")
    form = methods.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON document")
    form.add_argument("--markdown", action="store_true", help="with equations, as in docs/methods.md")
    methods.set_defaults(run=_algorithms)

    train = commands.add_parser("train", help="train a model", description="Run under mpirun or srun.")
    add_train_arguments(train)
    train.set_defaults(run=_train)

    for name, (_, summary) in DELEGATED.items():
        commands.add_parser(name, help=summary)
    return parser


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mpitrain train``; the defaults are ``TrainConfig``'s."""
    add = parser.add_argument
    add("--algorithm", metavar="NAME", help="see mpitrain algorithms (default: easgd)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the algorithm; repeat for more")
    add("--data", help="digits, synthetic or FILE.h5 (default: digits)")
    add("--model", help="mlp, cnn7, resnet20 or module:function (default: mlp)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=float, help="over all ranks together (default: 10)")
    budget.add_argument("--steps", type=int, help="of each rank")
    budget.add_argument("--gradients", type=int, help="over all ranks together")
    budget.add_argument("--minutes", type=float, help="of training, evaluations not counted")
    add("--batch-size", type=int, help="of each rank (default: 32)")
    add("--lr", type=float, help="learning rate (default: 0.05)")
    add("--momentum", type=float, help="of the local SGD (default: 0.9, or the algorithm's own)")
    add("--weight-decay", type=float, help="default: 0")
    add("--average", metavar="KIND", help="evaluate an average of the iterates: polyak or moving:RATE (default: none)")
    add("--seed", type=int, help="of everything random (default: 0)")
    add("--device", choices=("cpu", "cuda"), help="default: cpu")
    add(
        "--transport",
        choices=TRANSPORTS,
        help="of vectors on GPUs: auto takes what works best; the others force one (default: auto)",
    )
    add("--sampling", choices=("independent", "sharded"), help="does each rank draw from all data, or from its part")
    add("--augment", action="store_true", default=None, help="random crops and flips of photographs")
    add("--evaluate-every", type=int, metavar="STEPS", help="of rank 0 (default: an epoch)")
    add("--checkpoint-every", type=int, metavar="STEPS", help="of rank 0; 0: never (default: an epoch)")
    add("--replica-size", type=int, metavar="K", help="ranks that are one worker between them (default: 1)")
    add(
        "--wire",
        choices=WIRE_FORMATS,
        help="how vectors cross nodes: int8 means 1 byte for changes of a center, 2 for all else (default: float32)",
    )
    add("--straggler", type=straggler, metavar="RANK:FACTOR", help="make this rank compute FACTOR times slower")
    add("--out", metavar="RUN", help="folder for configuration, metrics, checkpoints and plots")
    add("--resume", metavar="RUN", type=Path, help="continue a run from its newest checkpoint, with its settings")
    add("--quiet", action="store_true", default=None, help="no progress bar")
    add("--json", action="store_true", help="the result as one JSON document")


def straggler(text: str) -> tuple[int, float]:
    """``RANK:FACTOR`` as numbers."""
    return rank_and_number(text, "RANK:FACTOR, such as 1:4")


def rank_and_number(text: str, form: str) -> tuple[int, float]:
    """A rank and a number, with a colon between them; ``form`` says so to a user who gave something else."""
    rank, _, number = text.partition(":")
    try:
        return int(rank), float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {form}, not {text!r}") from None


def settings_of(pairs: Sequence[str]) -> dict[str, str]:
    """``["key=value", ...]`` as a dictionary.

    Raises:
        UsageError: Text without an equals sign.
    """
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--set takes KEY=VALUE, such as --set period=10, not {pair!r}")
        settings[key.strip()] = value.strip()
    return settings


def _train(args: argparse.Namespace) -> int:
    # What can be refused without starting MPI is refused without: no launcher's noise around the message.
    from mpitrain.collectives.world.launch import init
    from mpitrain.optimizer.replica_group import check_replica_size
    from mpitrain.trainer.config import TrainConfig, method_of, warnings_of

    options = {
        field.name: getattr(args, field.name, None)
        for field in dataclasses.fields(TrainConfig)
        if field.name != "settings"
    }
    given = {name: value for name, value in options.items() if value is not None}
    try:
        if args.resume is None:
            config = TrainConfig(settings=settings_of(args.set), **given)
        else:
            config = _resumed(args, given)
        method_of(config)
    except UsageError as error:
        if args.resume is None:
            return fail(str(error), on_all_ranks=True)
        init()  # a folder may be missing on one node only: the ranks have to meet, so that this one can end all
        raise
    world = init(config.device, config.transport)
    check_replica_size(config.replica_size, world)
    if world.rank == 0:
        for text in warnings_of(config, world.size // config.replica_size):
            print(f"mpitrain: warning: {text}", file=sys.stderr, flush=True)
    from mpitrain.trainer.loop import train

    result = train(config, world, resume=args.resume)
    if world.rank == 0:
        _tell(result, as_json=args.json)
    return 0 if result["complete"] else EXIT_STOPPED


def _resumed(args: argparse.Namespace, given: dict[str, Any]) -> Any:
    """The configuration of the run that is resumed; only its budget and what is shown may be changed."""
    from mpitrain.trainer.config import TrainConfig

    if Path(given.pop("out", args.resume)) != args.resume:
        raise UsageError(f"--resume {args.resume} continues in the same folder: leave --out out")
    return TrainConfig.of_run(args.resume, settings=settings_of(args.set), **given)


def _tell(result: dict[str, Any], *, as_json: bool) -> None:
    folder = Path(result["out"]) if result["out"] else None
    ranks = f"{result['ranks']} rank{'s' * (result['ranks'] > 1)}"
    if result["replica_size"] > 1:
        ranks += f" ({result['workers']} worker{'s' * (result['workers'] > 1)})"
    if not result["complete"]:
        how = f"on {ranks} with: mpitrain train --resume {folder}" if folder else "is not possible: there was no --out"
        print(f"stopped at step {result['steps']}; to continue {how}", file=sys.stderr)
    else:
        if result["died"]:
            from mpitrain.collectives.world.failure_detector import names_of

            ranks += f" ({names_of(result['died'])} died)"
        shares = ", ".join(f"{name} {share:.0%}" for name, share in result["shares"].items())
        print(
            f"{result['algorithm']} on {ranks}: test accuracy {result['test_accuracy']:.2%}, "
            f"test loss {result['test_loss']:.4f} after {result['gradients']} gradients in {result['seconds']:.1f} s "
            f"({result['samples_per_second']:,.0f} samples/s; {shares})"
        )
        if result["n_nonfinite"]:
            print(f"{result['n_nonfinite']} non-finite elements were kept out of the exchanges: try a smaller --lr")
        if folder is not None:
            from mpitrain.report import load_run, write_report

            try:
                write_report([load_run(folder)], folder)
                print(f"report and plots: {folder / 'report.md'}")
            except (UsageError, OSError) as error:
                print(f"mpitrain: warning: there is no report ({error})", file=sys.stderr)
    if as_json:
        from mpitrain.trainer.runfolder import to_json

        print(to_json(result))


def _algorithms(args: argparse.Namespace) -> int:
    from mpitrain.algorithms import catalogue

    if _rank() != 0:
        return 0
    if args.json:
        print(json.dumps(catalogue.catalogue()))
    else:
        print(catalogue.markdown() if args.markdown else catalogue.text(), end="")
    return 0


def _info(args: argparse.Namespace) -> int:
    from mpitrain.cli.info import describe, show
    from mpitrain.collectives.probe.cache import probe_hosts
    from mpitrain.collectives.world.device import gpu_names
    from mpitrain.collectives.world.launch import init

    world = init(args.device)
    probes = probe_hosts(world.comm, world.hosts, gpu_names(), again=args.probe)
    document = describe(world)
    if world.rank == 0:
        whole = {**document, "probes": [probe.document() for probe in probes]}
        print(json.dumps(whole) if args.json else show(document, probes))
    return 0


def _delegate(command: str, rest: Sequence[str]) -> int:
    """Let a module that knows its own options parse the rest of the command line."""
    where, summary = DELEGATED[command]
    module = importlib.import_module(where)
    parser = Parser(prog=f"mpitrain {command}", description=summary)
    module.add_arguments(parser)
    code: int = module.run(parser.parse_args(rest))
    return code


if __name__ == "__main__":
    sys.exit(main())
