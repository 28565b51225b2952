"""`luna-vision finetune`: one line recognises labelled files, writes a complete YAML, trains, and tests."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import luna_vision.tasks
from luna_vision.cli.finetune import TASKS
from luna_vision.cli.finetune_config import TASKS as MADE
from luna_vision.cli.finetune_config import configuration, data_options
from luna_vision.cli.main import main
from luna_vision.cli.train import build
from luna_vision.images.decode import SampleError
from luna_vision.utils.errors import UserError
from tests.labelled import NAMES, scenes, write_coco, write_labels, write_masks, write_voc, write_whole, write_yolo

SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--data.num_workers=0", "--data.batch_size=2"]
SMALL = ["--model.model_kwargs={embed_dim: 16, depth: 1, num_heads: 1}", "--trainer.accelerator=cpu"]


def write_folders(root: Path) -> Path:
    for split in ("train", "val"):
        for index, one in enumerate(scenes(split).values()):
            folder = root / split / NAMES[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            one.image.save(folder / f"{index}.png")
    return root


DATA = {
    "folders": ("classify", write_folders, "ImageFolderDataModule"),
    "table": ("multilabel", write_labels, "MultiLabelDataModule"),
    "coco": ("detect", write_coco, "DetectionDataModule"),
    "voc": ("detect", write_voc, "DetectionDataModule"),
    "yolo": ("detect", write_yolo, "DetectionDataModule"),
    "masks": ("segment", write_masks, "SegmentationDataModule"),
    "colors": ("segment", lambda root: write_masks(root, "colors"), "SegmentationDataModule"),
    "outlines": ("segment", write_coco, "SegmentationDataModule"),
    "yolo outlines": ("segment", lambda root: write_yolo(root, True), "SegmentationDataModule"),
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `luna-vision` in a folder of its own; returns its exit code and what it prints."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["luna-vision", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return call


@pytest.mark.parametrize("form", DATA)
def test_what_is_recognised(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["luna-vision"])
    task, write, module = DATA[form]
    write(Path("data"))
    config, said = configuration(task, Path("data"), Path("runs/x"))
    assert config["data"]["class_path"] == f"luna_vision.data.{module}"
    assert "data" in said[0] and all(name in said[1] for name in NAMES)
    Path("x.yaml").write_text(yaml.safe_dump(config))
    cli = build(["--config", "x.yaml", *SMALL], run=False)  # it is complete, and fits the data
    assert cli.model.hparams.num_classes == 2
    if task == "segment":
        assert cli.model.hparams.background and cli.datamodule.background


@pytest.mark.parametrize(
    "layout",
    [
        *("folders", "table", "table file", "masks masks", "masks annotations", "masks labels"),
        *("coco cvat", "coco images/", "coco beside", "coco file", "voc", "voc beside", "yolo", "yolo beside"),
    ],
)
def test_without_splits_all_images_are_for_training(layout, tmp_path):
    data = write_whole(tmp_path / "data", layout)
    form = layout.partition(" ")[0]
    tasks = {"folders": "classify", "table": "multilabel", "masks": "segment"}
    for task in [tasks[form]] if form in tasks else ["detect", "segment"][: 1 + (form != "voc")]:
        config, said = configuration(task, data, tmp_path / "x")
        assert said[1].startswith("10 training images") and all(name in said[1] for name in NAMES)  # of 12
        assert str(data) in said[0] and config["data"]["init_args"].get("format", form) == form


def test_classes_that_are_too_few_or_too_small_are_named(tmp_path):
    data = write_whole(tmp_path / "data", "folders")
    (first, *others), (one, *more) = (sorted((data / name).iterdir()) for name in NAMES)
    for extra, message in (
        (more[3:], "too few for 2 classes on both sides; .* val_fraction"),
        (more, "a class has one alone; .* val_fraction"),
    ):
        for file in [*others[3:], *extra]:
            file.unlink(missing_ok=True)
        with pytest.raises(UserError, match=message):
            configuration("classify", data, tmp_path / "x")
    one.unlink()
    one.parent.rmdir()
    with pytest.raises(UserError, match=f"{data} has one class folder alone, {NAMES[0]}"):
        configuration("classify", data, tmp_path / "x")


def test_labels_of_one_split_leave_no_image_to_the_others(tmp_path):
    """The images of validation are not trained on where those of training are not found."""
    write_voc(tmp_path / "voc")
    (tmp_path / "voc/ImageSets/Main/train.txt").unlink()
    write_yolo(tmp_path / "yolo")
    (tmp_path / "yolo/data.yaml").rename(tmp_path / "yolo/classes.txt")
    (tmp_path / "yolo/images/train").rename(tmp_path / "yolo/images/other")
    for name in ("voc", "yolo"):
        with pytest.raises(FileNotFoundError, match="which has the folders"):
            configuration("detect", tmp_path / name, tmp_path / "x")


@pytest.mark.parametrize("form", ["folders", "voc", "masks"])
def test_the_nano_model_starts_from_the_weights_of_the_package(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["luna-vision"])
    task, write, _ = DATA[form]
    write(Path("data"))
    config, said = configuration(task, Path("data"), Path("runs/x"), "luna_vit_nano_patch8")
    assert said[-1] == "luna_vit_nano_patch8 starts from the weights of the package"
    Path("x.yaml").write_text(yaml.safe_dump(config))
    model = build(["--config", "x.yaml"], run=False).model.model
    memory = next(value for name, value in model.named_parameters() if name.endswith("memory"))
    assert torch.equal(memory, timm.create_model("luna_vit_nano_patch8", pretrained=True).memory)


def test_images_of_other_bands_need_no_word_about_colour(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["luna-vision"])
    config, _ = configuration("segment", write_masks(tmp_path / "data"), tmp_path / "x")
    Path("x.yaml").write_text(yaml.safe_dump(config))
    assert build(["--config", "x.yaml", *SMALL, "--data.in_chans=4"], run=False).model.hparams.in_chans == 4


def test_a_number_without_a_name_is_said_and_can_be_ignored(tmp_path):
    """As in CamVid, where pixels that nobody has labelled have the number after the last class."""
    write_masks(tmp_path)
    pixels = sum(int((one.mask == 2).sum()) for one in scenes("train").values())
    (tmp_path / "classes.txt").write_text(f"background\n{NAMES[0]}\n")
    with pytest.raises(SampleError, match=f"2 has {pixels:,} pixels and no name: --data.ignore_index 2"):
        configuration("segment", tmp_path, tmp_path / "x")
    config, _ = configuration("segment", tmp_path, tmp_path / "x", options=["--data.ignore_index", "2"])
    arguments = config["data"]["init_args"]
    assert arguments["values"] == [0, 1] and arguments["ignore_index"] == 2
    (tmp_path / "classes.txt").unlink()  # then the numbers are the names
    config, said = configuration("segment", tmp_path, tmp_path / "x")
    assert config["data"]["init_args"]["values"] == [0, 1, 2]
    assert f"{pixels:,} pixels" in said[0] and "--data.ignore_index 2" in said[0]
    config, said = configuration("segment", tmp_path, tmp_path / "x", options=["--data.ignore_index=2"])
    assert config["data"]["init_args"]["values"] == [0, 1] and "ignore_index" not in said[0]


def test_options_of_the_data_hold_where_it_is_recognised(tmp_path, monkeypatch):
    """What an error asks for is given on the same line, and is in the YAML, which alone repeats the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["luna-vision"])
    write_masks(Path("masks"))
    Path("masks/classes.txt").unlink()
    for file in Path("masks").glob("*/masks/*"):
        Image.fromarray((np.asarray(Image.open(file)) > 0).astype(np.uint8) * 255).convert("RGB").save(file)
    words = ["--trainer.max_epochs", "1", "--data.classes", "[ground, car]", "--data.values=[[0,0,0],[255,255,255]]"]
    of_data, others = data_options(words)
    assert (of_data, others) == (words[2:], words[:2])
    config, said = configuration("segment", Path("masks"), Path("x"), options=of_data)
    assert "ground, car" in said[1]
    assert config["data"]["init_args"]["values"] == [[0, 0, 0], [255, 255, 255]]
    Path("x.yaml").write_text(yaml.safe_dump(config))
    assert build(["--config", "x.yaml", *SMALL], run=False).model.hparams.num_classes == 2
    config, said = configuration("segment", Path("masks"), Path("x"))  # grey though RGB, and classes by themselves
    assert "0 and 255 alone, which are background and foreground" in said[0] and said[1].endswith("classes: foreground")
    for name, write, task in (("voc", write_voc, "detect"), ("table", write_labels, "multilabel")):
        first = sorted(write(Path(name)).rglob("train_0.*"))
        first[-1].unlink()
        with pytest.raises(SampleError, match="--data.on_error skip"):
            configuration(task, Path(name), Path("x"))
        given = ["--data.on_error", "skip", "--data.max_error_share", "0.5"]
        config, said = configuration(task, Path(name), Path("x"), options=given)
        assert said[1].startswith("7 ") and config["data"]["init_args"]["max_error_share"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folders", "table", "voc", "colors"])
def test_from_files_to_files(form, run, tmp_path):
    task, write, _ = DATA[form]
    write(tmp_path / "data")
    sizes = ["--model.pyramid_channels=8"] if task in ("detect", "segment") else []
    code, out, err = run("finetune", "--task", task, "--data", "data", "--out", "runs/x", *SHORT, *SMALL, *sizes)
    assert code == 0, err
    assert "recognised: " in out and "load it with:" in out
    first = out
    folder = tmp_path / "runs/x/version_0"
    model, transform, names = luna_vision.load(folder / "checkpoints/best.safetensors")
    kind = getattr(luna_vision.tasks, yaml.safe_load((folder / "config.yaml").read_text())["model"]["class_path"][18:])
    assert kind.load_from_checkpoint(folder / "checkpoints/best.ckpt", weights_only=True).hparams.num_classes == 2
    assert f"{kind.headline[1]}:" in first
    assert names == ["background"] * (task in ("detect", "segment")) + NAMES
    new = tmp_path / "data" / {"folders": "val", "voc": "JPEGImages", "colors": "val/images", "table": "val"}[form]
    found = tmp_path / {"detect": "found.json", "segment": "found"}.get(task, "found.csv")
    weights = ["--ckpt_path", str(folder / "checkpoints/best.ckpt"), "--data.predict_path", str(new)]
    code, out, err = run("predict", "--config", str(folder / "config.yaml"), *weights, "--out", str(found))
    assert code == 0, err
    assert [one.name for one in folder.parent.glob("version_*")] == [folder.name]  # nothing but --out is written
    images = [file for file in new.rglob("*.png")]
    if task == "detect":
        assert len(json.loads(found.read_text())["images"]) == len(images)
    elif task == "segment":
        assert sorted(file.name for file in found.iterdir()) == sorted(file.name for file in images)
    else:
        assert len(found.read_text().splitlines()) == len(images) + 1
    report = folder / "report/report.html"
    assert f"report: {report.relative_to(tmp_path)}" in first and report.is_file()
    if form == "table":  # the words are other ones, the configuration is not
        words = ["--task", task, "--data", "data", "--out", "runs/x", *SHORT[2:], "--trainer.max_epochs=0"]
        assert run("finetune", *words)[0] == 0
        assert [file.name for file in folder.parent.glob("*.yaml")] == ["finetune.yaml"]
        file = folder.parent / "finetune.yaml"
        file.write_text(file.read_text() + "# mine\n")
        out = run("finetune", *words)[1]
        assert "the earlier configuration: runs/x/finetune-1.yaml" in out
        assert (folder.parent / "finetune-1.yaml").read_text().endswith("# mine\n")
    if form == "voc":  # again, of the run's folder alone
        report.unlink()
        code, out, err = run("report", "runs/x", "--trainer.accelerator=cpu")
        assert code == 0 and report.is_file(), err
    text = (tmp_path / "runs/x/finetune.yaml").read_text()
    again = yaml.safe_load(text)
    assert "# Again: luna-vision fit --config runs/x/finetune.yaml --trainer.max_epochs=" in text
    assert again["trainer"]["max_epochs"] > 1  # that of the command line is in the run's own config.yaml
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"] == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--task", "paint", "--data", ".", "--out", "x"], "invalid choice"),
        (["--task", "detect", "--data", "."], "required: --out"),
        (["--task", "detect", "--data", "nowhere", "--out", "x"], "there is no nowhere"),
        (["--task", "detect", "--data", ".", "--out", "x"], "COCO"),
        (["--task", "segment", "--data", ".", "--out", "x"], "train/masks"),
        (["--task", "classify", "--data", ".", "--out", "x"], "train"),
        (["--task", "classify", "--data", ".", "--out", "x", "--model", "luna_vit_tyni"], "did you mean"),
        (["--task", "classify", "--data", ".", "--out", "x", "--checkpoint", "gone.pt"], "there is no file gone.pt"),
        (["--task", "classify", "--data", ".", "--out", "x", "word"], "unknown word 'word'"),
        (["--task", "classify", "--data", ".", "--out", "x", "--data.ignore_index", "2"], "ignore_index"),
    ],
)
def test_mistakes(words, message, run):
    code, _, err = run("finetune", *words)
    assert code == 2 and len(err.strip().splitlines()) == 1 and message in err


def test_a_report_takes_a_run(run, tmp_path):
    for folder, has in (("a", ["a/config.yaml"]), ("b", [])):
        for name in has:
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).touch()
        code, _, err = run("report", folder)
        assert code == 2 and len(err.strip().splitlines()) == 1 and "best.ckpt" in err
    assert run("report")[0] == 2


def test_an_unknown_task(tmp_path):
    assert tuple(MADE) == TASKS
    with pytest.raises(ValueError, match="task must be one of"):
        configuration("paint", tmp_path, tmp_path)
    write_coco(tmp_path)
    (tmp_path / "train.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(UserError, match="has no classes"):
        configuration("detect", tmp_path, tmp_path)
