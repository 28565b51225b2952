"""train.py from the outside: what it writes, what it prints, how it exits."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import timm
import torch
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image

from luna_vision.cli import train as cli
from luna_vision.cli.train import DIGITS, LunaCLI, build, main, with_default_config
from luna_vision.data import AUGMENTATIONS
from luna_vision.tasks import ClassificationTask, LastCheckpoint
from tests.tasks.ranks import command_line, finish, run, said, start, until

ROOT = Path(__file__).parents[2]
DEBUG = str(ROOT / "configs" / "debug.yaml")


def call(monkeypatch, *args: str) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A folder in which the debug config has been trained, and what that printed."""
    folder = tmp_path_factory.mktemp("run")
    run(folder, 1, command_line, "fit", "--config", DEBUG)
    return folder, said(folder)


def test_fit_writes_logs_and_checkpoints_and_says_how_to_go_on(run_dir):
    folder, stdout = run_dir
    version = folder / "runs" / "debug" / "version_0"
    files = {str(path.relative_to(version)) for path in version.rglob("*") if path.is_file()}
    names = {f"checkpoints/{name}" for name in ("best.ckpt", "last.ckpt", "best.safetensors")}
    assert names | {"config.yaml", "hparams.yaml", "metrics.csv", "run.json", ".run.lock"} == files
    access = {(version / "checkpoints" / name).stat().st_mode for name in ("best.ckpt", "best.safetensors")}
    assert len(access) == 1  # safetensors leaves its files to their owner alone
    assert list((folder / "runs" / "debug" / "tensorboard").rglob("events.out.tfevents.*"))
    columns = next(csv.reader((version / "metrics.csv").open()))
    assert {"train_loss", "train_acc1", "val_acc1", "val_acc5", "test_acc1", "images_per_s", "lr"} <= set(columns)
    assert "best checkpoint: runs/debug/version_0/checkpoints/best.ckpt" in stdout
    assert re.match(r"load it with: +import luna_vision; .* = luna_vision.load\('runs/debug", stdout.splitlines()[-1])
    assert re.search(r"^test accuracy: +0\.\d{4} with runs/debug", stdout, re.M)


def test_fit_says_how_large_the_model_is_and_nothing_wrong_about_flops(run_dir):
    arguments = yaml.safe_load(Path(DEBUG).read_text())["model"]
    model = timm.create_model(arguments["model_name"], num_classes=10, in_chans=1, **arguments["model_kwargs"])
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in run_dir[1]
    assert "FLOPs" not in run_dir[1]


