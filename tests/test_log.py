"""Log lines: their look on standard error, the ranks that write them, and the handlers of an application."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest

from mpitrain import log
from mpitrain.log import decoration, logger

LEVELS = (logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)


@pytest.fixture(autouse=True)
def restored_rank() -> Iterator[None]:
    rank, level = log._RankFilter.rank, logger.level
    yield
    log.set_rank(rank)
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("rank", "lines"),
    [
        (0, ["mpitrain: a text", "mpitrain: warning: a text", "mpitrain: error: a text", "mpitrain: a text"]),
        (2, ["mpitrain: error (rank 2): a text", "mpitrain (rank 2): a text"]),
    ],
)
def test_rank_0_logs_everything_and_other_ranks_errors(
    rank: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    log.set_rank(rank)
    for level in LEVELS:
        logger.log(level, "a %s", "text")
    logger.debug("not shown")
    assert capsys.readouterr() == ("", "".join(f"{line}\n" for line in lines))


def test_another_rank_logs_everything_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_rank(1)
    logger.setLevel(logging.DEBUG)
    logger.warning("a text")
    assert capsys.readouterr().err == "mpitrain: warning (rank 1): a text\n"


def test_another_rank_logs_what_concerns_it(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_rank(1)
    logger.warning("a text", extra=log.ANY_RANK)
    assert capsys.readouterr().err == "mpitrain: warning (rank 1): a text\n"


def test_records_reach_the_handlers_of_an_application(caplog: pytest.LogCaptureFixture) -> None:
    log.set_rank(3)
    logger.error("a text")
    assert [(record.name, record.getMessage(), record.rank) for record in caplog.records] == [("mpitrain", "a text", 3)]


def test_a_line_appears_once_where_the_application_logs_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(rank)d %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        logger.warning("a text")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err == "0 WARNING a text\n"


def test_a_handler_of_an_application_that_drops_a_record_does_not_silence_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    quiet = logging.StreamHandler(sys.stderr)
    quiet.setLevel(logging.ERROR)
    logging.getLogger().addHandler(quiet)
    try:
        logger.warning("a text")
    finally:
        logging.getLogger().removeHandler(quiet)
    assert capsys.readouterr().err == "mpitrain: warning: a text\n"


@pytest.mark.parametrize("error", [KeyError("c$5_{x$"), OSError(28, "No space left\non device"), ImportError("Qt")])
def test_an_error_of_a_decoration_is_one_warning_and_no_more(error, capsys):
    with decoration("the plot"):
        raise error
    (line,) = capsys.readouterr().err.splitlines()
    assert "the plot is missing" in line
    assert "the result is not affected" in line


def test_a_decoration_does_not_keep_a_user_from_ending_the_run():
    with pytest.raises(KeyboardInterrupt), decoration("the plot"):
        raise KeyboardInterrupt
