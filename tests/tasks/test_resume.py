"""A run that was stopped, whenever and however, ends as one that was not."""

import io
import json
import os
import shutil
from collections.abc import Sequence
from multiprocessing import Process
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from luna_vision.data import DigitsDataModule
from luna_vision.data.sampling import next_batch
from luna_vision.tasks import EMA, ClassificationTask, ImagesPerSecond, NonFiniteGuard
from luna_vision.tasks.checkpoints import AtomicCheckpointIO
from luna_vision.tasks.resume import ExactResume, latest_complete, random_states, resume, set_random_states
from luna_vision.utils import files

from .conftest import last_rows, tiny_trainer
from .ranks import DEBUG, command_line, finish, run, said, start, until


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
    checkpoint: Path | None = None,
    keep: Path | None = None,
    num_workers: int = 0,
    data_arguments: dict | None = None,
    also: Sequence[Callback] = (),
    **arguments,
):
    """Two epochs of six batches with everything that is random, and what they leave: weights, and the last row that was
    logged of each step and kind."""
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
    callbacks = [ExactResume(), EMA(decay=0.9), ImagesPerSecond(), NonFiniteGuard()]
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
        logger=CSVLogger(folder, name=""),
        callbacks=callbacks,
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=keep is not None,
        **settings,
    )
    if checkpoint is not None:
        resume(trainer, {}, asked=True)
    trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
    return task.state_dict(), last_rows(folder / "version_0" / "metrics.csv")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict, dict]:
    """A folder with the run in `whole` and the checkpoints of all its moments in `kept`; its weights and its rows."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, *fit(folder / "whole", keep=folder / "kept")


# with how many of the checkpoints are not to be resumed from, and which of the others are tried: each, every third
CASES = {
    "plain": ({}, 2, 2),  # after the last batch of an epoch
    "workers": ({"num_workers": 2}, 2, 5),
    # between the batches of an optimizer step, after a validation within the epoch, and where gradients wait there
    "accumulation": ({"val_check_interval": 3, "accumulate_grad_batches": 2}, 10, 1),
    "an end within the epoch": ({"val_check_interval": 3, "max_steps": 9}, 4, 2),  # and once there is nothing to do
    "no validation": ({"limit_val_batches": 0}, 2, 5),
    "no rows of steps": ({"log_every_n_steps": 0}, 2, 5),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_any_checkpoint_leads_to_the_same_end(tmp_path, case, request):
    """Weights and what is logged, whether the run was cut off after a batch, a validation or an epoch."""
    arguments, inexact, every = CASES[case]
    if arguments:
        folder, (weights, rows) = tmp_path, fit(tmp_path / "whole", keep=tmp_path / "kept", **arguments)
    else:
        folder, weights, rows = request.getfixturevalue("whole")
    kept = sorted((folder / "kept").glob("*.ckpt"))
    exact = [path for path in kept if torch.load(path, weights_only=True)["callbacks"]["ExactResume"]["exact"]]
    assert len(kept) - len(exact) == inexact
    for path in exact[::every]:
        again = tmp_path / path.stem
        shutil.copytree(folder / "whole", again)  # with the rows of what will be done again
        ours, logged = fit(again, checkpoint=path, **arguments)
        assert logged == rows, path.name
        if path != exact[-1]:  # with nothing left to do, training does not end anew and leaves the raw weights in place
            torch.testing.assert_close(ours, weights, rtol=0, atol=0)


class Counted(Callback):
    """Where training begins, and how many images are in the means at the end of an epoch."""

    def on_train_start(self, trainer, task):
        self.start = next_batch(trainer)

    def on_train_epoch_end(self, trainer, task):
        self.images = {name: float(mean.weight) for name, mean in task.means.items() if name.startswith("train")}


@pytest.mark.filterwarnings("ignore")
def test_an_epoch_that_was_cut_short_is_not_counted_in_the_next(tmp_path):
    """With more steps, the next epoch follows, with its own batches and their means."""
    fit(tmp_path / "run", keep=tmp_path / "kept", max_steps=3)
    path, counted = sorted((tmp_path / "kept").glob("*-step3-epoch.ckpt"))[0], Counted()
    fit(tmp_path / "run", checkpoint=path, max_steps=9, also=[counted])
    assert counted.start == (1, 0)
    assert counted.images == {"train_loss_epoch": 6 * 32, "train_acc1_epoch": 6 * 32}


class StopAtStart(Callback):
    """Stop when the loggers have begun, and the checkpoint has not been read."""

    def setup(self, trainer, task, stage):
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_stopped_while_it_resumes_has_its_rows(whole, tmp_path):
    folder, _, rows = whole
    path = sorted((folder / "kept").glob("*-step9-batch.ckpt"))[0]
    shutil.copytree(folder / "whole", tmp_path / "run")
    logged = tmp_path / "run" / "version_0" / "metrics.csv"
    before = logged.read_bytes()
    with logged.open("ab") as file:
        file.write(b"0.5,1,0.2")  # a row that a kill has cut off
    with pytest.raises(SystemExit):  # which Lightning makes of Ctrl-C
        fit(tmp_path / "run", checkpoint=path, also=[StopAtStart()])
    assert logged.read_bytes() == before
    assert fit(tmp_path / "run", checkpoint=path)[1] == rows
    assert logged.read_bytes().startswith(before)


def test_without_the_callback_the_end_is_another(whole, tmp_path):
    """That the test above can fail: dropped paths are drawn from the generator whose state is kept."""
    folder, weights, _ = whole
    (path,) = (folder / "kept").glob("*-step4-batch.ckpt")
    spoiled = torch.load(path, weights_only=True)
    spoiled["callbacks"]["ExactResume"]["random"] = []
    torch.save(spoiled, tmp_path / "spoiled.ckpt")
    shutil.copytree(folder / "whole", tmp_path / "again")
    ours, _ = fit(tmp_path / "again", checkpoint=tmp_path / "spoiled.ckpt")
    assert not all(torch.equal(ours[name], weights[name]) for name in weights)


def test_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, path)

    def opened(path, mode):
        return Failing(path, mode)

    class Failing(io.FileIO):
        def write(self, data):
            super().write(data[:500])
            raise problem

    monkeypatch.setattr(files, "open", opened, raising=False)
    for problem, message in (
        (OSError(28, "No space"), "cannot write .*last.ckpt: No space; what was there before is whole"),
        (KeyboardInterrupt("by the user"), "^by the user$"),
    ):
        with pytest.raises(type(problem), match=message):
            AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(300)}, path)
        assert torch.load(path, weights_only=True)["weights"].sum() == 3
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_newest_complete_checkpoint_of_the_configuration_is_found(tmp_path):
    names = [("first", 1), ("second", 1), ("other", 2), ("inexact", 1), ("cut", 1)]
    folder = tmp_path / "checkpoints"
    for i, (name, lr) in enumerate(names):
        state = {
            "callbacks": {"ExactResume": {"config": {"lr": lr}, "exact": name != "inexact"}},
            "weights": torch.ones(1000),
        }
        AtomicCheckpointIO().save_checkpoint(state, folder / f"{name}.ckpt")
        os.utime(folder / f"{name}.ckpt", (i, i))
    cut = (folder / "cut.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(cut[: len(cut) // 2])
    os.utime(folder / "cut.ckpt", (9, 9))
    with pytest.warns(UserWarning, match="cut.ckpt is left out"):
        assert latest_complete(tiny_trainer(tmp_path), tmp_path, {"lr": 1}) == str(folder / "second.ckpt")


def trainer_in(folder: Path, config: dict) -> Trainer:
    return tiny_trainer(folder, logger=CSVLogger(folder, name="r"), callbacks=[ExactResume(config)])


@pytest.fixture
def unfinished(tmp_path) -> Path:
    """The folder of a run with lr 0.1 that was stopped before it had a checkpoint."""
    folder = tmp_path / "r" / "version_3"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"finished": False, "config": {"model": {"lr": 0.1}}}))
    return folder


@pytest.mark.parametrize("how", ["asked", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_run_is_resumed_if_asked_or_if_the_job_was_restarted(unfinished, tmp_path, monkeypatch, caplog, how):
    for config, number in (({"model": {"lr": 0.1}}, 3), ({"model": {"lr": 0.2}}, 4)):
        trainer = trainer_in(tmp_path, config)
        for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
            monkeypatch.setenv(name, "0")  # as torchrun sets it
        assert resume(trainer, config, asked=False) is None and trainer.logger.version == 4
        unfinished = "version_3 is an unfinished run of this configuration: --resume continues it"
        assert (unfinished in caplog.text) == (number == 3)
        caplog.clear()
        if how != "asked":
            monkeypatch.setenv(how, "1")
        trainer = trainer_in(tmp_path, config)
        if how == "asked" and number == 4:
            with pytest.raises(ValueError, match=r"version_3 .* model.lr \(0.1 there, 0.2 here\)"):
                resume(trainer, config, asked=True)
        else:
            assert resume(trainer, config, asked=how == "asked") is None
            assert Path(trainer.logger.log_dir).name == f"version_{number}"
            assert ("this is a new one" in caplog.text) == (number == 4)
            caplog.clear()


def test_two_processes_are_not_at_work_on_one_run(unfinished, tmp_path):
    config = {"model": {"lr": 0.1}}
    first, second, new = (trainer_in(tmp_path, config) for _ in range(3))
    resume(first, config, asked=True)
    with pytest.raises(ValueError, match="another process is at work on .*version_3"):
        resume(second, config, asked=True)
    new.logger._version = 3
    with pytest.raises(ValueError, match="another process is at work on .*version_3"):
        new.callbacks[0].setup(new, None, "fit")


@pytest.mark.parametrize("other", ["config", "code", "processes", "moment", "unknown"])
def test_a_checkpoint_of_another_run_says_what_differs(whole, tmp_path, other):
    (path,) = (whole[0] / "kept").glob("*-step11-batch.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    state, words = checkpoint["callbacks"]["ExactResume"], other
    if other == "config":
        state["config"], words = {"lr": 0.5}, r"config.lr \(0.5 there, None here\)$"
    elif other == "code":
        state["code"]["torch"], words = "1.0", r"code.torch \(.1.0. there, .*here\)$"
    elif other == "processes":
        state["processes"], state["random"], words = 2, state["random"] * 2, r"processes \(2 there, 1 here\)$"
    elif other == "moment":
        state["exact"] = False
    else:
        del checkpoint["callbacks"]["ExactResume"]
        words = "it does not say in what"
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.warns(UserWarning, match=rf"other.ckpt is not of this run as it is now: .*{words}"):
        fit(tmp_path / "second", checkpoint=tmp_path / "other.ckpt")


def end(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    run = folder / "runs" / "debug" / "version_0"
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return weights, last_rows(run / "metrics.csv")


@pytest.mark.slow
def test_a_run_that_was_killed_is_resumed(tmp_path):
    words = ["fit", f"--config={DEBUG}", "--trainer.max_epochs=6", "--test_after_fit=false"]
    run(tmp_path / "whole", 1, command_line, *words)
    assert "unfinished" not in said(tmp_path / "whole")
    last, stopped = tmp_path / "killed/runs/debug/version_0/checkpoints/last.ckpt", 0
    for stop, code, more in ((Process.kill, -9, []), (Process.terminate, 143, ["--resume"])):
        before = last.stat().st_mtime_ns if last.exists() else 0
        (process,) = processes = start(tmp_path / "killed", 1, command_line, *words, *more)
        until(lambda before=before: last.exists() and last.stat().st_mtime_ns != before, processes)
        stop(process)
        stopped += finish(tmp_path / "killed", processes) == [code]
    assert stopped
    run(tmp_path / "killed", 1, command_line, *words, "--resume")
    resuming = "resuming the unfinished run in runs/debug/version_0, from runs/debug/version_0/checkpoints/"
    assert resuming in said(tmp_path / "killed")
    (weights, rows), (ours, logged) = end(tmp_path / "whole"), end(tmp_path / "killed")
    torch.testing.assert_close(ours, weights, rtol=0, atol=0)
    assert all(rows[key] == row for key, row in logged.items())
    # SIGKILL, in the first epochs, may come while Lightning rewrites the file for a new column
    assert max([step for step, *names in rows if (step, *names) not in logged], default=0) <= 4
    assert not (tmp_path / "killed" / "runs" / "debug" / "version_1").exists()
    config = (tmp_path / "killed/runs/debug/version_0/config.yaml").read_text()
    assert "resume: false" in config and "resume: true" not in config  # it is for new runs


@pytest.mark.filterwarnings("ignore")
def test_resume_is_exact_where_batches_have_several_sizes(tmp_path):
    sizes = {"train_sizes": [8, 16, [8, 12]], "patch_size": 4}
    weights, rows = fit(tmp_path / "whole", keep=tmp_path / "kept", data_arguments=sizes)
    assert len({row.get("train_loss") for row in rows.values()}) > 4
    for name in ("*-step4-batch.ckpt", "*-step9-batch.ckpt"):
        (path,) = (tmp_path / "kept").glob(name)
        again = tmp_path / path.stem
        shutil.copytree(tmp_path / "whole", again)
        ours, logged = fit(again, checkpoint=path, data_arguments=sizes)
        assert logged == rows
        torch.testing.assert_close(ours, weights, rtol=0, atol=0)


def test_the_generator_of_the_gpu_is_part_of_a_checkpoint(monkeypatch):
    """Tried on a generator that stands for it: dropout and stochastic depth draw from it."""
    gpu = torch.Generator().manual_seed(1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", gpu.get_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", gpu.set_state)
    states = random_states()
    first = torch.rand(3, generator=gpu)
    set_random_states(states)
    assert torch.equal(torch.rand(3, generator=gpu), first)
