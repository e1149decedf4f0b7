"""``mpitrain demo | info | algorithms | train | data | watch | report | simulate | plan``

Each command prints on one rank only. With ``--json`` the last line of standard output is one JSON document. A user
error produces one line on standard error and exit code 2. A command's module and its imports are loaded only when the
command runs.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence

from mpitrain.cli import completion
from mpitrain.cli.failure import EXIT_DIVERGED, EXIT_FAILURE, fail
from mpitrain.cli.options import Parser
from mpitrain.errors import Diverged, RankFailed, UsageError
from mpitrain.version import __version__

COMMANDS = {
    "demo": "train on 4 ranks of this machine and print the report",
    "info": "show the capabilities of this MPI, the GPUs and the machine, and what a run will use",
    "algorithms": "list every method with its paper and its settings",
    "train": "train a model (start it with mpirun or srun)",
    "data": "import data sets into HDF5 files",
    "watch": "show the progress of a run in the terminal until it ends",
    "report": "plot and tabulate runs",
    "simulate": "run a method with many workers in one process, under a virtual clock",
    "plan": "compare the methods on a given cluster: time of an epoch, share of communication, which to pick",
}
"""Each command is the module of its name in this package, with ``add_arguments(parser)`` and ``run(args)``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``mpitrain`` command; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may have letters that the terminal does not know
    try:
        if completion.is_requested():
            completion.complete(*_parsers())
        if words and words[0] in COMMANDS:
            code = _run(words[0], words[1:])
            sys.stdout.flush()  # a full disk is noticed here
            return code
        _parsers()[0].parse_args(words)  # exits: it shows the help or the version, or finds no such command
        return EXIT_FAILURE
    except UsageError as error:
        return fail(str(error), on_all_ranks=error.on_all_ranks)
    except Diverged as error:
        return fail(str(error), code=EXIT_DIVERGED)
    except RankFailed as error:
        return fail(str(error), code=EXIT_FAILURE)
    except BrokenPipeError:  # mpitrain algorithms | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's last flush succeeds
        return EXIT_FAILURE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        if error.filename is None:  # standard output; the interpreter flushes it once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return fail(f"cannot write {error.filename or 'the output'} ({error.strerror}): free some room")


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of everything but the commands' own options, and the parser of each command."""
    parser = Parser(prog="mpitrain", description="Train PyTorch models over MPI.")
    parser.add_argument("--version", action="version", version=f"mpitrain {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    return parser, {name: commands.add_parser(name, help=summary) for name, summary in COMMANDS.items()}


def _run(command: str, rest: Sequence[str]) -> int:
    """Run a command with the rest of the command line; return the exit code."""
    module = importlib.import_module(f"mpitrain.cli.{command}")
    parser = Parser(prog=f"mpitrain {command}", description=f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}.")
    module.add_arguments(parser)
    code: int = module.run(parser.parse_args(rest))
    return code


if __name__ == "__main__":
    sys.exit(main())
