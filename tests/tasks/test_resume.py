"""A run that was stopped, whenever and however, ends as one that was not."""

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from luna_vision.data import DigitsDataModule
from luna_vision.data.sampling import next_batch
from luna_vision.tasks import EMA, ClassificationTask, ImagesPerSecond, NonFiniteGuard
from luna_vision.tasks.checkpoints import AtomicCheckpointIO
from luna_vision.tasks.csv_log import DurableCSVLogger
from luna_vision.tasks.resume import ExactResume, RunRecord, Unfinished, go_on, newest_whole
from luna_vision.utils import files

ROOT = Path(__file__).parents[2]


class EveryMoment(ModelCheckpoint):
    """Keep a checkpoint of every place where Lightning writes one: after a batch, a validation and an epoch."""

    def __init__(self, folder: Path, workers: int = 0) -> None:
        super().__init__(folder, save_top_k=-1, every_n_train_steps=1)
        self.folder, self.moments = folder, 0

    def keep(self, trainer: Trainer, moment: str) -> None:
        if self.folder is not None and not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{self.moments:02d}-step{trainer.global_step}-{moment}.ckpt")
            self.moments += 1

    def on_train_batch_end(self, trainer, *args):
        self.keep(trainer, "batch")

    def on_validation_end(self, trainer, *args):
        self.keep(trainer, "validation")

    def on_train_epoch_end(self, trainer, *args):
        self.keep(trainer, "epoch")


