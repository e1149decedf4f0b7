"""``mpitrain data import KIND SOURCE FILE.h5``: convert standard formats into data files.

``mpitrain data verify FILE.h5``: compare a data file with the digest that its import has stored.

To add a format, write a function that returns an ``Imported``, and add it to ``IMPORTERS``.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpitrain.data import digest
from mpitrain.data.array_import import import_cifar, import_mnist
from mpitrain.data.data_writer import Imported
from mpitrain.data.image_import import import_images
from mpitrain.data.option_parsing import between, sizes
from mpitrain.data.text import TEST_FRACTION
from mpitrain.data.text_import import ImportedText, import_text
from mpitrain.errors import printable


@dataclass(frozen=True)
class Importer:
    """A format from which data can be imported.

    Attributes:
        summary: The description of the format, for the help.
        source: The description of SOURCE, for the help.
        add_options: A function that adds the options of the format.
        run: A function that imports the data.
    """

    summary: str
    source: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], Imported | ImportedText]


def add_arguments(parser: ArgumentParser) -> None:
    """Add the actions of the command and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    action = actions.add_parser("import", help="turn a standard format into an HDF5 data file")
    kinds = action.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, importer in IMPORTERS.items():
        sub = kinds.add_parser(kind, help=importer.summary, description=f"Import {importer.summary}.")
        sub.add_argument("source", type=Path, metavar="SOURCE", help=importer.source)
        sub.add_argument("target", type=Path, metavar="FILE.h5", help="data file to write")
        sub.add_argument("--quiet", action="store_true", help="show no progress bar")
        importer.add_options(sub)
    verify = actions.add_parser("verify", help="compare a data file with the digest that its import has stored")
    verify.add_argument("file", type=Path, metavar="FILE.h5", help="data file to read")


def run(args: Namespace) -> int:
    """Import or verify a data file, and print a line about it; return the exit code."""
    if args.action == "verify":
        found = digest.verify(args.file)
        print(printable(f"{args.file}: its contents match its digest (SHA-256 {found})"))
        return 0
    done = IMPORTERS[args.kind].run(args)
    print(printable(done.summary()))
    return 0


def _images_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--size", type=_size, metavar="HxW", help="size to which images are resized (default: the most common)"
    )
    parser.add_argument(
        "--test-fraction",
        type=_fraction,
        default=0.1,
        help="fraction of the images for the test set, if there is no test folder (default: %(default)s)",
    )
    parser.add_argument(
        "--test-set",
        metavar="FOLDER",
        help="folder of the test set, if there are several (test and val) or its name is unusual",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for choosing the test images (default: %(default)s)")
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="skip images that cannot be decoded, and count them"
    )


def _run_images(args: Namespace) -> Imported:
    return import_images(
        args.source,
        args.target,
        size=args.size,
        test_fraction=args.test_fraction,
        test_set=args.test_set,
        seed=args.seed,
        skip_unreadable=args.skip_unreadable,
        progress=not args.quiet,
    )


def _text_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="tokenizer.json of Hugging Face, which needs the extra 'text' (default: tokens are bytes)",
    )
    parser.add_argument(
        "--test-fraction",
        type=_fraction,
        default=TEST_FRACTION,
        help="fraction of the text, at its end, that becomes the test set (default: %(default)s)",
    )


def _run_text(args: Namespace) -> ImportedText:
    return import_text(args.source, args.target, tokenizer=args.tokenizer, test_fraction=args.test_fraction)


def _size(text: str) -> tuple[int, int]:
    try:
        height, *rest = sizes(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error
    if len(rest) > 1:
        raise ArgumentTypeError("one or two numbers are needed, such as 32 or 28x32")
    return height, rest[0] if rest else height


def _fraction(text: str) -> float:
    try:
        return between(0, 1)(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


IMPORTERS: dict[str, Importer] = {
    "images": Importer(
        "class folders of image files, or an archive of class folders",
        "folder or archive to import",
        _images_options,
        _run_images,
    ),
    "mnist": Importer(
        "the files of MNIST, or of a data set in the same format",
        "folder or archive with the idx files, plain or .gz",
        lambda parser: None,
        lambda args: import_mnist(args.source, args.target),
    ),
    "cifar": Importer(
        "the files of CIFAR-10 or CIFAR-100, in the binary or in the Python version",
        "archive as it is published, or a folder of its files",
        lambda parser: None,
        lambda args: import_cifar(args.source, args.target),
    ),
    "text": Importer(
        "text as bytes, or as the tokens of a tokenizer",
        "text file, folder or archive of text files, or python for the documentation of Python",
        _text_options,
        _run_text,
    ),
}
