"""Logged rows survive whatever stops the process while the file is written anew."""

import csv
import os
import signal
import sys
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from luna_vision.cli.train import build
from luna_vision.tasks.csv_log import DurableCSVLogger, make_durable, read_rows

from .conftest import tiny_trainer

DEBUG = str(Path(__file__).parents[2] / "configs" / "debug.yaml")


def in_a_process_that_is_killed(function) -> None:
    """Run ``function`` in a copy of this process, which ends by SIGKILL when the first table is written."""

    def killed(table, rows):
        table.writerow(next(iter(rows)))
        os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        try:
            csv.DictWriter.writerows = killed
            function()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("kind", [CSVLogger, DurableCSVLogger])
def test_a_kill_while_a_column_is_added(tmp_path, kind):
    logger = kind(tmp_path, name="")
    for step in range(3):
        logger.log_metrics({"loss": step}, step)
    logger.save()
    logger.log_metrics({"accuracy": 1.0}, 3)
    in_a_process_that_is_killed(logger.save)
    rows = read_rows(tmp_path / "version_0" / "metrics.csv")[1]
    assert [row["loss"] for row in rows] == ([] if kind is CSVLogger else ["0", "1", "2"])  # that the test can fail
    logger.save()
    rows = read_rows(tmp_path / "version_0" / "metrics.csv")[1]
    if kind is DurableCSVLogger:
        assert [(row["step"], row["accuracy"]) for row in rows] == [("0", ""), ("1", ""), ("2", ""), ("3", "1.0")]


def test_a_full_disk_while_a_column_is_added(tmp_path, monkeypatch):
    logger = DurableCSVLogger(tmp_path, name="")
    logger.log_metrics({"loss": 0.5}, 0)
    logger.save()
    before = (tmp_path / "version_0" / "metrics.csv").read_bytes()
    logger.log_metrics({"accuracy": 1.0}, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        logger.save()
    assert [path.name for path in (tmp_path / "version_0").iterdir()] == ["metrics.csv"]
    assert (tmp_path / "version_0" / "metrics.csv").read_bytes() == before


def test_rows_of_another_run_are_deleted_and_those_of_this_one_kept(tmp_path):
    for goes_on in (True, False):
        logger = DurableCSVLogger(tmp_path, name="", version=0)
        logger.goes_on = goes_on
        path = tmp_path / "version_0" / "metrics.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("loss,step\n1.0,0\n")
        _ = logger.experiment
        assert path.exists() == goes_on


def test_train_py_logs_durably_as_the_config_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments = {"name": "other", "prefix": "a", "version": "b", "flush_logs_every_n_steps": 7}
    changed = [f"--trainer.logger.init_args.{name}={value}" for name, value in arguments.items()]
    kind = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=runs"]
    for words, folder in (([], "runs/debug/version_0"), ([*kind, *changed], "runs/other/b")):
        logger = build(["--config", DEBUG, *words], run=False).trainer.loggers[0]
        assert type(logger) is DurableCSVLogger and logger.log_dir == folder
    assert (logger._prefix, logger._flush_logs_every_n_steps) == ("a", 7)
    assert not list(tmp_path.iterdir())


def test_other_loggers_stay(tmp_path):
    class Own(CSVLogger):
        """Whose writer may be anything."""

    given = [Own(tmp_path), TensorBoardLogger(tmp_path), CSVLogger(tmp_path)]
    trainer = tiny_trainer(tmp_path, logger=given)
    make_durable(trainer)
    assert trainer.loggers[:2] == given[:2] and type(trainer.loggers[2]) is DurableCSVLogger
