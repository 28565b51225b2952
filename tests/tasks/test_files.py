"""What training and prediction write: through no link, whole, and harmless to open."""

import csv
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from luna_vision.data import ImageFolderDataModule
from luna_vision.tasks import LastCheckpoint, PredictionWriter, export_weights
from luna_vision.tasks.checkpoints import AtomicCheckpointIO
from luna_vision.tasks.resume import ExactResume

from .conftest import tiny_task, tiny_trainer

NAMES = ["=1+1.png", "-2.png", "a,b.png", os.fsdecode(b"06\xff.png"), "x\x1b[31m.png", "plain.png"]
CLASSES = ["=cmd|' /C calc'!A0", "+1", "@SUM(1)", "-5", "cat", "'quoted"]


def test_predictions_are_no_formulas(tmp_path, monkeypatch):
    """And the names can be recovered, and numbers are numbers."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        Image.new("L", (16, 16)).save(tmp_path / "a.png")
        os.rename(tmp_path / "a.png", tmp_path / name)
    data = ImageFolderDataModule(".", img_size=16, in_chans=1, num_workers=0, predict_path=NAMES, batch_size=4)
    data.class_names = CLASSES
    trainer = tiny_trainer(tmp_path, callbacks=[PredictionWriter("out/predictions.csv")])
    trainer.predict(tiny_task(), data, return_predictions=False)
    with open("out/predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cells = [cell for row in rows for cell in row.values()]
    assert len(rows) == len(NAMES) and not [c for c in cells if c[:1] in "=+@\t\r" and c != "+1"]
    assert [row["image"].removeprefix("'") for row in rows] == [name.replace("\udcff", r"\xff") for name in NAMES]
    assert {row["label1"] for row in rows} <= {f"'{c}" if c[0] in "=@'" else c for c in CLASSES}
    assert all(0 <= float(row["probability1"]) <= 1 for row in rows)
    assert os.listdir("out") == ["predictions.csv"]


def test_predictions_that_are_not_finished_are_not_there(tmp_path, data, monkeypatch):
    """Nor is anything left of data that is no files, as no later run can tell what is finished."""
    writer = PredictionWriter(str(tmp_path / "predictions.csv"))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("luna_vision.tasks.prediction_files.Journal.add", full)
    with pytest.raises(OSError, match="cannot write .*predictions.csv: No space left on device"):
        tiny_trainer(tmp_path, callbacks=[writer]).predict(tiny_task(), data, return_predictions=False)
    assert not list(tmp_path.glob("*predictions*"))


def test_links_at_names_that_were_fixed_are_not_followed(tmp_path, data):
    """Whoever may write to a shared folder may have put them there."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    names = [
        "checkpoints/.last.ckpt.partial",
        "checkpoints/.best.ckpt.partial",
        ".run.json.partial",
    ]
    names += ["out.safetensors.partial", ".predictions.csv.partial", "predictions.csv.partial"]
    for name in names:
        (folder / name).symlink_to(victim)
    callbacks = [LastCheckpoint(), ModelCheckpoint(folder / "checkpoints", filename="best"), ExactResume({})]
    logger = CSVLogger(tmp_path, name="", version="run")
    trainer = tiny_trainer(folder, max_epochs=1, callbacks=callbacks, enable_checkpointing=True, logger=logger)
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    trainer.fit(tiny_task(), data)
    export_weights(folder / "checkpoints" / "best.ckpt", folder / "out.safetensors")
    writer = PredictionWriter(str(folder / "predictions.csv"))
    tiny_trainer(folder, callbacks=[writer]).predict(tiny_task(), data, return_predictions=False)
    assert victim.read_text() == "precious"
    written = ["checkpoints/last.ckpt", "checkpoints/best.ckpt", "run.json", "metrics.csv", "out.safetensors"]
    for name in [*written, "predictions.csv"]:
        assert (folder / name).is_file() and not (folder / name).is_symlink(), name


def test_what_killed_runs_leave_does_not_pile_up(tmp_path, data):
    """A checkpoint is large, and may be killed while it is written many times over."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for _ in range(2):
        if (child := os.fork()) == 0:
            os.fsync = lambda *_: os._exit(0)
            AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, folder / "last.ckpt")
        os.waitpid(child, 0)
    assert len(os.listdir(folder)) == 2
    callbacks = [LastCheckpoint(), ExactResume({})]
    tiny_trainer(tmp_path, max_epochs=1, callbacks=callbacks, enable_checkpointing=True).fit(tiny_task(), data)
    assert os.listdir(folder) == ["last.ckpt"]


@pytest.mark.parametrize("name", [".mine.partial", ".mine.partial.ckpt", "mine.0123abcd.partial.ckpt"])
def test_files_of_others_beside_checkpoints_stay(name, tmp_path, data):
    path = tmp_path / "checkpoints" / name
    path.parent.mkdir()
    path.write_text("mine")
    tiny_trainer(tmp_path, max_epochs=1, callbacks=[ExactResume({})]).fit(tiny_task(), data)
    assert path.read_text() == "mine"


def test_all_that_is_written_may_be_read_by_the_group(tmp_path, data):
    """As the umask says, though safetensors gives files to their owner alone."""
    before = os.umask(0o027)
    try:
        callbacks = [LastCheckpoint(), ExactResume({})]
        tiny_trainer(tmp_path, max_epochs=1, callbacks=callbacks, enable_checkpointing=True).fit(tiny_task(), data)
        torch.save({"state_dict": tiny_task().state_dict()}, tmp_path / "a.ckpt")
        export_weights(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    for path in (tmp_path / "run.json", tmp_path / "a.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o640
    assert Path(tmp_path, "run.json").read_text().endswith("}\n")
