"""``metrics.csv`` that a kill or a full disk leaves with all the rows it had.

Lightning's CSVLogger empties its file and writes it anew whenever a metric is logged for the first time, and deletes it
where a run goes on. What stops the process at such a moment takes all that was logged with it.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from luna_vision.utils.files import write_text

Row = dict[str, str]


class DurableCSVLogger(CSVLogger):
    """Lightning's CSVLogger, which moves a file that is written anew into its place when it is whole.

    Attributes:
        goes_on: Whether the rows that are in the file already are those of this run. Otherwise they are deleted, as
            Lightning does.
    """

    goes_on = False

    @classmethod
    def like(cls, logger: CSVLogger) -> DurableCSVLogger:
        """One that writes what ``logger``, which has written nothing yet, would write."""
        every = logger._flush_logs_every_n_steps
        return cls(logger._save_dir, logger._name, logger._version, logger._prefix, every)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _Writer(self.log_dir, self.goes_on)
        return self._experiment


class _Writer(ExperimentWriter):
    def __init__(self, log_dir: str, goes_on: bool) -> None:
        self._goes_on = goes_on
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        if not self._goes_on:
            super()._check_log_dir_exists()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        if "://" in self.log_dir:  # object storage is written whole or not at all
            super()._rewrite_with_new_header(fieldnames)
        else:
            write_rows(self.metrics_file_path, fieldnames, read_rows(self.metrics_file_path)[1])


def make_durable(trainer: Trainer) -> None:
    """Put `DurableCSVLogger` in the place of the trainer's CSV loggers, before they have written anything."""
    trainer.loggers = [DurableCSVLogger.like(x) if type(x) is CSVLogger else x for x in trainer.loggers]


def read_rows(path: str | Path) -> tuple[list[str], list[Row]]:
    """Column names and rows of a CSV file; none if there is no file. A row that a kill cut off is no row."""
    path = Path(path)
    if not path.is_file():
        return [], []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or []), [row for row in reader if None not in row.values()]


def write_rows(path: str | Path, names: list[str], rows: list[Row]) -> None:
    """Write a CSV file on the disk, and then in the place of the one that is there.

    Raises:
        OSError: It cannot be written, for instance as the disk is full. What was at ``path`` is as it was.
    """
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fieldnames=names)
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())
