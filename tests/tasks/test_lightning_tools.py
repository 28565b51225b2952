"""Lightning's callbacks, tuners and loggers in a run: each does what it says, or is refused in one line."""

import copy
import csv
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch import callbacks as lightning
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from luna_vision.cli import train as cli
from luna_vision.tasks.callbacks import check_tools
from luna_vision.tasks.checkpoints import read_checkpoint
from luna_vision.tasks.resume import take_tuned
from luna_vision.utils.errors import UserError

from .conftest import tiny_task, tiny_trainer
from .ranks import DEBUG, without_ema

RUN = Path("runs/debug/version_0")
SHORT = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.accumulate_grad_batches=1"]
QUIET = ["--test_after_fit=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
pytestmark = pytest.mark.filterwarnings("ignore")


class Watch(Callback):
    """The rates of all groups in each step, and the weights of the head after each epoch."""

    def __init__(self):
        self.rates, self.batches, self.heads, self.trained = [], [], [], []

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        self.batches.append(len(batch[0]))
        self.trained.append(sum(p.numel() for p in task.model.parameters() if p.requires_grad))

    def on_train_epoch_start(self, trainer, task):
        self.heads.append(copy.deepcopy(task.model.head.weight.data))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without_ema(tmp_path)


def added(name: str, **arguments) -> list[str]:
    """The words of a command line that add a callback of Lightning's."""
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{k}={v}" for k, v in arguments.items())]


def fit(*words: str, config: str = "config.yaml") -> tuple[cli.LunaCLI, Watch]:
    """A run of two batches an epoch, in this process."""
    watch, plain = Watch(), cli.LunaCLI.instantiate_trainer

    def instantiate_trainer(self, **kwargs):
        trainer = plain(self, **kwargs)
        trainer.callbacks.append(watch)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.LunaCLI, "instantiate_trainer", instantiate_trainer)
        patch.setattr(sys, "argv", ["train.py"])
        return cli.build(["fit", f"--config={config}", *SHORT, *QUIET, *words]), watch