def test_no_summary_where_none_is_wanted(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.enable_model_summary=false", "--trainer.fast_dev_run=1", "--test_after_fit=false"]
    assert call(monkeypatch, "fit", "--config", DEBUG, *options) == 0
    assert "parameters" not in capsys.readouterr().out


def test_checkpoint_holds_plain_data(run_dir):
    checkpoint = torch.load(run_dir[0] / "runs/debug/version_0/checkpoints/best.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["model_name"] == "test_luna_vit"


def test_lightning_loads_a_checkpoint(run_dir):
    path = run_dir[0] / "runs/debug/version_0/checkpoints/best.ckpt"
    task = ClassificationTask.load_from_checkpoint(path, weights_only=True)
    torch.testing.assert_close(task.state_dict(), torch.load(path, weights_only=True)["state_dict"])


@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_evaluation_of_a_checkpoint(run_dir, monkeypatch, tmp_path, capsys, recwarn, subcommand):
    monkeypatch.chdir(tmp_path)
    checkpoint = run_dir[0] / "runs/debug/version_0/checkpoints/best.ckpt"
    config = run_dir[0] / "runs/debug/version_0/config.yaml"
    assert call(monkeypatch, subcommand, "--config", str(config), "--ckpt_path", str(checkpoint)) == 0
    assert ("val_acc1" if subcommand == "validate" else "test_acc1") in capsys.readouterr().out
    words = [str(warning.message) for warning in recwarn]
    assert not [
        text for text in words if "callbacks" in text or "dirpath" in text
    ]  # which nobody can do anything about


@pytest.mark.parametrize(
    ("name", "words"), [("predictions.csv", []), ("mine.csv", ["--dtype", "bfloat16"])], ids=["run", "own"]
)
def test_predict_writes_csv(run_dir, monkeypatch, tmp_path, name, words):
    monkeypatch.chdir(tmp_path)
    for index in range(3):
        Image.new("L", (20, 30), 80 * index).save(tmp_path / f"{index}.png")
    checkpoint = run_dir[0] / "runs/debug/version_0/checkpoints/best.ckpt"
    arguments = ["predict", "--config", DEBUG, "--ckpt_path", str(checkpoint), f"--data.predict_path={tmp_path}"]
    out = [] if name == "predictions.csv" else ["--out", f"new/{name}"]
    types = []
    step = ClassificationTask.predict_step
    monkeypatch.setattr(
        ClassificationTask,
        "predict_step",
        lambda task, *args: types.append(task(args[0][0]).dtype) or step(task, *args),
    )
    assert call(monkeypatch, *arguments, *out, *words) == 0
    assert set(types) == {torch.bfloat16 if words else torch.float32}
    (path,) = tmp_path.rglob("*.csv")
    assert path.name == name and (not out or path.parent == tmp_path / "new")
    rows = list(csv.DictReader(path.open()))
    assert [Path(row["image"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    assert list(rows[0]) == ["image", *(f"{name}{i}" for name in ("label", "probability") for i in range(1, 6))]
    probabilities = [float(rows[0][f"probability{i}"]) for i in range(1, 6)]
    assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) <= 1.0001
    assert {rows[0][f"label{i}"] for i in range(1, 6)} <= {str(digit) for digit in range(10)}


def test_nothing_to_predict_is_found_before_a_run_folder_is_made(run_dir, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = run_dir[0] / "runs/debug/version_0/checkpoints/best.ckpt"
    arguments = ["predict", "--config", DEBUG, "--ckpt_path", str(checkpoint), "--data.predict_path=nowhere"]
    assert call(monkeypatch, *arguments) == 2
    assert error_line(capsys) == "error: there is no image file or folder nowhere"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_undecodable_images_are_listed_and_the_others_predicted(run_dir, monkeypatch, tmp_path, capsys, workers):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("L", (20, 30)).save(tmp_path / "images" / "0.png")
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    checkpoint = run_dir[0] / "runs/debug/version_0/checkpoints/best.ckpt"
    arguments = ["predict", "--config", DEBUG, "--ckpt_path", str(checkpoint), f"--data.predict_path={tmp_path}/images"]
    arguments += [f"--data.num_workers={workers}", "--data.batch_size=1", "--trainer.limit_predict_batches=null"]
    assert call(monkeypatch, *arguments, "--out=found.csv") == 1
    first, line = capsys.readouterr().err.splitlines()[-2:]
    assert first == "1 of 2 images could not be used:" and "images/1.png" in line
    assert [Path(row["image"]).name for row in csv.DictReader(open("found.csv"))] == ["0.png"]
    (tmp_path / "images" / "0.png").unlink()
    assert call(monkeypatch, *arguments, "--out=none.csv") == 1
    out, err = capsys.readouterr()
    assert "none.csv is not written: it would be empty" in out and "images/1.png" in err.splitlines()[-1]
    assert not list(tmp_path.glob("none.csv*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_training_image_is_one_line_and_a_bug_of_an_augmentation_is_none(
    monkeypatch, tmp_path, capsys, workers
):
    """The user can mend the one, and can only report the other, with its traceback."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / "photos/train" / name).mkdir(parents=True)
        for index in range(20):
            Image.new("L", (20, 30), 12 * index).save(tmp_path / f"photos/train/{name}/{index}.png")
    options = ["--data=ImageFolderDataModule", "--data.root=photos"]
    command = ["fit", "--config", DEBUG, *options, f"--data.num_workers={workers}", "--data.augmentation=timm"]

    def backend(aug):
        def fail(image, seed):
            raise ValueError("bits must be between or equal to 1 and 8")

        return fail

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="bits must be between") as caught:
        patch.setitem(AUGMENTATIONS, "timm", backend)
        call(patch, *command)
    assert "in fail" in "".join(traceback.format_exception(caught.value)) and "error:" not in capsys.readouterr().err
    for index in range(20):
        (tmp_path / f"photos/train/a/{index}.png").write_bytes(b"no image")
    assert call(monkeypatch, *command) == 2
    assert re.search(r"cannot decode image file photos/train/a/\d+\.png: ", error_line(capsys))


def error_line(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--config", DEBUG, "--model.learning_rate=1"], "learning_rate"),
        (
            ["fit", "--config", DEBUG, "--data.init_args.batch=1"],
            "Option .batch. is not accepted; did you mean batch_size\\?.* --data.help CLASS",
        ),
        (["fit", "--config", DEBUG, "--model.model_name=1e5"], "unknown model name '1e5'"),
        (["fit", "--data", "ImageFolderDataModule", "--data.root", "photos"], "--data needs a --config"),
        (["fit", "--config", "missing.yaml"], "missing.yaml"),
        (["fit", "--config", DEBUG, "--model.model_name=luna_vit_tinny"], "did you mean luna_vit_tiny"),
        (
            ["fit", "--config", DEBUG, "--model.num_classes=7"],
            "the data has 10 classes, but the model .* num_classes=7",
        ),
        (["fit", "--config", DEBUG, "--data=ImageFolderDataModule", "--data.root=nowhere"], "nowhere"),
        (["fit", "--config", DEBUG, "--ckpt_path=gone.ckpt"], "gone.ckpt"),
        (["test", "--config", DEBUG], "test needs weights"),
        (["test"], "required, here or in a --config: data"),
        (["fit", "--config", DEBUG, "--out=a.csv"], "unrecognized arguments: --out"),
        (
            ["fit", "--config", DEBUG, "--trainer.max_epoch=3"],
            "unrecognized arguments: --trainer.max_epoch=3; did you mean --trainer.max_epochs\\?$",
        ),
        (["fit", "--config", DEBUG, "--lr", "0.1"], "unrecognized arguments: --lr 0.1; did you mean --model.lr\\?$"),
        (["fit", "--config", DEBUG, "--batch-size=8"], "did you mean --data.batch_size\\?$"),
        (["fit", "--config", DEBUG, "--model.lr=abc"], r"model.lr: Expected a float. Got value: abc$"),
        (
            ["fit", "--config", DEBUG, "--model.loss=abc"],
            r"model.loss: Expected one of \['ce', 'bce'\]. Got value: abc$",
        ),
        (["fit", "--config", DEBUG, "--data.img_size=x"], r"data.img_size: Expected an int or list. Got value: x$"),
        (["fit", "--config", DEBUG, "--trainer.max_epochs=x"], r"trainer.max_epochs: Expected an int. Got value: x$"),
        (["fit", "--config", DEBUG, "--trainer.devices=[a]"], "devices"),
        (["fit", "--config", DEBUG, "--data=Nope"], r"data: there is no class Nope$"),
        (["fit", "--config", DEBUG, "--data.augmentation=x"], "error: augmentation must be one of 'albumentations', "),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 2
    line = error_line(capsys)
    assert re.search(message, line) and len(line) < 300
    assert not list(tmp_path.iterdir())


def test_non_finite_loss(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--model.lr=1e30",
        "--model.warmup_epochs=0",
        "--model.optimizer=sgd",
        "--trainer.gradient_clip_val=null",
    ]
    assert call(monkeypatch, "fit", "--config", DEBUG, *arguments) == 2
    assert re.search(r"loss is (nan|inf) at step \d+ \(epoch \d+\): training stopped", error_line(capsys))


def test_traceback_on_request(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUNA_VISION_TRACEBACK", "1")
    with pytest.raises(ValueError, match="num_classes=7"):
        call(monkeypatch, "fit", "--config", DEBUG, "--model.num_classes=7")


def test_default_config_only_where_none_is_named():
    assert with_default_config(["fit", "--model.lr=1"]) == ["fit", "--config", str(DIGITS), "--model.lr=1"]
    for args in (["fit", "--config", "a.yaml"], ["fit", "-c", "a.yaml"], ["fit", "--config=a.yaml"], ["test"]):
        assert with_default_config(args) == args


@pytest.mark.parametrize("words", [["--model.help", "DetectionTask"], ["--data.help", "CanvasDataModule"]])
def test_help_of_a_class_needs_no_config(words, monkeypatch, capsys):
    assert call(monkeypatch, "validate", *words) == 0
    option = "--model.min_size" if words[0] == "--model.help" else "--data.item_size"
    assert option in capsys.readouterr().out


def test_a_bug_in_a_constructor_keeps_its_traceback(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    def bug(self):
        raise AttributeError("a bug")

    monkeypatch.setattr(ClassificationTask, "_mixer", bug)
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", DEBUG])
    with pytest.raises(AttributeError, match="a bug") as raised:
        main()
    assert "in bug" in "".join(traceback.format_exception(raised.value)) and "error: " not in capsys.readouterr().err


def test_an_error_of_a_library_while_training_keeps_its_traceback(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ClassificationTask, "training_loss", lambda *args: torch.distributions.Normal(0.0, -1.0))
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", DEBUG])
    with pytest.raises(ValueError, match="scale"):
        main()
    assert "error: " not in capsys.readouterr().err


def built(*words: str) -> LunaCLI:
    return build(["--config", DEBUG, *words], run=False)


def test_the_data_says_what_the_model_is_built_for(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    plain = ["--data.img_size=24", "--data.in_chans=3"]
    segmentation = ["--model=SegmentationTask", "--data=CanvasSegmentationDataModule", "--data.side=64"]
    segmentation += [
        "--data.num_items=1",
        "--data.item_size=16",
        "--data.num_train=4",
        "--data.num_val=2",
        "--model.pyramid_channels=8",
    ]
    for words, size, chans in ((plain, 24, 3), (segmentation, 64, 1), ([*plain, "--model.in_chans=3"], 24, 3)):
        hparams = built(*words).model.hparams
        assert (hparams.num_classes, hparams.in_chans, hparams.model_kwargs["img_size"]) == (10, chans, size)
    given = built(*plain, "--model.model_kwargs.img_size=48").model
    assert given.hparams.model_kwargs["img_size"] == 48 and given.model.patch_embed.img_size == (48, 48)


def test_a_name_is_all_that_a_run_needs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    trainer = built("--name=mine").trainer
    assert trainer.default_root_dir == "runs/mine"
    assert [(type(x).__name__, x.root_dir) for x in trainer.loggers] == [
        ("CSVLogger", "runs/mine"),
        ("TensorBoardLogger", "runs/mine/tensorboard"),
    ]
    trainer = built("--trainer.logger=false", "--trainer.default_root_dir=x").trainer
    assert not trainer.loggers and trainer.default_root_dir == "x"


def test_callbacks_of_every_run_can_be_added_to_replaced_and_switched_off(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def names(*words: str) -> set[str]:
        callbacks = built(*words).trainer.callbacks
        return {type(c).__name__ for c in callbacks} - {"ModelSize", "SaveConfigCallback"}

    standard = {path.rpartition(".")[2] for path in cli.CALLBACKS}
    assert names() == standard | {"EMA"}
    assert names("--trainer.callbacks+=NestedMemory") == standard | {"EMA", "NestedMemory"}
    often = ["--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_steps=3"]
    (last,) = [c for c in built(*often).trainer.callbacks if isinstance(c, LastCheckpoint)]
    assert last.every_n_steps == 3
    assert names("--trainer.callbacks=[{class_path: luna_vision.tasks.LastCheckpoint}]") >= {"LastCheckpoint"}
    assert "NonFiniteGuard" not in names("--trainer.callbacks=[{class_path: luna_vision.tasks.LastCheckpoint}]")
    off = names("--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false")
    assert off == {"EMA", "EpochLines", "ImagesPerSecond", "NonFiniteGuard", "PredictionWriter"}


@pytest.mark.parametrize("signal_, code", [(KeyboardInterrupt, 130), (SIGTERMException, 143), (ValueError, None)])
def test_what_cannot_be_torn_down_was_stopped_all_the_same(monkeypatch, signal_, code):
    def build():
        try:
            raise signal_
        except signal_:
            raise RuntimeError("Please call `iter(combined_loader)` first.")  # noqa: B904 (as Lightning does)

    monkeypatch.setattr(cli, "build", build)
    monkeypatch.setattr(sys, "argv", ["train.py", "fit"])
    with pytest.raises(SystemExit if code else RuntimeError) as end:
        cli.main()
    assert code is None or end.value.code == code


def test_ctrl_c_ends_cleanly_and_says_how_to_resume(tmp_path):
    (process,) = processes = start(tmp_path, 1, command_line, "fit", "--config", DEBUG, "--trainer.max_epochs=100000")
    until((tmp_path / "runs/debug/version_0/checkpoints/last.ckpt").exists, processes)
    os.kill(process.pid, signal.SIGINT)
    assert finish(tmp_path, processes) == [130]
    assert "Traceback" not in said(tmp_path)
    line = (
        "the same command with --resume continues from its last checkpoint, runs/debug/version_0/checkpoints/last.ckpt"
    )
    assert line in said(tmp_path)


def test_sigterm_to_a_whole_group_of_processes_ends_cleanly(tmp_path):
    """As torchrun, timeout and SLURM send it: the processes that load images get it, too."""
    command = [sys.executable, "-u", str(ROOT / "train.py"), "fit", "--config", DEBUG, "--trainer.max_epochs=100000"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        [*command, "--data.init_args.num_workers=1"], cwd=tmp_path, text=True, start_new_session=True, **pipes
    )
    checkpoint = tmp_path / "runs/debug/version_0/checkpoints/last.ckpt"
    deadline = time.monotonic() + 300  # many times what it takes on an idle machine
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert checkpoint.exists()
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in stderr, stderr


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--model.checkpoint=nope.safetensors", "checkpoint 'nope.safetensors' does not exist"),
        ("--model.init_from_vit=vit_smal_patch16", "init_from_vit 'vit_smal_patch16' is neither a file nor"),
        ("--model.optimizer=adamx", "adamx"),
        ("--model.scheduler=cosinx", "cosinx"),
        ("--model.min_lr=-1", "min_lr must be finite and not negative, got -1.0"),
        ("--model.warmup_lr=.nan", "warmup_lr must be finite and not negative, got nan"),
        ("--model.mixup=-1", "mixup must be finite and not negative, got -1.0"),
        ("--model.mix_prob=1.5", "mix_prob must be in [0, 1], got 1.5"),
        ("--trainer.limit_train_batches=0", "limit_train_batches is 0: there is nothing to train"),
        ("--trainer.max_steps=0", "max_steps is 0: there is nothing to train"),
        ("--model.optimizer_kwargs={betas: [0.9]}", "optimizer adamw, optimizer_kwargs {'betas': [0.9]}: "),
        ("--model.model_kwargs.pretrained=true", "no pretrained weights"),
        ("--model.model_kwargs.drop_path_rate=2.0", "drop_path_rate must be in [0, 1), got 2.0"),
        ("--model.model_kwargs.memory_length=8", "did you mean memory_len?"),
    ],
)
def test_mistakes_are_found_before_a_run_folder_is_made(argument, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "fit", "--config", DEBUG, argument) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert list(tmp_path.rglob("*")) == []


def test_a_model_of_one_size_is_built_for_that_of_the_data(tmp_path, monkeypatch, capsys):
    """Most of timm's transformers are."""
    monkeypatch.chdir(tmp_path)
    model = ["--model.model_name=vit_tiny_patch16_224", "--model.model_kwargs={depth: 1}"]
    assert call(monkeypatch, "fit", "--config", DEBUG, *model, "--model.model_kwargs.img_size=224") == 2
    assert "the model does not take images of 16 x 16 pixels: " in error_line(capsys)
    assert list(tmp_path.iterdir()) == []
    assert (
        call(monkeypatch, "fit", "--config", DEBUG, *model, "--trainer.fast_dev_run=1", "--test_after_fit=false") == 0
    )


def test_another_model_leaves_the_arguments_of_that_of_the_config(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    words = ["--model.model_name", "test_vit", "--trainer.fast_dev_run=1", "--test_after_fit=false"]
    assert call(monkeypatch, "fit", "--config", DEBUG, *words, "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["model_kwargs"] == {}
    assert "the model_kwargs of the --config are for test_luna_vit, and are left out for test_vit" in caplog.text


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_weights_alone_are_no_checkpoint_to_go_on_from(subcommand, tmp_path, monkeypatch, capsys):
    torch.save({"head.weight": torch.zeros(1)}, tmp_path / "model.pth")
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, subcommand, "--config", DEBUG, "--ckpt_path=model.pth") == 2
    line = error_line(capsys)
    assert "model.pth is not a checkpoint of a training; weights alone are given as --model.checkpoint" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize("name", ["optimizer", "mix_seed"])
def test_null_in_a_file_is_no_value(name, tmp_path, monkeypatch, capsys):
    config = yaml.safe_load(Path(DEBUG).read_text())
    config["model"][name] = None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "fit", "--config", "config.yaml") == 2
    assert error_line(capsys) == f"error: model.{name} must not be null"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_weights_that_a_last_step_broke_are_not_saved(tmp_path, monkeypatch, capsys):
    """Without validation no loss follows the last step, so the weights themselves have to be looked at."""
    monkeypatch.chdir(tmp_path)
    options = "--model.lr=1e38 --model.weight_decay=1e3 --model.optimizer=sgd --model.warmup_epochs=0"
    trainer = "--trainer.limit_train_batches=2 --trainer.gradient_clip_val=null --trainer.max_epochs=1"
    arguments = [*options.split(), *trainer.split(), "--data.init_args.val_fraction=0"]
    assert call(monkeypatch, "fit", "--config", DEBUG, *arguments) == 2
    assert "training stopped, no checkpoint had been written yet" in capsys.readouterr().err
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_run_without_validation_ends_with_its_last_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "fit", "--config", DEBUG, "--data.init_args.val_fraction=0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("checkpoints/last.ckpt (the last one: val_acc1 was never measured" in line for line in lines)
    assert lines[-1].startswith("load it with:") and list(tmp_path.rglob("best.safetensors"))


def test_what_is_given_although_the_data_says_it_is_kept_with_the_run(monkeypatch, tmp_path):
    """Else a run that is started from its own config would be another one."""
    monkeypatch.chdir(tmp_path)
    words = ["--model.img_size=32", "--name=a/b", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    assert call(monkeypatch, "fit", "--config", DEBUG, *words, "--test_after_fit=false") == 0
    config = Path("runs/a/b/version_0/config.yaml")
    saved = yaml.safe_load(config.read_text())
    assert (saved["name"], saved["model"]["init_args"]["img_size"]) == ("a/b", 32)
    best = config.parent / "checkpoints" / "best.ckpt"
    assert call(monkeypatch, "validate", "--config", str(config), "--ckpt_path", str(best)) == 0
    hparams = torch.load(best, weights_only=True)["hyper_parameters"]
    assert (hparams["num_classes"], hparams["in_chans"], hparams["model_kwargs"]["img_size"]) == (10, 1, 32)