def fit(
    folder: Path,
    resume: Path | None = None,
    keep: Path | None = None,
    num_workers: int = 0,
    data_arguments: dict | None = None,
    also: Sequence[Callback] = (),
    **arguments,
):
    """Two epochs of six batches with everything that is random, and what they leave: weights, logged rows."""
    seed_everything(1, verbose=False)
    loading = {"num_workers": num_workers, "persistent_workers": False}
    data = DigitsDataModule(img_size=16, batch_size=32, seed=4, **loading, **data_arguments or {})
    task = ClassificationTask(
        "test_luna_vit",
        num_classes=10,
        in_chans=1,
        model_kwargs={"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "drop_path_rate": 0.3},
        mixup=0.5,
        lr=1e-2,
        warmup_epochs=0.5,
    )
    callbacks = [ExactResume("this"), EMA(decay=0.9), ImagesPerSecond(), NonFiniteGuard()]
    callbacks += [*([EveryMoment(keep)] if keep else []), *also]
    settings = {
        "max_epochs": 2,
        "limit_train_batches": 6,
        "limit_val_batches": 2,
        "log_every_n_steps": 2,
        "gradient_clip_val": 1.0,
        "num_sanity_val_steps": 0,
        **arguments,
    }
    trainer = Trainer(
        logger=DurableCSVLogger(folder, name=""),
        callbacks=callbacks,
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=keep is not None,
        **settings,
    )
    if resume is not None:
        go_on(trainer, Unfinished([0], str(resume)))
    trainer.fit(task, data, ckpt_path=resume, weights_only=True)
    with (folder / "version_0" / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(file)]
    return task.state_dict(), rows


# with how many of the checkpoints are not to be resumed from, and which of the others are tried: each, every third
CASES = {
    "plain": ({}, 2, 1),  # after the last batch of an epoch
    "workers": ({"num_workers": 2}, 2, 3),
    "accumulation": ({"accumulate_grad_batches": 2}, 8, 3),  # and between the batches of an optimizer step
    "validation within the epoch": ({"val_check_interval": 3}, 4, 1),  # and after a batch that it follows
    "both": ({"val_check_interval": 3, "accumulate_grad_batches": 2}, 10, 1),  # and after it, where gradients wait
    "an end within the epoch": ({"val_check_interval": 3, "max_steps": 9}, 4, 1),  # and once there is nothing to do
    "no validation": ({"limit_val_batches": 0}, 2, 3),
    "no rows of steps": ({"log_every_n_steps": 0}, 2, 3),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_any_checkpoint_leads_to_the_same_end(tmp_path, case):
    """Weights and every logged row, whether the run was cut off after a batch, a validation or an epoch."""
    arguments, inexact, every = CASES[case]
    weights, rows = fit(tmp_path / "whole", keep=tmp_path / "kept", **arguments)
    kept = sorted((tmp_path / "kept").glob("*.ckpt"))
    exact = [path for path in kept if torch.load(path, weights_only=True)["callbacks"]["ExactResume"]["exact"]]
    assert len(kept) - len(exact) == inexact
    for path in exact[::every]:
        again = tmp_path / path.stem
        shutil.copytree(tmp_path / "whole", again)  # with the rows of what will be done again
        ours, logged = fit(again, resume=path, **arguments)
        assert logged == rows, path.name
        if path != exact[-1]:  # with nothing left to do, training does not end anew and leaves the raw weights in place
            torch.testing.assert_close(ours, weights, rtol=0, atol=0)


class Counted(Callback):
    """Where training begins, and how many images are in the means at the end of an epoch."""

    def on_train_start(self, trainer, task):
        self.start = next_batch(trainer)

    def on_train_epoch_end(self, trainer, task):
        self.images = {name: float(mean.weight) for name, mean in task.epoch_means.items()}


@pytest.mark.filterwarnings("ignore")
def test_an_epoch_that_was_cut_short_is_not_counted_in_the_next(tmp_path):
    """With more steps, the next epoch follows, with its own batches and their means."""
    fit(tmp_path / "run", keep=tmp_path / "kept", max_steps=3)
    path, counted = sorted((tmp_path / "kept").glob("*-step3-epoch.ckpt"))[0], Counted()
    fit(tmp_path / "run", resume=path, max_steps=9, also=[counted])
    assert counted.start == (1, 0)
    assert counted.images == {"train_loss_epoch": 6 * 32, "train_acc1_epoch": 6 * 32}


class StopAtStart(Callback):
    """Stop when the loggers have begun, and the checkpoint has not been read."""

    def setup(self, trainer, task, stage):
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_stopped_while_it_resumes_has_its_rows(tmp_path):
    _, rows = fit(tmp_path / "run", keep=tmp_path / "kept")
    path = sorted((tmp_path / "kept").glob("*-step9-batch.ckpt"))[0]
    logged = tmp_path / "run" / "version_0" / "metrics.csv"
    before = logged.read_bytes()
    with pytest.raises(SystemExit):  # which Lightning makes of Ctrl-C
        fit(tmp_path / "run", resume=path, also=[StopAtStart()])
    assert logged.read_bytes() == before
    assert fit(tmp_path / "run", resume=path)[1] == rows


def test_rows_that_are_lost_all_the_same_are_counted(tmp_path):
    fit(tmp_path / "run", keep=tmp_path / "kept")
    path = sorted((tmp_path / "kept").glob("*-step9-batch.ckpt"))[0]
    (tmp_path / "run" / "version_0" / "metrics.csv").unlink()
    with pytest.warns(UserWarning, match=r"metrics.csv has lost (\d) of the \1 rows logged so far"):
        fit(tmp_path / "run", resume=path)


def test_without_the_callback_the_end_is_another(tmp_path):
    """That the test above can fail: dropped paths are drawn from the generator whose state is kept."""
    weights, _ = fit(tmp_path / "whole", keep=tmp_path / "kept")
    path = sorted((tmp_path / "kept").glob("*-step4-batch.ckpt"))[0]
    spoiled = torch.load(path, weights_only=True)
    spoiled["callbacks"]["ExactResume"]["random"] = []
    torch.save(spoiled, path)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    ours, _ = fit(tmp_path / "again", resume=path)
    assert not all(torch.equal(ours[name], weights[name]) for name in weights)


def test_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, path)

    def opened(path, mode):
        return Failing(path, mode)

    class Failing(io.FileIO):
        def write(self, data):
            if self.tell() > 500:
                raise problem
            return super().write(data)

    monkeypatch.setattr(files, "open", opened, raising=False)
    for problem, message in (
        (OSError(28, "No space"), "cannot write .*last.ckpt: No space; what was there before is whole"),
        (KeyboardInterrupt("by the user"), "^by the user$"),
    ):
        with pytest.raises(type(problem), match=message):
            AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(300)}, path)
        assert torch.load(path, weights_only=True)["weights"].sum() == 3
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_writer_that_is_left_half_way_does_not_end_the_process(tmp_path):
    # Ctrl-C as torch's zip writer is being closed: deleted at exit, it would write to a closed file and abort
    script = """
        import torch
        from luna_vision.tasks.checkpoints import AtomicCheckpointIO
        def interrupted(self, *args):
            global kept
            kept = self
            raise KeyboardInterrupt
        torch.serialization._open_zipfile_writer_buffer.__exit__ = interrupted
        try:
            AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, "last.ckpt")
        except KeyboardInterrupt:
            print("interrupted")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout.strip()) == (0, "interrupted"), ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_newest_whole_checkpoint_of_the_configuration_is_found(tmp_path):
    names = [("first", "ours"), ("second", "ours"), ("other", "theirs"), ("inexact", "ours"), ("cut", "ours")]
    for i, (name, owner) in enumerate(names):
        state = {
            "callbacks": {"ExactResume": {"fingerprint": owner, "exact": name != "inexact"}},
            "weights": torch.ones(1000),
        }
        AtomicCheckpointIO().save_checkpoint(state, tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (i, i))
    cut = (tmp_path / "cut.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(cut[: len(cut) // 2])
    os.utime(tmp_path / "cut.ckpt", (9, 9))
    with pytest.warns(UserWarning, match="cut.ckpt is left out"):
        assert newest_whole([tmp_path, tmp_path / "none"], "ours") == str(tmp_path / "second.ckpt")


class Recorder(Logger):
    """Neither of files nor of versions."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, params):
        pass


