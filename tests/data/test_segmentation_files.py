"""Masks from folders and COCO outlines: classes are explicit, masks move along, and faults are named."""

import json
import logging
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from luna_vision.data import SegmentationDataModule
from luna_vision.data.dense import DenseDataModule, Truth
from luna_vision.data.images import describe_split
from luna_vision.data.label_files import Format, Place
from luna_vision.images.decode import SampleError
from luna_vision.utils.errors import UserError
from tests.labelled import COLORS, NAMES, coco_of, scenes, write_coco, write_masks

QUIET = {"num_workers": 0, "batch_size": 2}


def masks_of(data: SegmentationDataModule, split: str) -> dict[str, np.ndarray]:
    dataset = data.dataset(split)
    return {Path(dataset.source.sample_file(i)).name: dataset[i][1].numpy() for i in range(len(dataset))}


@pytest.mark.parametrize("form", ["index", "palette", "colors"])
def test_masks_of_files(form, tmp_path):
    data = SegmentationDataModule(write_masks(tmp_path, form), **QUIET)
    data.setup("fit")
    assert data.background and data.class_names == NAMES and data.num_classes == 2
    for name, mask in masks_of(data, "val").items():
        np.testing.assert_array_equal(mask, scenes("val")[name].mask)


@pytest.mark.parametrize("form", ["polygons", "run lengths", "counts"])
def test_masks_of_outlines(form, tmp_path):
    write_coco(tmp_path)
    if form != "polygons":
        content, images = coco_of(scenes("val")), list(scenes("val").values())
        for annotation in content["annotations"]:
            one = images[50 - annotation["image_id"]]
            left, top, width, height = annotation["bbox"]
            mask = np.zeros(one.mask.shape, np.uint8, order="F")
            mask[top : top + height, left : left + width] = 1
            found = rle.encode(mask)
            annotation["segmentation"] = {"size": list(mask.shape), "counts": found["counts"].decode()}
            if form == "counts":
                changes = np.flatnonzero(np.diff(mask.ravel("F"), prepend=0, append=0))
                counts = np.diff(changes, prepend=0, append=mask.size)
                annotation["segmentation"]["counts"] = counts.tolist()
        (tmp_path / "val.json").write_text(json.dumps(content))
    data = SegmentationDataModule(tmp_path, **QUIET)
    data.setup("fit")
    assert data.background and data.class_names == NAMES[::-1]  # in the order of their ids
    for name, mask in masks_of(data, "val").items():
        np.testing.assert_array_equal(mask, np.array([0, 2, 1])[scenes("val")[name].mask])
    without = SegmentationDataModule(tmp_path, **QUIET, background=False)
    for name, mask in masks_of(without, "val").items():
        np.testing.assert_array_equal(mask, np.array([255, 1, 0])[scenes("val")[name].mask])


@pytest.mark.parametrize("background, most", [(True, 254), (False, 255)])
def test_outlines_of_more_classes_than_a_mask_holds(background, most, tmp_path):
    write_coco(tmp_path)
    for count in (most, most + 1):
        content = coco_of(scenes("train"))
        content["categories"] += [{"id": 10 + i, "name": f"thing {i}"} for i in range(count - 2)]
        (tmp_path / "train.json").write_text(json.dumps(content))
        data = SegmentationDataModule(tmp_path, **QUIET, background=background)
        refused = pytest.raises(UserError, match="masks hold at most 255 classes") if count > most else nullcontext()
        with warnings.catch_warnings(), refused:
            warnings.simplefilter("ignore")
            data.source("train")


def test_small_objects_lie_over_large_ones_and_crowds_are_ignored(tmp_path):
    write_coco(tmp_path)
    content = coco_of(scenes("val"))
    image = content["images"][0]
    box = [0, 0, 40, 0, 40, 30, 0, 30], [10, 10, 20, 10, 20, 20, 10, 20], [50, 0, 60, 0, 60, 10, 50, 10]
    base = {"image_id": image["id"], "bbox": [0, 0, 9, 9], "iscrowd": 0}
    content["annotations"] = [
        base | {"category_id": 3, "segmentation": [box[1]]},
        base | {"category_id": 7, "segmentation": [box[0]]},
        base | {"category_id": 7, "segmentation": [box[2]], "iscrowd": 1},
    ]
    (tmp_path / "val.json").write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = masks_of(SegmentationDataModule(tmp_path, **QUIET), "val")[image["file_name"]]
    assert (mask[15, 15], mask[5, 5], mask[5, 55], mask[40, 5]) == (1, 2, 255, 0)