def refused(capsys, *words: str, config: str = "config.yaml") -> str:
    """The one line of a run that ends with exit code 2, before it has made a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "fit", f"--config={config}", *SHORT, *QUIET, *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 2 and not RUN.exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def rows() -> list[dict[str, str]]:
    with (RUN / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---- tools that set the rate, the batch or the weights


def test_stochastic_weight_averaging():
    """Its rate comes at the end of the annealing, and the exported weights are the average."""
    swa = added("StochasticWeightAveraging", swa_lrs=0.05, swa_epoch_start=0.5, annealing_epochs=1)
    built, watch = fit(*swa, "--trainer.max_epochs=4")
    rates = [max(rates) for rates in watch.rates[::2]]
    assert rates[0] < 2e-3 and rates[-1] == pytest.approx(0.05)
    (callback,) = (c for c in built.trainer.callbacks if isinstance(c, lightning.StochasticWeightAveraging))
    assert callback.n_averaged == 3
    average = sum(watch.heads[1:]) / 3  # at the starts of epochs 1 to 3
    exported = load_file(RUN / "checkpoints/best.safetensors")["head.weight"]
    torch.testing.assert_close(exported, average)
    assert torch.equal(built.model.model.head.weight, exported)


def test_learning_rate_finder():
    """The schedule, with layer decay, begins and ends as one of the rate that was found."""
    found = added("LearningRateFinder", num_training_steps=30, early_stop_threshold="null", max_lr=0.1)
    words = ["--model.warmup_epochs=0", "--trainer.max_epochs=2", "--trainer.limit_train_batches=15"]
    built, watch = fit(*found, *words)
    rate = built.model.hparams.lr
    assert rate != 1e-3 and 1e-8 <= rate <= 0.1
    (callback,) = (c for c in built.trainer.callbacks if isinstance(c, lightning.LearningRateFinder))
    assert rate == callback.optimal_lr.suggestion()
    assert max(watch.rates[0]) == pytest.approx(rate) and max(watch.rates[-1]) < rate
    assert min(watch.rates[0]) == pytest.approx(rate * 0.8**3)
    state = read_checkpoint(RUN / "checkpoints/last.ckpt")
    assert state["callbacks"]["ExactResume"]["tuned"]["lr"] == rate and state["global_step"] == 30
    assert not list(Path("runs").rglob(".lr_find*"))


def test_batch_size_finder():
    """The run has batches of the size that was found, all of the epoch, and a schedule of its length."""
    found = added("BatchSizeFinder", steps_per_trial=1, init_val=64, max_val=256)
    words = ["--trainer.limit_train_batches=1.0", "--trainer.max_epochs=1", "--model.warmup_epochs=0"]
    built, watch = fit(*found, *words)
    assert built.datamodule.batch_size == 256 and set(watch.batches) == {256}
    images = len(built.datamodule.dataset("train"))
    assert len(watch.batches) == built.trainer.global_step == images // 256
    assert max(watch.rates[0]) == pytest.approx(1e-3) and max(watch.rates[-1]) < 5e-4


@pytest.mark.parametrize("tuner", ["LearningRateFinder", "BatchSizeFinder"])
def test_a_resumed_run_keeps_the_values_that_were_found(tuner):
    arguments = {"LearningRateFinder": {"num_training_steps": 20, "early_stop_threshold": "null", "max_lr": 0.1}}
    arguments["BatchSizeFinder"] = {"steps_per_trial": 1, "init_val": 8, "max_val": 32}
    words = [*added(tuner, **arguments[tuner]), "--trainer.max_epochs=2", "--trainer.limit_train_batches=10"]
    whole, watched = fit(*words, "--name=whole")
    path = Path("runs/whole/version_0/checkpoints/last.ckpt")
    built, watch = fit(*words, "--trainer.max_epochs=3", f"--ckpt_path={path}")
    assert built.model.hparams.lr == whole.model.hparams.lr
    assert built.datamodule.batch_size == whole.datamodule.batch_size != 16 or tuner == "LearningRateFinder"
    assert whole.model.hparams.lr != 1e-3 or tuner == "BatchSizeFinder"
    assert len(watch.batches) == 10 and watch.batches[-1] == watched.batches[-1]


def test_a_checkpoint_of_data_without_a_batch_size_is_resumed(tmp_path):
    task, data, path = tiny_task(), LightningDataModule(), tmp_path / "last.ckpt"
    torch.save({"callbacks": {"ExactResume": {"tuned": {"lr": 0.5, "batch_size": None}}}}, path)
    trainer = tiny_trainer(tmp_path, callbacks=[lightning.LearningRateFinder()])
    take_tuned(trainer, task, data, str(path))
    assert task.hparams.lr == 0.5 and not hasattr(data, "batch_size")
    assert not any(isinstance(callback, lightning.LearningRateFinder) for callback in trainer.callbacks)


def test_the_starting_weights_are_those_of_the_file_with_a_tuner():
    """Tuners run before the first hook of the task, and put back what they have found there."""
    first, _ = fit("--trainer.max_epochs=1")
    rates = ["--model.lr=0", "--model.warmup_lr=0", "--model.min_lr=0"]
    found = added("BatchSizeFinder", steps_per_trial=1, init_val=8, max_val=16)
    start = f"--model.checkpoint={RUN / 'checkpoints/last.ckpt'}"
    built, _ = fit(*found, *rates, start, "--trainer.max_epochs=1", "--name=second", "--seed_everything=5")
    torch.testing.assert_close(built.model.model.state_dict(), first.model.model.state_dict(), rtol=0, atol=0)


def test_gradient_accumulation_scheduler():
    """The schedule has the number of steps that are done, and so ends at its end."""
    words = ["--trainer.limit_train_batches=4", "--trainer.max_epochs=3", "--model.warmup_epochs=0"]
    built, watch = fit(*added("GradientAccumulationScheduler", scheduling="{0: 1, 1: 4}"), *words)
    assert built.trainer.global_step == 4 + 1 + 1
    assert max(group["lr"] for group in built.trainer.optimizers[0].param_groups) == pytest.approx(1e-5)
    assert max(watch.rates[0]) == pytest.approx(1e-3)


@pytest.mark.parametrize("stop", ["end", "epoch"])
def test_backbone_finetuning(stop):
    """The head is trained alone until the backbone joins, at a rate of its own; also where a run is resumed."""
    words = [*added("BackboneFinetuning", unfreeze_backbone_at_epoch=1), "--model.warmup_epochs=0"]
    if stop == "epoch":
        fit(*words, "--trainer.max_epochs=2")
        words += [f"--ckpt_path={RUN / 'checkpoints/last.ckpt'}"]
    built, watch = fit(*words, "--trainer.max_epochs=3", "--name=two")
    model = built.model.model
    whole, head = (sum(p.numel() for p in module.parameters()) for module in (model, model.head))
    assert watch.trained == {"end": [head] * 2 + [whole] * 4, "epoch": [whole] * 2}[stop]
    groups = built.trainer.optimizers[0].param_groups
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()}
    (head, _, joined), *_ = last = watch.rates[-2:]  # at the start of the last epoch, and after a step of it
    assert joined == (min(2 * watch.rates[2][2], head) if stop == "end" else joined) <= head and last[1][2] == joined


@pytest.mark.parametrize("ema", [False, True])
def test_model_pruning(ema, capsys):
    words = added("ModelPruning", pruning_fn="l1_unstructured", amount=0.5)
    if ema:
        assert "ModelPruning and EMA" in refused(capsys, *words, config=str(DEBUG))
        return
    built, _ = fit(*words, "--trainer.max_epochs=1")
    for weights in (load_file(RUN / "checkpoints/best.safetensors"), built.model.model.state_dict()):
        share = torch.cat([v.flatten() == 0 for n, v in weights.items() if n.endswith(".weight")]).float().mean()
        assert 0.45 < share < 0.6 and not [name for name in weights if "mask" in name]


# ---- tools that stop, watch or log


def test_early_stopping_and_timer():
    stopping = added("EarlyStopping", monitor="val_loss", patience=0, mode="max")
    built, watch = fit(*stopping, "--trainer.max_epochs=9", "--model.lr=1e-2")
    assert built.trainer.current_epoch < 9 and len(watch.batches) == 2 * built.trainer.current_epoch
    built, _ = fit(*added("Timer", duration="00:00:00:01"), "--trainer.max_epochs=100000", "--name=timed")
    assert 0 < built.trainer.current_epoch < 100000


def images_in(batch) -> int:
    return len(batch[0])


def note(trainer, task) -> None:
    Path("noted").touch()


def test_what_is_logged():
    """Each of these logs values, and together they leave each other's alone."""
    tools = added("LearningRateMonitor") + added("DeviceStatsMonitor", cpu_stats=True)
    tools += added("ThroughputMonitor", batch_size_fn="tests.tasks.test_lightning_tools.images_in", window_size=2)
    tools += added("LambdaCallback", on_train_end="tests.tasks.test_lightning_tools.note") + added("RichModelSummary")
    _, watch = fit(*tools, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1")
    logged = rows()
    rates = [float(row["lr-AdamW/pg1"]) for row in logged if row["lr-AdamW/pg1"]]
    assert rates == pytest.approx([rates[0] for rates in watch.rates])
    assert any(row["train/device/samples_per_sec"] for row in logged) and Path("noted").exists()
    assert any("cpu_vm_percent" in name and value for row in logged for name, value in row.items())


def test_a_progress_bar_takes_the_place_of_the_standard_one():
    words = [*added("TQDMProgressBar"), "--trainer.enable_progress_bar=true"]
    built, _ = fit(*words, "--trainer.max_epochs=1")
    assert type(built.trainer.progress_bar_callback) is lightning.TQDMProgressBar


class Fails(Callback):
    def on_train_batch_end(self, trainer, task, *args):
        if trainer.global_step == 3:
            raise ArithmeticError("as a bug would")


def test_on_exception_checkpoint():
    words = added("OnExceptionCheckpoint", dirpath="kept") + added("tests.tasks.test_lightning_tools.Fails")
    with pytest.raises(ArithmeticError):
        fit(*words, "--trainer.max_epochs=2")
    assert read_checkpoint("kept/on_exception.ckpt")["global_step"] == 3


@pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging"])
def test_averages_that_a_test_would_not_use_are_refused(name, capsys):
    assert re.search(f"{name} .* use luna_vision.tasks.EMA", refused(capsys, *added(name)))


@pytest.mark.parametrize(
    "name, words, message",
    [
        ("StochasticWeightAveraging", ["--trainer.callbacks.swa_lrs=0.1", "--trainer.callbacks+=EMA"], "and EMA"),
        ("BackboneFinetuning", ["--model.freeze=1"], "leave one of them out"),
        (
            "ModelPruning",
            ["--trainer.callbacks.pruning_fn=l1_unstructured", "--model.init_from_vit=vit_tiny_patch16_224"],
            "use_lottery_ticket_hypothesis",
        ),
        ("BackboneFinetuning", ["--trainer.devices=2", "--trainer.strategy=ddp"], "is for one process"),
        ("LearningRateFinder", ["--trainer.strategy=fsdp2"], "with fsdp2"),
    ],
)
def test_what_does_not_go_together_is_refused(name, words, message, capsys):
    line = refused(capsys, f"--trainer.callbacks+={name}", *words)
    assert name in line and message in line


@pytest.mark.parametrize(
    "tool", [lightning.ModelPruning("l1_unstructured"), lightning.StochasticWeightAveraging(0.1)], ids=type
)
def test_what_a_checkpoint_has_not_all_of_is_not_resumed(tool, tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[tool])
    check_tools(trainer, tiny_task(), resumed=False)
    with pytest.raises(UserError, match=f"{type(tool).__name__} cannot be resumed"):
        check_tools(trainer, tiny_task(), resumed=True)


# ---- loggers

PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "CometLogger": "comet_ml", "NeptuneLogger": "Neptune"}
OFFLINE = {
    "CSVLogger": {"save_dir": "logs"},
    "TensorBoardLogger": {"save_dir": "logs"},
    "WandbLogger": {"save_dir": "logs", "offline": True},
    "MLFlowLogger": {"save_dir": "logs"},
    "CometLogger": {"online": False},
    "NeptuneLogger": {},  # which Lightning has given up
}


@pytest.mark.parametrize("name", OFFLINE)
def test_loggers(name, monkeypatch, capsys):
    """Each writes into its folder and the run ends with weights, or its missing package is named."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow 3 wants a database or a server
    words = [f"--trainer.logger={name}", *(f"--trainer.logger.{k}={v}" for k, v in OFFLINE[name].items())]
    if find_spec(PACKAGES.get(name, "torch")) is None:
        assert PACKAGES[name].partition("_")[0] in refused(capsys, *words)
        return
    fit(*words, "--trainer.max_epochs=1")
    assert any(path.is_file() for path in Path("logs").rglob("*"))
    assert list(Path().rglob("best.safetensors"))