def test_the_row_after_a_checkpoint_is_given_to_any_logger():
    callback, recorder = ExactResume(), Recorder()
    callback._trainer = trainer = Trainer(logger=recorder, callbacks=[callback], accelerator="cpu")
    state = {"random": [], "rows": [], "unwritten": {"val_acc1": 0.5, "step": 3}}
    callback.load_state_dict(state)
    assert recorder.rows == []  # of another run's checkpoint
    callback.keep_rows(trainer)
    callback.load_state_dict(state)
    assert recorder.rows == [(3, {"val_acc1": 0.5})]


def test_two_processes_do_not_begin_one_run(tmp_path):
    trainers = [Trainer(logger=CSVLogger(tmp_path, name="", version=0), accelerator="cpu") for _ in range(2)]
    first, second = RunRecord("this"), RunRecord("this")
    first.setup(trainers[0], None, "fit")
    with pytest.raises(ValueError, match="another process has just begun to work on .*version_0: start this one again"):
        second.setup(trainers[1], None, "fit")


def launch(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-u", str(ROOT / "train.py"), "fit", "--config", str(ROOT / "configs" / "debug.yaml")]
    command += ["--trainer.max_epochs=6", "--test_after_fit=false", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, text=True, env={**os.environ, "COLUMNS": "80"}, **pipes)


def end(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    run = folder / "runs" / "debug" / "version_0"
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(file)]
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"], rows


@pytest.mark.slow
def test_the_same_command_goes_on_after_a_kill(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    output, _ = launch(tmp_path / "whole").communicate(timeout=120)
    assert "resuming" not in output
    stopped = 0
    for sent, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        process = launch(tmp_path / "killed")
        last = tmp_path / "killed/runs/debug/version_0/checkpoints/last.ckpt"
        before = last.stat().st_mtime_ns if last.exists() else 0
        while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == before):
            time.sleep(0.01)
        process.send_signal(sent)
        process.communicate(timeout=60)
        stopped += process.returncode == code
    assert stopped
    process = launch(tmp_path / "killed")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "resuming the unfinished run in runs/debug/version_0, from runs/debug/version_0/checkpoints/" in output
    weights, rows = end(tmp_path / "whole")
    ours, logged = end(tmp_path / "killed")
    torch.testing.assert_close(ours, weights, rtol=0, atol=0)
    assert logged == rows
    assert not (tmp_path / "killed" / "runs" / "debug" / "version_1").exists()
    # now it has finished, and the same command is a new run
    output, _ = launch(tmp_path / "killed").communicate(timeout=120)
    assert "resuming" not in output and (tmp_path / "killed" / "runs" / "debug" / "version_1").exists()


@pytest.mark.filterwarnings("ignore")
def test_resume_is_exact_where_batches_have_several_sizes(tmp_path):
    sizes = {"train_sizes": [8, 16, [8, 12]], "patch_size": 4}
    weights, rows = fit(tmp_path / "whole", keep=tmp_path / "kept", data_arguments=sizes)
    assert len({row["train_loss"] for row in rows}) > 4
    for name in ("*-step4-batch.ckpt", "*-step9-batch.ckpt"):
        (path,) = (tmp_path / "kept").glob(name)
        again = tmp_path / path.stem
        shutil.copytree(tmp_path / "whole", again)
        ours, logged = fit(again, resume=path, data_arguments=sizes)
        assert logged == rows
        torch.testing.assert_close(ours, weights, rtol=0, atol=0)