@pytest.mark.parametrize(
    "layout", [("images/{}", "masks/{}"), ("{}", "{}annot"), ("images/{}", "annotations/{}"), ("{}/images", "{}/masks")]
)
def test_layouts(layout, tmp_path):
    write_masks(tmp_path / "made")
    for split in ("train", "val", "test"):
        for kind, pattern in zip(("images", "masks"), layout, strict=True):
            target = tmp_path / "data" / pattern.format(split if split != "val" else "validation")
            target.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "made" / split / kind).rename(target)
    data = SegmentationDataModule(tmp_path / "data", **QUIET)
    data.setup("fit")
    assert (len(data.dataset("train")), len(data.dataset("val"))) == (8, 2)
    assert data.class_names == ["0", "1", "2"] and not data.background  # as nothing says what the numbers are


def test_an_ignored_number_and_classes_without_a_background(tmp_path):
    data = SegmentationDataModule(write_masks(tmp_path), **QUIET, classes=["ground", "brick"], ignore_index=2)
    data.setup("fit")
    assert not data.background and data.class_names == ["ground", "brick"]
    for name, mask in masks_of(data, "val").items():
        truth = scenes("val")[name].mask
        np.testing.assert_array_equal(mask, np.where(truth == 2, 255, truth))


@pytest.mark.parametrize("form", ["numbers", "names", "colors"])
def test_the_ignored_value_is_no_class(form, tmp_path):
    write_masks(tmp_path, "colors" if form == "colors" else "index")
    if form == "numbers":
        (tmp_path / "classes.txt").unlink()
    data = SegmentationDataModule(tmp_path, **QUIET, ignore_index=[0, 0, 0] if form == "colors" else 0)
    data.setup("fit")
    assert not data.background and data.class_names == (["1", "2"] if form == "numbers" else NAMES)
    for name, mask in masks_of(data, "val").items():
        np.testing.assert_array_equal(mask, np.array([255, 0, 1])[scenes("val")[name].mask])


def test_255_is_a_class_where_values_have_it(tmp_path):
    options = {"classes": ["brick", "background"], "values": [0, 255]}
    assert SegmentationDataModule(write_masks(tmp_path), **QUIET, **options).class_names == ["brick", "background"]


@pytest.mark.parametrize("options", [{}, {"train_on": "crops", "crop_size": 40, "scale": [0.6, 1.5], "vflip": 0.5}])
def test_masks_move_along_with_the_image(options, tmp_path):
    data = SegmentationDataModule(write_masks(tmp_path), **QUIET, color_jitter=0.0, **options)
    dataset = data.dataset("train")
    for epoch in range(3):
        for index in range(len(dataset)):
            image, mask = dataset[epoch, index]
            assert image.shape[1:] == mask.shape and (not options or mask.shape == (40, 40))
            close = [(image - torch.tensor(c)[:, None, None] / 255).abs().amax(0) < 0.1 for c in COLORS]
            for label, pixels in enumerate(close, 1):
                assert (pixels == (mask == label)).float().mean() > 0.9
            again = dataset[epoch, index]
            assert torch.equal(image, again[0]) and torch.equal(mask, again[1])


