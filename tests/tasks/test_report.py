"""The report of a run: its numbers are those of the test, and its page stands alone."""

import html
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from sklearn.metrics import confusion_matrix
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError

from luna_vision.data import DetectionDataModule, DigitsDataModule, MultiLabelDataModule, SegmentationDataModule
from luna_vision.data.dense import IGNORE
from luna_vision.tasks import (
    ClassificationTask,
    DetectionTask,
    LogPictures,
    MultiLabelTask,
    Report,
    SegmentationTask,
    SequenceTask,
)
from luna_vision.tasks.outcomes import NOTHING, BoxOutcome, Calibration, ClassOutcome, MaskOutcome
from tests.labelled import NAMES, SPLITS, scenes, write_coco, write_labels, write_masks

from .conftest import SyntheticData, tiny_task, tiny_trainer
from .ranks import run

MODEL = {"model_name": "test_luna_vit", "model_kwargs": {"embed_dim": 32, "depth": 2}}
DENSE = MODEL | {"pyramid_channels": 8, "num_classes": 2}
QUIET = {"num_workers": 0, "batch_size": 2}


def detection(root: Path):
    detector = {"strides": [8, 16], "min_size": None, "anchor_sizes": [16, 32]}
    return DetectionTask(**DENSE, **detector), DetectionDataModule(write_coco(root), **QUIET)


def segmentation(root: Path):
    return SegmentationTask(**DENSE), SegmentationDataModule(write_masks(root), **QUIET)


def several_labels(root: Path):
    data = MultiLabelDataModule(root=str(write_labels(root)), **QUIET, img_size=32)
    return MultiLabelTask(**MODEL, num_classes=2, in_chans=3), data


def classification(root: Path):
    return tiny_task(), SyntheticData()


MADE = [detection, segmentation, several_labels, classification]


@pytest.mark.parametrize("make", MADE)
def test_a_page_and_its_pictures(make, tmp_path):
    """After a fit, the page has the curves of its log, the scores of the test and every class, and needs no file."""
    seed_everything(0, verbose=False)
    task, data = make(tmp_path / "data")
    logger = CSVLogger(tmp_path, "run", version=0, flush_logs_every_n_steps=1)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=logger, callbacks=[Report()], **quiet)
    trainer.fit(task, data)
    (scores,) = trainer.test(task, data, verbose=False)
    folder = tmp_path / "run/version_0/report"
    page = (folder / "report.html").read_text()
    assert set(re.findall(r'src="(.{10})', page)) == {"data:image"} and "http" not in page
    for name, value in scores.items():
        if "/" not in name:
            assert f"<b>{value:.4f}</b>{name.removeprefix('test_')}" in page
    assert re.search(r"tested on \w+ .*, \d+ images", page)
    pictures = {"curves", "classes", "confusion", "calibration", "best", "worst"}
    assert {file.stem for file in folder.glob("*.png")} == pictures
    for file in folder.glob("*.png"):
        assert len(np.unique(np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3), axis=0)) > 5, file
    names = NAMES if make is not classification else data.class_names
    there = [name for name in names if f"{name}</td>" in page]
    assert there == (names if make is not several_labels else there) and there


def test_names_of_files_and_classes_are_no_html(tmp_path):
    data = SyntheticData()
    data.class_names = [f"<script>alert({i})</script>" for i in range(6)]
    tiny_trainer(tmp_path, callbacks=[Report(str(tmp_path))]).test(tiny_task(), data, verbose=False)
    page = (tmp_path / "report/report.html").read_text()
    assert "<script" not in page and html.escape(data.class_names[0]) in page


@pytest.mark.parametrize("form", ["classes", "labels"])
def test_the_calibration_error_is_that_of_torchmetrics(form):
    generator = torch.Generator().manual_seed(0)
    own = Calibration()
    if form == "classes":
        probabilities = (torch.randn(500, 4, generator=generator) * 2).softmax(1)
        truth = torch.randint(4, (500,), generator=generator)
        expected = MulticlassCalibrationError(4, Calibration.BINS)(probabilities, truth)
        confidence, label = probabilities.max(1)
        own.add(confidence[:200], label[:200] == truth[:200])
        own.add(confidence[200:], label[200:] == truth[200:])
    else:
        probabilities = torch.rand(500, generator=generator)
        truth = torch.rand(500, generator=generator) < probabilities**2
        expected = BinaryCalibrationError(Calibration.BINS)(probabilities, truth.long())
        own.add(probabilities, truth)
    assert own.error == pytest.approx(float(expected), abs=1e-6)


