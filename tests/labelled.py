"""Small scenes with objects of two classes, written with their labels in every format that the package reads."""

import csv
import json
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

NAMES = ["brick", "leaf"]
COLORS = [(200, 30, 30), (30, 180, 60)]
SIZE = (48, 64)  # height and width
SPLITS = {"train": 8, "val": 2, "test": 2}


class Scene(NamedTuple):
    """An image, its mask (0 background, 1 and 2 the classes), and its objects: boxes in pixels, labels from 0."""

    image: Image.Image
    mask: np.ndarray
    boxes: list[tuple[int, int, int, int]]
    labels: list[int]


def scene(seed: int, size: tuple[int, int] = SIZE) -> Scene:
    """Two rectangles in different halves of an image, whose colours are those of their classes."""
    rng = np.random.default_rng(seed)
    height, width = size
    array, mask = rng.integers(90, 120, (height, width, 3)).astype(np.uint8), np.zeros(size, np.uint8)
    boxes, labels = [], []
    for half in range(2):
        label = int(rng.integers(2))
        w, h = rng.integers(10, width // 2 - 4), rng.integers(10, height - 4)
        left, top = half * width // 2 + int(rng.integers(1, width // 2 - w)), int(rng.integers(1, height - h))
        box = (left, top, left + int(w), top + int(h))
        array[box[1] : box[3], box[0] : box[2]] = COLORS[label]
        mask[box[1] : box[3], box[0] : box[2]] = label + 1
        boxes.append(box)
        labels.append(label)
    return Scene(Image.fromarray(array), mask, boxes, labels)


def scenes(split: str) -> dict[str, Scene]:
    """The scenes of a split by the names of their files."""
    start = list(SPLITS).index(split) * 100
    return {f"{split}_{i}.png": scene(start + i) for i in range(SPLITS[split])}


def save_images(folder: Path, found: dict[str, Scene]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in found.items():
        one.image.save(folder / name)


def coco_of(found: dict[str, Scene]) -> dict:
    """The content of a COCO file, with ids that neither begin at 1 nor are in order."""
    images = [
        {"id": 50 - i, "file_name": name, "height": one.mask.shape[0], "width": one.mask.shape[1]}
        for i, (name, one) in enumerate(found.items())
    ]
    annotations = []
    for image, one in zip(images, found.values(), strict=True):
        for (left, top, right, bottom), label in zip(one.boxes, one.labels, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": (7, 3)[label],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                    "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                }
            )
    categories = [{"id": 7, "name": NAMES[0]}, {"id": 3, "name": NAMES[1]}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root: Path) -> Path:
    for split in SPLITS:
        save_images(root / split, scenes(split))
        (root / f"{split}.json").write_text(json.dumps(coco_of(scenes(split))))
    return root


def voc_of(name: str, one: Scene) -> str:
    tree = ElementTree.Element("annotation")
    ElementTree.SubElement(tree, "filename").text = name
    size = ElementTree.SubElement(tree, "size")
    for side, value in zip(("width", "height"), one.image.size, strict=True):
        ElementTree.SubElement(size, side).text = str(value)
    for (left, top, right, bottom), label in zip(one.boxes, one.labels, strict=True):
        node = ElementTree.SubElement(tree, "object")
        ElementTree.SubElement(node, "name").text = NAMES[label]
        box = ElementTree.SubElement(node, "bndbox")
        corners = {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom}
        for corner, value in corners.items():
            ElementTree.SubElement(box, corner).text = str(value)
    return ElementTree.tostring(tree, encoding="unicode")


def write_voc(root: Path) -> Path:
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split in SPLITS:
        found = scenes(split)
        save_images(root / "JPEGImages", found)
        for name, one in found.items():
            (root / "Annotations" / name).with_suffix(".xml").write_text(voc_of(name, one))
        names = "".join(f"{Path(name).stem}\n" for name in found)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(names)
    return root


def yolo_of(one: Scene) -> str:
    lines, (width, height) = [], one.image.size
    for (left, top, right, bottom), label in zip(one.boxes, one.labels, strict=True):
        shares = ((left + right) / 2 / width, (top + bottom) / 2 / height)
        shares += ((right - left) / width, (bottom - top) / height)
        lines.append(f"{label} " + " ".join(f"{x:.6f}" for x in shares))
    return "\n".join(lines) + "\n"


def yolo_outlines_of(one: Scene) -> str:
    lines, (width, height) = [], one.image.size
    for (left, top, right, bottom), label in zip(one.boxes, one.labels, strict=True):
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        lines.append(f"{label} " + " ".join(f"{x / width:.6f} {y / height:.6f}" for x, y in corners))
    return "\n".join(lines) + "\n"


def write_yolo(root: Path, outlines: bool = False) -> Path:
    for split in SPLITS:
        found = scenes(split)
        save_images(root / "images" / split, found)
        (root / "labels" / split).mkdir(parents=True)
        for name, one in found.items():
            (root / "labels" / split / name).with_suffix(".txt").write_text(
                (yolo_outlines_of if outlines else yolo_of)(one)
            )
    lines = [f"{split}: images/{split}" for split in SPLITS]
    (root / "data.yaml").write_text("\n".join([*lines, f"names: {json.dumps(NAMES)}"]) + "\n")
    return root


def write_masks(root: Path, form: str = "index") -> Path:
    """Masks of numbers ("index"), with a "palette", or of "colors", whose table is in class_dict.csv."""
    palette = np.array([(0, 0, 0), *COLORS], np.uint8)
    for split in SPLITS:
        found = scenes(split)
        save_images(root / split / "images", found)
        (root / split / "masks").mkdir(parents=True)
        for name, one in found.items():
            mask = Image.fromarray(palette[one.mask] if form == "colors" else one.mask)
            if form == "palette":
                mask.putpalette(palette.tobytes())
            mask.save(root / split / "masks" / name)
    names = ["background", *NAMES]
    if form == "colors":
        rows = [f"{name},{r},{g},{b}" for name, (r, g, b) in zip(names, palette.tolist(), strict=True)]
        (root / "class_dict.csv").write_text("\n".join(["name,r,g,b", *rows]) + "\n")
    else:
        (root / "classes.txt").write_text("\n".join(names) + "\n")
    return root


def write_labels(root: Path, form: str = "lists") -> Path:
    """A table for each split: "lists" of labels, or "columns" of 0 and 1."""
    for split in SPLITS:
        found = scenes(split)
        save_images(root / split, found)
        with (root / f"{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["file", "labels"] if form == "lists" else ["file", *NAMES])
            for name, one in found.items():
                has = [label in one.labels for label in range(2)]
                lists = "|".join(name for name, there in zip(NAMES, has, strict=True) if there)
                rows.writerow([name, lists] if form == "lists" else [name, *map(int, has)])
    return root


def write_whole(root: Path, layout: str) -> Path:
    """All scenes without splits, as annotation tools export them; returns what `--data` names."""
    found = {name: one for split in SPLITS for name, one in scenes(split).items()}
    kind, _, how = layout.partition(" ")
    beside = how in ("beside", "file")
    save_images(root if beside else root / "images", found)
    if kind == "folders":
        for index, name in enumerate(found):
            (root / NAMES[index % 2]).mkdir(exist_ok=True)
            (root / "images" / name).rename(root / NAMES[index % 2] / name)
        (root / "images").rmdir()
    elif kind == "table":
        rows = [f"{name},{'|'.join(NAMES[label] for label in set(one.labels))}" for name, one in found.items()]
        (root / "labels.csv").write_text("\n".join(["file,labels", *rows]) + "\n")
        return root / "labels.csv" if beside else root
    elif kind == "coco":
        content = coco_of(found)
        for image in content["images"] if how == "images/" else ():  # Label Studio's
            image["file_name"] = f"images/{image['file_name']}"
        file = root / ("annotations/instances_default.json" if how == "cvat" else "result.json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
        (root / "info.json").write_text("{}")
        return file if how == "file" else root
    else:
        labels = root if beside else root / {"masks": how, "voc": "annotations", "yolo": "labels"}[kind]
        labels.mkdir(exist_ok=True)
        for name, one in found.items():
            if kind == "masks":
                Image.fromarray(one.mask).save(labels / name)
            elif kind == "voc":
                (labels / name).with_suffix(".xml").write_text(voc_of(name, one))
            else:
                (labels / name).with_suffix(".txt").write_text(yolo_outlines_of(one))
        names = ["background", *NAMES] if kind == "masks" else NAMES
        (root / "classes.txt").write_text("\n".join(names) + "\n")
        if kind == "yolo":
            (root / "notes.json").write_text('{"categories": []}')
    return root


WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}


def write_slides(table: Path) -> Path:
    """A table of whole images with one label each, and beside it their files."""
    rows = [("path", "label", "split")]
    for split in SPLITS:
        found = scenes(split)
        save_images(table.parent / "slides", found)
        rows += [(f"slides/{name}", NAMES[i % 2], split) for i, name in enumerate(found)]
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return table