@pytest.mark.parametrize("background", [True, False])
def test_crops_are_put_on_objects(background, tmp_path):
    """Without a background, class 0 is an object as well."""
    write_masks(tmp_path)
    for file in tmp_path.glob("train/masks/*"):
        mask = np.full((48, 64), 0 if background else 255, np.uint8)
        mask[40:44, 50:54] = int(background)
        Image.fromarray(mask).save(file)
    options = {"background": background, "train_on": "crops", "crop_size": 8, "object_share": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = SegmentationDataModule(tmp_path, **QUIET, **options).dataset("train")
    assert all((dataset[index][1] == int(background)).any() for index in range(len(dataset)))


def test_what_a_crop_pads_is_ignored(tmp_path):
    data = SegmentationDataModule(write_masks(tmp_path), **QUIET, train_on="crops", crop_size=[48, 80], hflip=0.0)
    image, mask = data.dataset("train")[0]
    assert mask.shape == (48, 80) and (mask[:, 64:] == 255).all() and (mask[:, :64] != 255).all()
    assert (image[:, :, 64:] <= 0.5).all()


@pytest.mark.parametrize("form", ["L", "RGB", "LA"])
def test_binary_masks_of_0_and_255(form, tmp_path):
    """As most programs write them; some as grey in all three channels."""
    write_masks(tmp_path)
    (tmp_path / "classes.txt").unlink()
    for file in tmp_path.glob("*/masks/*"):
        Image.fromarray((np.asarray(Image.open(file)) > 0).astype(np.uint8) * 255).convert(form).save(file)
    names = ["background", "thing"]
    for options in ({}, {"ignore_index": -1}, {"classes": names}, {"classes": names, "values": [0, 255]}):
        data = SegmentationDataModule(tmp_path, **QUIET, **options)
        assert data.background and data.class_names == (["thing"] if "classes" in options else ["foreground"])
        for name, mask in masks_of(data, "val").items():
            np.testing.assert_array_equal(mask, scenes("val")[name].mask > 0)
    lone = SegmentationDataModule(tmp_path / "gone", **QUIET, format="masks", classes=names)
    assert lone.class_names == ["thing"]  # a prediction needs no training data


def broken(kind: str, root: Path) -> None:
    file = root / "train" / "masks" / "train_0.png"
    mask = np.asarray(Image.open(file)).copy()
    if kind == "values that are no class: 9":
        mask[0, 0] = 9
        Image.fromarray(mask).save(file)
    elif kind == "pixels, but its mask":
        Image.fromarray(mask[:-1]).save(file)
    elif kind == "cannot decode":
        file.write_bytes(file.read_bytes()[:50])
    elif kind == "image without a mask":
        file.unlink()
    elif kind == "mask without an image":
        (root / "train" / "images" / "train_0.png").unlink()
    elif kind == "second mask":
        Image.fromarray(mask).save(file.with_suffix(".tif"))
    else:
        Image.fromarray(np.stack([mask, mask, mask * 0], 2)).save(file)


@pytest.mark.parametrize(
    "kind",
    [
        "values that are no class: 9",
        "pixels, but its mask",
        "cannot decode",
        "image without a mask",
        "mask without an image",
        "second mask",
        "has colours",
    ],
)
def test_faults_are_counted_and_named_and_left_out(kind, tmp_path, caplog):
    broken(kind, write_masks(tmp_path))
    with pytest.raises(SampleError, match=kind):
        SegmentationDataModule(tmp_path, **QUIET).setup("fit")
    data = SegmentationDataModule(tmp_path, **QUIET, on_error="skip", max_error_share=0.5)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
        images, masks = next(iter(data.train_dataloader()))
        for index in range(len(data.dataset("train"))):
            assert data.dataset("train")[index][1].max() <= 2
    assert kind in caplog.text


def test_classes_that_never_occur_are_named(tmp_path):
    write_masks(tmp_path)
    (tmp_path / "classes.txt").write_text("background\nbrick\nleaf\nwater\n")
    with pytest.warns(UserWarning, match="never occur in the masks: water"):
        SegmentationDataModule(tmp_path, **QUIET).setup("fit")


def test_a_run_begins_with_the_share_of_each_class(tmp_path, caplog):
    write_masks(tmp_path)
    for split in ("val", "test"):
        shutil.rmtree(tmp_path / split)
    data = SegmentationDataModule(tmp_path, **QUIET, val_fraction=0.25)
    masks = np.array([one.mask for one in scenes("train").values()])
    for split in ("train", "val"):  # of each the images that it has
        dataset = data.dataset(split)
        kept = masks[dataset.source.indices]
        said = describe_split(split, dataset, 2)
        for name, pixels in zip(["background", *NAMES], np.bincount(kept.ravel()), strict=True):
            assert f"{name} {pixels / kept.size:.1%}" in said


@pytest.mark.parametrize(
    "files, options, message",
    [
        ({}, {"classes": ["a", "a"]}, "different names"),
        ({}, {"classes": ["a", "b"], "values": [1]}, "values must be one for each"),
        ({"class_dict.csv": "name,r,g\na,1,2\n"}, {}, "no table of classes"),
        ({"class_dict.csv": "name;r;g;b\na;1;2;3\n"}, {}, "2 to 255 classes"),
        ({"classes.txt": "a\na\n"}, {}, "no table of classes"),
        ({"classes.txt": "a\n"}, {}, "2 to 255 classes"),
    ],
)
def test_mistakes(files, options, message, tmp_path):
    write_masks(tmp_path)
    if files:
        (tmp_path / "classes.txt").unlink()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        SegmentationDataModule(tmp_path, **QUIET, **options).setup("fit")


def test_a_subclass_takes_images_and_masks_of_any_kind():
    class Source:
        where = "memory"

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return Image.new("RGB", (64, 48)), Truth(mask=np.full((48, 64), index % 2, np.uint8))

    class Data(DenseDataModule):
        formats = {"memory": Format(lambda root, split: Place(root, root) if split == "train" else None, None, "any")}
        class_names, masks = ["even", "odd"], True

        def open_labels(self, place, split):
            return Source()

        def target(self, truth):
            return torch.from_numpy(truth.mask)

    data = Data(**QUIET, train_on="crops", crop_size=32, val_fraction=0.5)
    data.setup("fit")
    images, masks = next(iter(data.train_dataloader()))
    assert images[0].shape == (3, 32, 32) and masks[0].shape == (32, 32) and len(data.dataset("val")) == 2


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="train/images and train/masks"):
        SegmentationDataModule(tmp_path).setup("fit")
    with pytest.raises(FileNotFoundError, match="train/images and train/masks"):
        _ = SegmentationDataModule(tmp_path, format="masks").class_names  # a prediction does without them
