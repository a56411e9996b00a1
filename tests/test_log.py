"""The log of the commands: on stderr, once, by the main process."""

import logging

import pytest

from pipeline.log import log_to_stderr

log = logging.getLogger("pipeline.some.room")


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({}, ["note 1", "warning: mind 2"]),
        ({"RANK": "0"}, ["note 1", "warning: mind 2"]),
        ({"RANK": "1"}, []),
        ({"SLURM_PROCID": "3"}, []),
        ({"RANK": "1", "CODA_TRACEBACK": "1"}, ["warning: mind 2"]),
    ],
)
def test_the_main_process_reports(environment, shown, monkeypatch, capsys):
    # A process group of an earlier test may have left its rank.
    for name in ("RANK", "SLURM_PROCID", "CODA_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with log_to_stderr():
        log.info("note %d", 1)
        log.warning("mind %d", 2)
    captured = capsys.readouterr()
    assert [line for line in captured.err.splitlines() if line.strip()] == shown
    assert not captured.out


def test_a_library_keeps_its_own_logging(caplog, capsys):
    before = (logging.getLogger("pipeline").level, logging.getLogger("pipeline").handlers[:])
    with log_to_stderr():
        log.info("looked up, and remembered")
    capsys.readouterr()
    log.info("not shown")
    log.warning("mind")
    logger = logging.getLogger("pipeline")
    assert caplog.messages == ["mind"]
    assert not capsys.readouterr().err
    assert (logger.level, logger.handlers) == before