def test_pixels_and_images_are_counted_as_scikit_learn_does():
    generator = torch.Generator().manual_seed(0)
    task = SegmentationTask(**DENSE)  # whose background is one of three classes
    outcome, truth, found = MaskOutcome(task, NAMES), [], []
    for size in ((8, 12), (6, 5)):
        mask = torch.randint(3, size, generator=generator)
        mask[0] = IGNORE
        logits = torch.randn(3, *size, generator=generator)
        outcome.add(mask, logits)
        truth.append(mask[1:].flatten())
        found.append(logits.argmax(0)[1:].flatten())
    assert outcome.names == ["background", *NAMES]
    assert (outcome.confusion == confusion_matrix(torch.cat(truth), torch.cat(found))).all()
    right = outcome.add(torch.ones(4, 4).long(), torch.tensor([0.0, 9.0, 0.0])[:, None, None].expand(3, 4, 4))
    assert right.score == 1 > outcome.add(torch.ones(4, 4).long(), torch.randn(3, 4, 4, generator=generator)).score

    outcome = ClassOutcome(tiny_task(), list("abcdef"))
    labels, logits = torch.randint(6, (50,), generator=generator), torch.randn(50, 6, generator=generator)
    for label, own in zip(labels, logits, strict=True):
        outcome.add(label, own)
    assert (outcome.confusion == confusion_matrix(labels, logits.argmax(1), labels=range(6))).all()
    for loss, probabilities in (("ce", logits[0].softmax(0)), ("bce", logits[0].sigmoid())):  # those of predictions
        outcome = ClassOutcome(tiny_task(loss=loss), list("abcdef"))
        assert outcome.add(labels[0], logits[0]).score == pytest.approx(float(probabilities[labels[0]]))


def test_boxes_are_matched_once_and_to_their_own_class_first():
    outcome = BoxOutcome(tiny_task(), ["a", "b"])
    truth = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50], [60, 60, 90, 90]]),
        "labels": torch.tensor([1, 2, 2, 1]),
        "iscrowd": torch.tensor([0, 0, 0, 1]),
    }
    found = {
        "boxes": torch.tensor(
            [[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 9, 10], [20, 20, 30, 29], [61, 60, 90, 90], [70, 0, 80, 10]]
        ),
        "labels": torch.tensor([2, 1, 1, 1, 1, 2]),
        "scores": torch.tensor([0.99, 0.9, 0.8, 0.7, 0.6, 0.3]),
    }
    rated = outcome.add(truth, found)
    # the surest box has the wrong class, so the object is the second one's; the third comes too late; the fourth has
    # another class than its object; one object is missed; the fifth is on a crowd, and the last not sure enough
    assert outcome.names == ["a", "b", NOTHING]
    assert outcome.confusion.tolist() == [[1, 0, 0], [1, 0, 1], [1, 1, 0]]
    assert "1 of 3 found, 3 wrong" in rated.words
    assert outcome.calibration.sums[0].sum() == 5 and outcome.calibration.sums[2].sum() == 1
    empty = {name: value[:0] for name, value in found.items()}
    assert outcome.add({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}, empty).score == 1


def test_best_and_worst_images_are_named(tmp_path):
    """Of scenes whose masks are predicted, but for one."""
    root = write_masks(tmp_path / "data")
    data, task = SegmentationDataModule(root, **QUIET), SegmentationTask(**DENSE)
    data.setup("test")
    masks = {image.numpy().tobytes(): mask for image, mask in (data.dataset("test")[i] for i in range(SPLITS["test"]))}

    def forward(images):
        (mask,) = [masks[image.numpy().tobytes()].long() for image in images]
        mask = torch.zeros_like(mask) if len(seen) == 0 else mask
        seen.append(1)
        return torch.nn.functional.one_hot(mask, 3).permute(2, 0, 1)[None].float() * 9

    seen: list[int] = []
    task.forward = forward
    trainer = tiny_trainer(tmp_path, callbacks=[Report(str(tmp_path))])
    trainer.test(task, data, verbose=False)
    page = (tmp_path / "report/report.html").read_text()
    best, worst = page.partition("Worst images")[::2]
    first, second = scenes("test")
    assert second in best and first in worst and first not in best and second not in worst


@pytest.mark.parametrize("callback", [Report, LogPictures])
def test_tasks_without_a_report_say_so(callback, tmp_path):
    task = SequenceTask(model_name="test_luna_vit", num_classes=2, in_chans=1)
    with pytest.raises(ValueError, match="not for SequenceTask"):
        callback().setup(tiny_trainer(tmp_path), task, "fit")


@pytest.mark.parametrize("make", MADE)
def test_loggers_get_pictures(make, tmp_path):
    task, data = make(tmp_path / "data")
    logger = TensorBoardLogger(tmp_path, "tensorboard")
    pictures = LogPictures(count=2, every_n_epochs=2)
    tiny_trainer(tmp_path, max_epochs=3, logger=logger, callbacks=[pictures], limit_train_batches=1).fit(task, data)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    found = events.Images("val_pictures")
    assert [event.step for event in found] == [2, 3]  # after the second epoch, and after the last
    assert found[0].height > 2 * 16 and found[0].width > 16


def report_digits() -> None:
    """Test the digits with random weights; leave the sums of the report."""
    seed_everything(0, verbose=False)
    report = Report("run")
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[report], devices="auto")
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1}
    task = ClassificationTask(model_name="test_luna_vit", num_classes=10, in_chans=1, model_kwargs=small)
    trainer.test(task, DigitsDataModule(num_workers=0, eval_batch_size=50), verbose=False)
    if trainer.is_global_zero:
        numbers = [one.number for one in report._worst]
        torch.save([*map(torch.from_numpy, report.outcome.sums()), numbers], "sums.pt")


@pytest.mark.slow
def test_several_processes_report_all_images(tmp_path):
    found = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        run(folder, world_size, report_digits)
        assert (folder / "run/report/report.html").is_file()
        found.append(torch.load(folder / "sums.pt"))
    (one, sums, numbers), (other, other_sums, other_numbers) = found
    assert (one == other).all() and one.sum() == 360 and numbers == other_numbers
    torch.testing.assert_close(sums, other_sums)
