"""Options in a file: every one is written and read again, the command line wins, and mistakes are named."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest
from trainer.test_agreement import ANOTHER

from mpitrain.cli.main import main
from mpitrain.cli.options import Parser
from mpitrain.cli.train import add_arguments, configuration
from mpitrain.errors import UsageError
from mpitrain.trainer import config_file
from mpitrain.trainer.config import BUDGETS, TrainConfig
from mpitrain.trainer.optimizers import AdamW
from mpitrain.trainer.options import options_of
from mpitrain.trainer.plan import RunPlan
from mpitrain.trainer.schedules import Cosine


def other_than_default(name):
    """Return a configuration in which one option has another value than the default."""
    value = getattr(TrainConfig(), name)
    other = ANOTHER[name] if name in ANOTHER else not value if isinstance(value, bool) else type(value)(value + 1)
    budget = {"epochs": None} if name in BUDGETS and name != "epochs" else {}
    budget |= {"data": "own:data"} if name == "workers" else {}  # no other data have workers
    return dataclasses.replace(TrainConfig(), **budget, **{name: other})


def of_command_line(*words):
    parser = Parser(prog="mpitrain train")
    add_arguments(parser)
    return configuration(parser.parse_args(words))


@pytest.mark.parametrize("name", options_of(TrainConfig))
def test_every_option_is_written_and_read_again(name, tmp_path):
    config = other_than_default(name)
    assert config != TrainConfig()
    path = tmp_path / "run.toml"
    config_file.write(path, config)
    assert TrainConfig(**config_file.read(path)) == config
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": config.to_json()}))
    assert TrainConfig(**config_file.read(path)) == config
    assert of_command_line("--config", str(path)) == config


@pytest.mark.parametrize(
    "text",
    ['a "quoted" name', "back\\slash", "\u00fcml\u00e4ut \U0001f600", "tab\tnew\nline", "\x7f\x01", "# =", ""],
    ids=ascii,
)
def test_any_text_is_written_and_read_again(text):
    config = TrainConfig(data=text, settings={"a": text, "b c.d": "1"})
    found = tomllib.loads(config_file.to_text(config))
    assert (found["data"], found["set"]) == (text, {"a": text, "b c.d": "1"})


def test_a_file_is_what_a_user_writes(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        """
        algorithm = "easgd"
        batch_size = 16
        lr = 1
        steps = 40
        augment = true
        straggler = "1:4"
        inject = ["nan:rank=0,step=3"]
        [set]
        period = 10
        moving_rate = 0.25
        synchronous = true
        """
    )
    expected = TrainConfig(
        settings={"period": "10", "moving_rate": "0.25", "synchronous": "true"},
        batch_size=16,
        lr=1.0,
        steps=40,
        augment=True,
        straggler=(1, 4.0),
        inject=("nan:rank=0,step=3",),
    )
    assert of_command_line("--config", str(path)) == expected
    changed = of_command_line("--config", str(path), "--set", "period=3", "--epochs", "2", "--lr", "2", "--no-augment")
    settings = {**expected.settings, "period": "3"}
    assert changed == dataclasses.replace(expected, settings=settings, steps=None, epochs=2.0, lr=2.0, augment=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch-sise = 3", "run.toml has the key 'batch-sise', which is no option: did you mean batch-size"),
        ("batch-size = 3.5", "run.toml: batch-size must be a whole number, not 3.5"),
        ("batch-size = true", "run.toml: batch-size must be a whole number, not True"),
        ("lr = '1'", "run.toml: lr must be a number, not '1'"),
        ("augment = 1", "run.toml: augment must be true or false, not 1"),
        ("data = 1", "run.toml: data must be a text, not 1"),
        ("set = 1", "run.toml: set must be a table of KEY = VALUE, not 1"),
        ("set = {a = [1]}", "run.toml: set must be a table of KEY = VALUE"),
        ("inject = 'nan'", "run.toml: inject must be a list, not 'nan'"),
        ("inject = [1]", "run.toml: inject must be a list of texts, not 1"),
        ("straggler = 'x'", "run.toml: straggler must be RANK:FACTOR"),
        ("lr = ", "run.toml cannot be parsed"),
        ("lr = -1", "--lr must be 0 or more, not -1"),
        ("steps = 1\nepochs = 1.0", "give one of --epochs, --steps"),
    ],
)
def test_a_mistake_in_a_file_is_named(text, message, tmp_path):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        of_command_line("--config", str(tmp_path / "run.toml"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be parsed"),
        ("{}", "is not the config.json of a run"),
        ('{"config": {"lrr": 1}}', "did you mean lr"),
    ],
)
def test_a_file_that_is_no_configuration_of_a_run_is_refused(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        config_file.read(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["absent.toml", "."])
def test_a_file_that_cannot_be_read_is_named(name, tmp_path):
    with pytest.raises(UsageError, match=r"--config .* cannot be read"):
        config_file.read(tmp_path / name)
    (tmp_path / "latin.toml").write_bytes(b"data = '\xff'")
    with pytest.raises(UsageError, match=r"cannot be read"):
        config_file.read(tmp_path / "latin.toml")


def test_all_options_are_written_on_request_and_nothing_is_trained(tmp_path):
    path = tmp_path / "run.toml"
    words = ["--algorithm", "eamsgd", "--set", "period=7", "--lr", "0.3"]
    assert main(["train", *words, "--write-config", str(path), "--out", str(tmp_path / "run")]) == 0
    assert of_command_line("--config", str(path)) == of_command_line(*words, "--out", str(tmp_path / "run"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.toml"]
    assert main(["train", "--write-config", str(tmp_path / "absent" / "run.toml")]) == 2
    assert main(["train", "--algorithm", "nope", "--write-config", str(path)]) == 2


def test_the_file_in_the_readme_is_a_run(tmp_path):
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (text,) = re.findall(r"```toml\n(.*?)```", readme, re.DOTALL)
    path = tmp_path / "job.toml"
    path.write_text(text)
    plan = RunPlan.of(of_command_line("--config", str(path)))
    assert (plan.optimizer, plan.schedule) == (AdamW(beta2=0.95), Cosine(final=0.1))
    assert len(tomllib.loads(text)) == 18


def test_a_resumed_run_takes_its_file_too(tmp_path):
    config = TrainConfig(steps=5, lr=0.2)
    (tmp_path / "config.json").write_text(json.dumps({"config": config.to_json()}))
    path = tmp_path / "run.toml"
    path.write_text("steps = 9\nlr = 0.2")
    words = ["--resume", str(tmp_path), "--config", str(path)]
    assert of_command_line(*words) == dataclasses.replace(config, steps=9)
    path.write_text("lr = 0.3")
    with pytest.raises(UsageError, match=r"--lr is 0.2 in the run that is resumed, not 0.3"):
        of_command_line(*words)
