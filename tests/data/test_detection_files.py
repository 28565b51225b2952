"""Boxes from COCO, Pascal VOC and YOLO files: read right, moved along with the image, and faults named."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from luna_vision.data import DetectionDataModule, MultiLabelDataModule
from luna_vision.data.images import describe_split
from luna_vision.images.decode import SampleError
from luna_vision.utils.errors import UserError
from tests.labelled import COLORS, NAMES, WRITERS, coco_of, scenes, write_coco, write_labels, write_voc, write_yolo

QUIET = {"num_workers": 0, "batch_size": 2}


@pytest.mark.parametrize("form", WRITERS)
def test_boxes_labels_and_names(form, tmp_path):
    data = DetectionDataModule(WRITERS[form](tmp_path), **QUIET)
    data.setup("fit")
    assert data.format == form and data.class_names == (NAMES if form != "coco" else NAMES[::-1])  # by the id
    for split in ("train", "val", "test"):
        dataset = data.dataset(split)
        found = {Path(dataset.source.sample_file(i)).name: dataset[i] for i in range(len(dataset))}
        assert set(found) == set(scenes(split))
        for name, one in scenes(split).items() if split != "train" else ():
            image, target = found[name]
            np.testing.assert_allclose(target["boxes"], one.boxes, atol=1e-3)
            assert [data.class_names[label - 1] for label in target["labels"]] == [NAMES[at] for at in one.labels]
            assert torch.equal(image, torch.from_numpy(np.array(one.image)).permute(2, 0, 1) / 255)


def test_a_batch_is_two_lists_of_images_of_any_size(tmp_path):
    write_coco(tmp_path)
    file = tmp_path / "val" / "val_1.png"
    Image.open(file).resize((80, 60)).save(file)
    content = json.loads((tmp_path / "val.json").read_text())
    next(image for image in content["images"] if image["file_name"] == file.name).update(width=80, height=60)
    (tmp_path / "val.json").write_text(json.dumps(content))
    data = DetectionDataModule(tmp_path, **QUIET, eval_batch_size=2)
    data.setup("validate")
    images, targets = next(iter(data.val_dataloader()))
    assert [tuple(image.shape) for image in images] == [(3, 48, 64), (3, 60, 80)] and len(targets) == 2


@pytest.mark.parametrize("options", [{}, {"train_on": "crops", "crop_size": 32, "scale": [0.5, 2.0], "vflip": 0.5}])
def test_boxes_move_along_with_the_image(options, tmp_path):
    """Where a box is, the image has the colour of its class, whatever the augmentation has done."""
    data = DetectionDataModule(write_yolo(tmp_path), **QUIET, color_jitter=0.0, **options)
    data.setup("fit")
    dataset, seen = data.dataset("train"), 0
    for epoch in range(4):
        for index in range(len(dataset)):
            image, target = dataset[epoch, index]
            if options:
                assert image.shape == (3, 32, 32)
            for box, label in zip(target["boxes"], target["labels"], strict=True):
                x, y = int((box[0] + box[2]) / 2), int((box[1] + box[3]) / 2)
                color = torch.tensor(COLORS[label - 1]) / 255
                assert (image[:, y, x] - color).abs().max() < 0.1
                seen += 1
            again = dataset[epoch, index]
            assert torch.equal(image, again[0]) and torch.equal(target["boxes"], again[1]["boxes"])
    assert seen > 10


def test_the_share_of_crops_with_an_object_is_stated(tmp_path):
    write_coco(tmp_path)
    for name in scenes("train"):  # a large image whose objects are in one corner
        image = Image.new("RGB", (640, 480))
        image.paste(Image.open(tmp_path / "train" / name))
        image.save(tmp_path / "train" / name)
    content = json.loads((tmp_path / "train.json").read_text())
    for image in content["images"]:
        image.update(width=640, height=480)
    (tmp_path / "train.json").write_text(json.dumps(content))

    def share(object_share: float) -> float:
        options = {"train_on": "crops", "crop_size": 48, "object_share": object_share}
        data = DetectionDataModule(tmp_path, **QUIET, **options)
        dataset = data.dataset("train")
        found = [bool(len(dataset[epoch, i][1]["labels"])) for epoch in range(20) for i in range(len(dataset))]
        return sum(found) / len(found)

    assert share(1.0) > 0.95 and share(0.0) < 0.2 and 0.3 < share(0.5) < 0.75


def edit(change: Callable[[dict], None]) -> Callable[[Path], Path]:
    """Writes COCO files, and changes that of training."""

    def write(root: Path) -> Path:
        write_coco(root)
        content = coco_of(scenes("train"))
        change(content)
        (root / "train.json").write_text(json.dumps(content))
        return root

    return write


def edited(write: Callable[[Path], Path], name: str, change: Callable[[str], str]) -> Callable[[Path], Path]:
    """Writes files, and changes the text of one."""

    def written(root: Path) -> Path:
        file = write(root) / name
        file.write_text(change(file.read_text()))
        return root

    return written


def first(content: dict, **changes) -> None:
    content["annotations"][0].update(changes)


FAULTS = {
    "box without area": edit(lambda c: first(c, bbox=[5, 5, 0, 9])),
    "box without area ": edit(lambda c: first(c, bbox=[5, "x", 3, 9])),
    "box outside its image": edit(lambda c: first(c, bbox=[60, 5, 30, 9])),
    "annotation without a box": edit(lambda c: first(c, bbox=None)),
    "entry without image_id and category_id": edit(lambda c: first(c, category_id=True)),
    "class unknown to training": edit(lambda c: first(c, category_id=99)),
    "annotation of an unknown image": edit(lambda c: first(c, image_id=99)),
    "missing image file": edit(lambda c: c["images"][0].update(file_name="gone.png")),
    "image listed twice": edit(lambda c: c["images"].append(c["images"][0])),
    "entry without id and file_name": edit(lambda c: c["images"].append([])),
    "label file that cannot be read": edited(write_voc, "Annotations/train_0.xml", lambda text: text[:60]),
    "box outside its image ": edited(write_voc, "Annotations/train_0.xml", lambda t: t.replace("<xmax>", "<xmax>9")),
    "missing image file ": edited(write_voc, "ImageSets/Main/train.txt", lambda text: text + "gone\n"),
    "line that is neither a box nor an outline": edited(write_yolo, "labels/train/train_0.txt", lambda t: t + "1 .5\n"),
    "class unknown to training ": edited(write_yolo, "labels/train/train_0.txt", lambda t: t + "7 .5 .5 .1 .1\n"),
    "box without area  ": edited(write_yolo, "labels/train/train_0.txt", lambda t: t + "1 .5 .5 nan .1\n"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_counted_and_named_and_left_out(kind, tmp_path, caplog):
    FAULTS[kind](tmp_path)
    with pytest.raises(SampleError) as caught:
        DetectionDataModule(tmp_path, **QUIET).setup("fit")
    assert f" x {kind.strip()} (" in str(caught.value)
    data = DetectionDataModule(tmp_path, **QUIET, on_error="skip", max_error_share=0.5)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert kind.strip() in caplog.text
    images, targets = next(iter(data.train_dataloader()))
    assert len(images) == len(targets) == 2
    with pytest.raises(SampleError, match="max_error_share"):
        DetectionDataModule(tmp_path, **QUIET, on_error="skip", max_error_share=0.0).setup("fit")


def test_a_box_that_sticks_out_a_little_is_clipped(tmp_path):
    data = DetectionDataModule(edit(lambda c: first(c, bbox=[-0.4, -0.3, 64.8, 20]))(tmp_path), **QUIET, val_fraction=0)
    boxes = data.source("train").labels.images[0].boxes
    assert boxes[0].tolist() == pytest.approx([0, 0, 64, 19.7])


def test_an_image_of_another_size_than_its_labels_say(tmp_path):
    write_coco(tmp_path)
    file = tmp_path / "train" / "train_0.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(file).save(file, exif=exif)  # turned by a quarter, as photographs of phones are
    data = DetectionDataModule(tmp_path, **QUIET)
    data.setup("fit")
    with pytest.raises(SampleError, match="48 x 64 pixels, as EXIF turns it, but the label is of 64 x 48"):
        data.dataset("train")[0]
    data = DetectionDataModule(tmp_path, **QUIET, on_error="skip", max_error_share=0.5)
    data.setup("fit")
    assert data.dataset("train")[0][0].shape[1:] == data.dataset("train")[1][0].shape[1:] == (48, 64)


@pytest.mark.filterwarnings("error:Got processor")
@pytest.mark.parametrize("options", [{}, {"hflip": 0.0}, {"hflip": 0.0, "color_jitter": 0.0}])
def test_crowds_are_not_trained_on_and_scores_ignore_them(options, tmp_path):
    edit(lambda c: first(c, iscrowd=1))(tmp_path)
    (tmp_path / "val.json").write_text((tmp_path / "train.json").read_text())
    (tmp_path / "val").rename(tmp_path / "other")
    (tmp_path / "train").rename(tmp_path / "val")
    write_coco(tmp_path / "again")
    (tmp_path / "again" / "train").rename(tmp_path / "train")
    data = DetectionDataModule(tmp_path, **QUIET, **options)
    assert data.dataset("val")[0][1]["iscrowd"].tolist() == [1, 0]
    assert data.dataset("train")[0][1]["iscrowd"].tolist() == [0]


def test_images_without_objects_stay(tmp_path):
    (write_yolo(tmp_path) / "labels/train/train_0.txt").unlink()
    data = DetectionDataModule(tmp_path, **QUIET)
    data.setup("fit")
    assert len(data.dataset("train")) == 8
    assert data.dataset("train")[0][1]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("root", [".", "data.yaml"])
def test_labels_are_found_from_a_relative_root(root, tmp_path, monkeypatch):
    write_yolo(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert DetectionDataModule(root, **QUIET).source("train").labels.counts.sum() == 16


@pytest.mark.parametrize("form, where", [("coco", "train.json"), ("yolo", "labels.train")])
def test_training_without_any_object_is_a_mistake(form, where, tmp_path):
    WRITERS[form](tmp_path)
    for file in tmp_path.glob("labels/train/*"):
        file.unlink()
    if form == "coco":
        (tmp_path / "train.json").write_text(json.dumps(coco_of(scenes("train")) | {"annotations": []}))
    with pytest.raises(UserError, match=f"not one of 8 training images has an object, .*{where}$"):
        DetectionDataModule(tmp_path, class_names=NAMES if form == "yolo" else None, **QUIET).setup("fit")


def test_a_run_says_what_each_split_holds(tmp_path):
    """Of images that are held out, not of those that they are held out of; each image once."""
    data = DetectionDataModule(write_yolo(tmp_path), **QUIET, val_fraction=0.25, repeat_rare=1.0)
    (tmp_path / "data.yaml").write_text(f"train: images/train\nnames: {json.dumps(NAMES)}")
    for split, images in (("train", 6), ("val", 2)):
        assert f"; {2 * images} boxes (" in describe_split(split, data.dataset(split), 2)
    (write_labels(tmp_path / "table") / "val.csv").unlink()
    table = MultiLabelDataModule(str(tmp_path / "table"), val_fraction=0.25)
    labels = [len(set(one.labels)) for one in scenes("train").values()]
    for split in ("train", "val"):
        source = table.make_source(split)
        assert f"; {sum(labels[i] for i in source.indices)} labels (" in describe_split(split, source, 2)


def test_validation_is_held_out_where_there_is_none(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "val.json").unlink()
    data = DetectionDataModule(tmp_path, **QUIET, val_fraction=0.34)
    assert len(data.dataset("train")) == 5 and len(data.dataset("val")) == 3 and len(data.dataset("test")) == 2


@pytest.mark.parametrize("layout", ["instances", "roboflow", "roboflow voc", "classes.txt", "outlines"])
def test_other_layouts(layout, tmp_path):
    if layout == "instances":
        for split in ("train", "val"):
            (write_coco(tmp_path / split) / split).rename(tmp_path / f"{split}2017")
            (tmp_path / "annotations").mkdir(exist_ok=True)
            (tmp_path / split / f"{split}.json").rename(tmp_path / f"annotations/instances_{split}2017.json")
    elif layout == "roboflow":
        write_coco(tmp_path)
        for split in ("train", "val", "test"):
            (tmp_path / f"{split}.json").rename(tmp_path / split / "_annotations.coco.json")
        (tmp_path / "val").rename(tmp_path / "valid")
    elif layout == "roboflow voc":
        write_voc(tmp_path / "made")
        for split in ("train", "val"):
            (tmp_path / split).mkdir()
            for file in (tmp_path / "made").rglob(f"{split}_*"):
                file.rename(tmp_path / split / file.name)
    elif layout == "classes.txt":
        (write_yolo(tmp_path) / "data.yaml").unlink()
        (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    else:  # of YOLO
        write_yolo(tmp_path)
        file = tmp_path / "labels/train/train_0.txt"
        file.write_text("1 .25 .25 .5 .25 .5 .5 .25 .5\n")
        box = DetectionDataModule(tmp_path, **QUIET).source("train").labels.images[0].boxes
        assert box.tolist() == [[16, 12, 32, 24]]
    data = DetectionDataModule(tmp_path, **QUIET)
    data.setup("fit")
    assert len(data.dataset("train")) == 8 and len(data.dataset("val")) == 2


def test_ids_of_coco_may_be_texts(tmp_path):
    """Also where the annotations have the number and the images the text."""
    content = coco_of(scenes("train"))
    for entry in content["images"] + content["categories"]:
        entry["id"] = str(entry["id"])
    content["categories"].append({"id": "x", "name": "moss"})
    for annotation in content["annotations"][:4]:
        annotation["image_id"] = str(annotation["image_id"])
    (write_coco(tmp_path) / "train.json").write_text(json.dumps(content))
    labels = DetectionDataModule(tmp_path, **QUIET).source("train").labels
    assert (labels.names, labels.category_ids) == ([*NAMES[::-1], "moss"], ["3", "7", "x"])
    assert labels.counts.sum() == 16 and labels.image_ids[0] == "50"


@pytest.mark.parametrize("name", ["val2017", "valid", "validation"])
def test_validation_in_annotations_is_found_once(name, tmp_path):
    write_coco(tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val.json").rename(tmp_path / f"annotations/instances_{name}.json")
    (tmp_path / "val").rename(tmp_path / name)
    assert len(DetectionDataModule(tmp_path, **QUIET).source("val")) == 2


def test_given_classes_are_those_of_a_file_that_numbers_them_itself(tmp_path):
    write_yolo(tmp_path)
    assert DetectionDataModule(tmp_path, class_names=NAMES, **QUIET).source("train").labels.names == NAMES
    with pytest.raises(UserError, match="classes must be those of .*data.yaml"):
        DetectionDataModule(tmp_path, class_names=NAMES[::-1], **QUIET).setup("fit")


def test_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match="COCO .* Pascal VOC .* YOLO"):
        DetectionDataModule(tmp_path).setup("fit")
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(UserError, match="is no COCO file"):
        DetectionDataModule(tmp_path).setup("fit")
    write_coco(tmp_path)
    write_yolo(tmp_path)
    with pytest.raises(UserError, match="coco and yolo"):
        DetectionDataModule(tmp_path).setup("fit")
    with pytest.raises(ValueError, match="train_on must be one of"):
        DetectionDataModule(tmp_path, train_on="tiles")
    with pytest.raises(ValueError, match="format must be one of"):
        DetectionDataModule(tmp_path, format="labelme")
