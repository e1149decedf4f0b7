"""Texts of messages: names that do not exist, and options as one types them."""

import argparse
import shlex

import pytest

from mpitrain import algorithms
from mpitrain.cli.main import main
from mpitrain.errors import UsageError, nearest, option_in_words, suggestion, unknown


@pytest.mark.parametrize(
    ("value", "close"),
    [("esgd", "easgd"), ("EASGD", "easgd"), ("easgd_tree", "easgd-tree"), ("all-reduce", "allreduce"), ("xyz", None)],
)
def test_the_nearest_name(value, close):
    assert nearest(value, algorithms.METHODS) == close


def test_few_names_are_listed_and_many_are_not():
    assert suggestion("xyz", ["a", "b"], otherwise="a file") == "it must be one of a, b, or a file"
    assert unknown("algorithm", "xyz", algorithms.METHODS, otherwise="see mpitrain algorithms") == (
        "unknown algorithm 'xyz': see mpitrain algorithms"
    )


MISSPELT = {
    "command": (["trai"], "did you mean train?", "mpitrain --help"),
    "option": (["train", "--batchsize", "3"], "did you mean --batch-size?", "mpitrain train --help"),
    "option of a sub-command": (
        ["data", "import", "images", "a", "b.h5", "--sise", "3"],
        "did you mean --size?",
        "mpitrain data import images --help",
    ),
    "kind of data": (["data", "import", "image", "a", "b.h5"], "did you mean images?", "mpitrain data import --help"),
    "algorithm": (["train", "--algorithm", "esgd"], "did you mean easgd?", ""),
    "setting": (["train", "--set", "perod=3"], "did you mean period?", ""),
    "value of a setting": (["train", "--set", "order=jacoby"], "did you mean jacobi?", ""),
    "transport": (["train", "--transport", "stagd"], "did you mean staged?", "mpitrain train --help"),
    "sampling": (["train", "--sampling", "sharde"], "did you mean sharded?", ""),
    "wire": (["train", "--wire", "bfloat"], "did you mean bfloat16?", "mpitrain train --help"),
    "average": (["train", "--average", "polyack"], "did you mean polyak?", ""),
    "algorithm of a simulation": (["simulate", "--algorithm", "gosip"], "did you mean gossip?", ""),
    "data": (["simulate", "--data", "digit", "--gradients", "1"], "did you mean digits?", ""),
    "option of data": (["simulate", "--data", "synthetic:klasses=3", "--gradients", "1"], "did you mean classes?", ""),
    "model": (["simulate", "--model", "mpl", "--gradients", "1"], "did you mean mlp?", ""),
}


@pytest.mark.parametrize("case", MISSPELT)
def test_a_misspelt_name_is_one_line_with_the_nearest_and_the_right_help(case, capsys):
    arguments, words, help_of = MISSPELT[case]
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert len(line) < 250
    if help_of:
        assert line.endswith(f"(see {help_of})")


def test_the_same_from_python():
    with pytest.raises(UsageError, match=r"did you mean easgd\?"):
        algorithms.create("eagsd")
    with pytest.raises(TypeError, match=r"did you mean period\?"):
        algorithms.METHODS["easgd"](perod=3)


@pytest.mark.parametrize("value", ["runs/a", "-x", "two words", "a'b", "[x]", ""])
def test_an_option_in_words_is_read_as_its_value(value):
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    assert parser.parse_args(shlex.split(option_in_words("--out", value))).out == value
