"""Boxes and outlines of objects from label files: COCO JSON, Pascal VOC XML and YOLO text.

A `Format` has a function that finds the labels of a split in a folder, and one that reads them. A reader leaves out
what is faulty and tells a `LabelFaults`. A file that cannot be read at all is a `UserError`.
"""

import contextlib
import csv
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import yaml
from PIL import Image, UnidentifiedImageError

from luna_vision.data.faults import LabelFaults
from luna_vision.images.decode import SampleError, read_image
from luna_vision.images.find import VAL_NAMES, contents, find_images, image_suffixes, listed, walk
from luna_vision.images.pillow import open_image_file, orientation_of
from luna_vision.utils.errors import UserError, one_line
from luna_vision.utils.text import csv_separator

SLACK = 0.01  # of the side: how far a box may stick out before it counts as a fault; programs round differently
NO_AREA, OUTSIDE, UNKNOWN, MISSING, TWICE, COLUMNS = (
    "box without area",
    "box outside its image",
    "class unknown to training",
    "missing image file",
    "image listed twice",
    "row of another number of columns",
)
Size = tuple[int, int]  # height and width in pixels


class Annotated(NamedTuple):
    """An image file and its n objects."""

    file: str
    size: Size  # upright
    boxes: np.ndarray  # float32 (n, 4): left, top, right, bottom in pixels, within the image
    labels: np.ndarray  # int64 (n,), from 0
    crowd: np.ndarray  # bool (n,): neither trained on nor counted as missed (COCO's crowds, VOC's difficult ones)
    outlines: list[Any]  # COCO's ``segmentation`` of each object, where masks are asked for; else empty


class LabelSet(NamedTuple):
    """The labels of a split."""

    where: str  # the file or folder that they are from
    names: list[str]  # of the K classes, by label
    images: list[Annotated]  # those that have labels, and those that are said to have none
    category_ids: list[int | str]  # COCO's id of each label; for other formats from 1
    image_ids: list[int | str]  # COCO's ids of the images; empty for other formats

    @property
    def counts(self) -> np.ndarray:
        """int64 (n, K), the number of objects of each class in each image."""
        counts = [np.bincount(image.labels, minlength=len(self.names)) for image in self.images]
        return np.array(counts, np.int64).reshape(len(self.images), len(self.names))


class Place(NamedTuple):
    """Where the labels of a split are, and the folder of its images."""

    labels: Path
    images: Path


class _Objects:
    """The objects of one image, as a reader meets them."""

    def __init__(self, where: str, size: Size, faults: LabelFaults) -> None:
        self.where, self.size, self.faults = where, size, faults
        self.rows: list[tuple[list[float], int, bool, Any]] = []

    def add(self, box: Sequence[float], label: int, where: str, crowd: bool = False, outline: Any = None) -> None:
        """An object with a box in pixels, unless it is faulty."""
        height, width = self.size
        left, top, right, bottom = box
        sides = (left, -width * SLACK), (top, -height * SLACK), (-right, -width * (1 + SLACK))
        inside = all(value >= least for value, least in (*sides, (-bottom, -height * (1 + SLACK))))
        clipped = [max(left, 0), max(top, 0), min(right, width), min(bottom, height)]
        if not (right > left and bottom > top):  # also where one is NaN
            self.faults.add(NO_AREA, where)
        elif not inside or clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            self.faults.add(OUTSIDE, where)
        else:
            self.rows.append((clipped, label, crowd, outline))

    def annotated(self, file: str) -> Annotated:
        boxes, labels, crowd, outlines = zip(*self.rows, strict=True) if self.rows else ((), (), (), ())
        arrays = np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), np.array(crowd, bool)
        return Annotated(file, self.size, *arrays, [outline for outline in outlines if outline is not None])


def image_size(path: str | os.PathLike) -> Size:
    """Height and width of an image file in pixels, upright.

    Raises:
        SampleError: It is no image.
        OSError: It cannot be read.
    """
    try:
        with open_image_file(path) as image:
            width, height = image.size
            return (width, height) if orientation_of(image) >= 5 else (height, width)
    except (UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError):  # of another decoder
        width, height = read_image(path).size
        return height, width


def split_names(split: str) -> Sequence[str]:
    """The names that a split may have on the disk."""
    return VAL_NAMES if split == "val" else (split,)


def read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header and the numbered rows of a CSV file, without white space around cells and without empty rows.

    Raises:
        UserError: It is no such file, or has no rows, or fewer than two columns, or two of the same name.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = file.readlines()
        reader = csv.reader(lines, delimiter=csv_separator(lines))
        rows = [(number, [cell.strip() for cell in row]) for number, row in enumerate(reader, 1)]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is no CSV table: {one_line(error)}") from error
    (_, header), *rows = [row for row in rows if any(row[1])] or [(1, [])]
    if len(header) < 2 or len(set(header)) < len(header) or not rows:
        asked = "a header with two or more different columns, separated by commas, semicolons or tabs"
        raise UserError(f"{path} must have {asked}, and rows below it")
    return header, rows


def _number(value: Any) -> float:
    """A finite number, or NaN for anything else."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool) and math.isfinite(number := float(value)):
            return number
    return math.nan


# ---- COCO

ID = (int, str)
COCO_LISTS = ("images", "annotations", "categories")


def find_coco(root: Path, split: str) -> Place | None:
    """SPLIT.json beside SPLIT/, annotations/instances_SPLIT*.json, or SPLIT/_annotations.coco.json."""
    found = []
    for name in split_names(split):
        files = [root / f"{name}.json", root / name / "_annotations.coco.json"]
        files += sorted(path for start in ("", "instances_") for path in root.glob(f"annotations/{start}{name}*.json"))
        found += [path for path in files if path.is_file()]
    found = list(dict.fromkeys(found))  # val*.json is instances_valid.json, too
    if len(found) > 1:
        raise UserError(f"{listed(list(map(str, found)))} are all for {split}: keep one of them in {root}")
    if not found:
        return None
    (file,) = found
    return _coco_place(file, root)


def whole_coco(root: Path) -> Place | None:
    """The one COCO file of a folder, in it or in annotations/ there; or this file."""
    if root.is_file():
        beside = root.parent.parent if root.parent.name == "annotations" else root.parent
        return _coco_place(root, beside) if root.suffix == ".json" else None
    files = [file for at in (root, root / "annotations") for file in sorted(at.glob("[!.]*.json"))]
    # other programs leave other JSON files there
    found = [file for file in files if all(f'"{name}"'.encode() in file.read_bytes() for name in COCO_LISTS)]
    if len(found) > 1:
        raise UserError(
            f"{listed(list(map(str, found)))} are all for training: give one of them in the place of {root}"
        )
    return _coco_place(found[0], root) if found else None


def _coco_place(file: Path, root: Path) -> Place:
    stem = file.stem.removeprefix("instances_")
    folders = [root / stem / "images", root / stem, root / "images" / stem, root / "images", file.parent]
    if file.name.startswith("_"):
        folders.insert(0, file.parent)
    return Place(file, next((folder for folder in folders if folder.is_dir()), root))


def read_coco(place: Place, names: list[str] | None, faults: LabelFaults, masks: bool = False) -> LabelSet:
    """Read a COCO file, with the classes in the order of their ids. An id is a number or a text, and 7 is "7".

    Args:
        place: From `find_coco`.
        names: The classes of the training labels; None takes those of the file.
        faults: Is told what is left out.
        masks: Read outlines; an object may then lack a box.

    Raises:
        UserError: It is no COCO file.
    """
    file = place.labels
    content = _json(file)
    categories: dict[str, str] = {}
    ids: dict[str, int | str] = {}  # of a category
    for where, entry in _records(content, "categories", file, faults, id=ID, name=str):
        if str(entry["id"]) in categories or entry["name"] in ids:
            raise UserError(f"{where}: the category {entry['name']!r}, id {entry['id']}, is there twice")
        categories[str(entry["id"])], ids[entry["name"]] = entry["name"], entry["id"]
    names = sorted(ids, key=lambda name: _order(ids[name])) if names is None else names
    label_of = {id_: names.index(name) for id_, name in categories.items() if name in names}
    named = [str(entry.get("file_name")) for entry in content["images"] if isinstance(entry, dict)]
    folders = [place.images, *place.images.parents[:1]]  # some names of files begin with that of the folder
    folder = next((at for at in folders if any((at / name).is_file() for name in named)), place.images)
    images: dict[str, _Objects] = {}
    files: dict[str, tuple[str, int | str]] = {}
    listed_files: set[str] = set()
    for where, entry in _records(content, "images", file, faults, id=ID, file_name=str):
        path = str(folder / entry["file_name"])
        if (id_ := str(entry["id"])) in images or path in listed_files:
            faults.add(TWICE, where)
            continue
        listed_files.add(path)
        if (size := _size_of(path, entry, faults)) is not None:
            images[id_], files[id_] = _Objects(str(file), size, faults), (path, entry["id"])
    known = {str(entry.get("id")) for entry in content["images"] if isinstance(entry, dict)}
    for where, entry in _records(content, "annotations", file, faults, image_id=ID, category_id=ID):
        label, objects = label_of.get(str(entry["category_id"])), images.get(str(entry["image_id"]))
        if objects is None:
            if str(entry["image_id"]) not in known:  # else the image is a fault already
                faults.add("annotation of an unknown image", where)
            continue
        if label is None:
            faults.add(UNKNOWN, where)
            continue
        outline = entry.get("segmentation") if masks else None
        box = entry.get("bbox")
        if masks:
            if not is_outline(outline, objects.size):
                faults.add("outline that is neither polygons nor run lengths", where)
                continue
            box = box or [0, 0, *objects.size[::-1]]
        if not isinstance(box, list) or len(box) != 4:
            faults.add("annotation without a box", where)
            continue
        left, top, width, height = map(_number, box)
        crowd = bool(entry.get("iscrowd"))
        objects.add((left, top, left + width, top + height), label, where, crowd, outline)
    found = [objects.annotated(files[id_][0]) for id_, objects in images.items()]
    image_ids = [files[id_][1] for id_ in images]
    return LabelSet(str(file), names, found, [ids.get(name, 0) for name in names], image_ids)


def _order(id_: int | str) -> tuple[bool, int, str]:
    """Numbers, also those in texts, come before other texts."""
    text = str(id_)
    number = text.isascii() and text.removeprefix("-").isdigit()
    return not number, int(text) if number else 0, text


def _size_of(path: str, entry: dict[str, Any], faults: LabelFaults) -> Size | None:
    if not os.path.isfile(path):
        faults.add(MISSING, path)
        return None
    width, height = _number(entry.get("width")), _number(entry.get("height"))
    if width >= 1 and height >= 1 and width == int(width) and height == int(height):
        return int(height), int(width)
    return _read_size(path, faults)


def _read_size(path: str, faults: LabelFaults) -> Size | None:
    """The size of an image file; one that cannot be read is a fault."""
    try:
        return image_size(path)
    except SampleError:
        faults.add("image file that cannot be read", path)
    except OSError:
        faults.add(MISSING, path)
    return None


def is_outline(outline: Any, size: Size) -> bool:
    """Whether pycocotools can draw it: polygons, or run lengths of an image of this size."""
    if isinstance(outline, list):
        polygons = (isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in outline)
        return bool(outline) and all(polygons) and all(not math.isnan(_number(x)) for p in outline for x in p)
    if not isinstance(outline, dict) or outline.get("size") != list(size):
        return False
    counts = outline.get("counts")
    if isinstance(counts, list):
        return all(type(n) is int and n >= 0 for n in counts) and sum(counts) == size[0] * size[1]
    return isinstance(counts, str) and counts.isascii()


def draw_outline(outline: Any, size: Size) -> np.ndarray:
    """bool (H, W), the pixels of an object.

    Args:
        outline: For which `is_outline` is true.
        size: Height and width of the image in pixels.

    Raises:
        SampleError: The run lengths are broken.
    """
    from pycocotools import mask

    try:
        rle = outline
        if isinstance(outline, list):
            rle = mask.merge(mask.frPyObjects(outline, *size))
        elif isinstance(outline["counts"], list):
            rle = mask.frPyObjects(outline, *size)
        return mask.decode(rle).astype(bool)
    except ValueError as error:
        raise SampleError(f"broken run lengths of an outline: {one_line(error)}") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON: {one_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in COCO_LISTS):
        raise UserError(f"{file} is no COCO file: it must have the lists {', '.join(COCO_LISTS)}")
    return content


def _records(
    content: dict[str, Any], key: str, file: Path, faults: LabelFaults, **fields: type | tuple[type, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, entry) of a list in a COCO file; entries without the fields that they need are faults."""
    for number, entry in enumerate(content[key]):
        where = f"{file.name} {key}[{number}]"
        has = isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in fields.items())
        if has and not any(isinstance(entry[name], bool) for name in fields):
            yield where, entry
        else:
            faults.add(f"entry without {' and '.join(fields)}", where)


# ---- Pascal VOC


def find_voc(root: Path, split: str) -> Place | None:
    """Annotations/*.xml and JPEGImages/, with the names of a split in ImageSets/Main/SPLIT.txt; or SPLIT/*.xml beside
    their images."""
    images = root / "JPEGImages" if (root / "JPEGImages").is_dir() else root / "images"
    for name in split_names(split):
        names = root / "ImageSets" / "Main" / f"{name}.txt"
        if names.is_file() and (root / "Annotations").is_dir():
            return Place(names, images)
        if (found := _xml_place(root / name, root / name)) is not None:
            return found
    return None


def whole_voc(root: Path) -> Place | None:
    """XML files beside their images, or in Annotations/ with the images in JPEGImages/ or images/."""
    for labels in (root / "Annotations", root / "annotations", root / "labels", root / "images", root):
        if (found := _xml_place(labels, root / "JPEGImages", root / "images", labels, root)) is not None:
            return found
    return None


def _xml_place(labels: Path, *folders: Path) -> Place | None:
    """The XML files of a folder, and the first of other folders with images of the same names."""
    stems = {path.stem for path in labels.glob("*.xml")}
    for folder in folders:
        if stems and folder.is_dir() and any(Path(image).stem in stems for image in next(walk(folder)).images):
            return Place(labels, folder)
    return None


def read_voc(place: Place, names: list[str] | None, faults: LabelFaults) -> LabelSet:
    """Read the XML files of a split. Their corners count from 1, and the last pixel belongs to the box.

    Arguments and errors are those of `read_coco`. Without `names` the classes are those of the objects, sorted.
    """
    folder = place.labels if place.labels.is_dir() else place.labels.parents[2] / "Annotations"
    stems = [path.stem for path in sorted(folder.glob("*.xml"))] if place.labels.is_dir() else _lines(place.labels)
    stems = [line.split()[0] for line in stems if line.split()]  # lists of one class have a second column
    on_disk = sorted(os.listdir(place.images))
    files = {os.path.splitext(name)[0]: name for name in on_disk if name.lower().endswith(image_suffixes())}
    trees: list[tuple[str, ElementTree.Element, str]] = []
    for stem, count in Counter(stems).items():
        if count > 1:
            faults.add(TWICE, stem)
        path = folder / f"{stem}.xml"
        if stem not in files:
            faults.add(MISSING, str(place.images / stem))
            continue
        try:
            trees.append((path.name, ElementTree.parse(path).getroot(), str(place.images / files[stem])))
        except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:  # LookupError: of its encoding
            faults.add("label file that cannot be read", f"{path.name}: {one_line(error)}")
    if names is None:
        found = {(node.findtext("name") or "").strip() for _, tree, _ in trees for node in tree.iter("object")}
        names = sorted(found - {""})
    images = []
    for name, tree, path in trees:
        width, height = (_number(tree.findtext(f"size/{side}")) for side in ("width", "height"))
        stated = width >= 1 and height >= 1
        size = (int(height), int(width)) if stated else _read_size(path, faults)
        if size is None:
            continue
        objects = _Objects(name, size, faults)
        for number, node in enumerate(tree.iter("object")):
            where, called = f"{name} object {number}", (node.findtext("name") or "").strip()
            box = [_number(node.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
            if called not in names:
                faults.add(UNKNOWN, f"{where}: {called or 'no name'}")
                continue
            difficult = (node.findtext("difficult") or "0").strip() == "1"
            objects.add((box[0] - 1, box[1] - 1, *box[2:]), names.index(called), where, difficult)
        images.append(objects.annotated(path))
    return LabelSet(str(place.labels), names, images, list(range(1, len(names) + 1)), [])


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except ValueError as error:
        raise UserError(f"{file} is no UTF-8 text: {one_line(error)}") from error


# ---- YOLO


def find_yolo(root: Path, split: str) -> Place | None:
    """A data.yaml, or the folder that it is in. Its ``train``, ``val`` and ``test`` name folders or lists of images.

    Without one, the folders of a split beside a classes.txt.
    """
    file = root if root.suffix in (".yaml", ".yml") else next(iter(sorted(root.glob("data.y*ml"))), None)
    if file is None or not file.is_file():
        names = split_names(split)
        return _text_place(root, *(at for name in names for at in (root / "images" / name, root / name)))
    content = _yolo(file)
    given = next((content[name] for name in split_names(split) if content.get(name)), None)
    if given is None:
        return None
    if not isinstance(given, str):
        raise UserError(f"{file}: {split} must be one folder or list of images, got {given!r}")
    base = Path(file.parent, str(content.get("path") or ""))
    base = base if base.is_dir() else file.parent
    # some exports begin at a folder beside that of the file
    tried = [base / given, file.parent / given, file.parent / given.removeprefix("../")]
    return Place(file, next((path for path in tried if path.exists()), tried[0]))


def whole_yolo(root: Path) -> Place | None:
    """classes.txt, and text files beside the images, or in labels/ beside images/."""
    return _text_place(root, root / "images", root)


def _text_place(root: Path, *folders: Path) -> Place | None:
    """The classes.txt of a folder, and the first of other folders with images that have text files."""
    names = next((at for name in ("", "labels", "images") if (at := root / name / "classes.txt").is_file()), None)
    for folder in folders if names is not None else ():
        if folder.is_dir() and any(label_file_of(image).is_file() for at in walk(folder) for image in at.images):
            return Place(names, folder)
    return None


def read_yolo(place: Place, names: list[str] | None, faults: LabelFaults, masks: bool = False) -> LabelSet:
    """Read the text files beside the images: ``class x y width height``, the centre first, as shares of the image.

    A line with more numbers is an outline, ``class x y x y ...``: without `masks` its box is read, with `masks` its
    polygon, and then a box is a fault. An image without a text file has no objects. Arguments and errors are those of
    `read_coco`; `names` is not used, as data.yaml or classes.txt is the same for all splits.
    """
    names = _yolo_names(place.labels)
    if place.images.suffix == ".txt":
        files = [str(Path(place.images.parent, line.strip())) for line in _lines(place.images) if line.strip()]
    else:
        files = find_images(str(place.images))
    images = []
    for file, count in Counter(files).items():
        if count > 1:
            faults.add(TWICE, file)
        size = _read_size(file, faults)
        if size is None:
            continue
        labels = label_file_of(file)
        objects = _Objects(labels.name, size, faults)
        try:
            lines = labels.read_text(encoding="utf-8-sig").splitlines() if labels.is_file() else []
        except ValueError as error:
            faults.add("label file that cannot be read", f"{labels}: {one_line(error)}")
            continue
        for number, line in enumerate(lines, 1):
            if line.split():
                _yolo_object(line.split(), f"{labels.name} line {number}", len(names), objects, masks)
        images.append(objects.annotated(file))
    return LabelSet(str(place.labels), names, images, list(range(1, len(names) + 1)), [])


def label_file_of(image: str) -> Path:
    """YOLO's text file of an image: in ``labels`` in place of the last folder ``images``, else beside it."""
    beside = Path(image).with_suffix(".txt")
    *folders, name = beside.parts
    if "images" in folders and not beside.is_file():
        folders[-1 - folders[::-1].index("images")] = "labels"
    return Path(*folders, name)


def _yolo_object(words: list[str], where: str, classes: int, objects: _Objects, masks: bool) -> None:
    label, *numbers = map(_number, words)
    if len(numbers) < 4 or len(numbers) == 5 or (len(numbers) > 5 and len(numbers) % 2):
        objects.faults.add("line that is neither a box nor an outline", where)
        return
    if label not in range(classes):
        objects.faults.add(UNKNOWN, f"{where}: {words[0][:20]}")
        return
    height, width = objects.size
    outline = None
    if len(numbers) == 4 and masks:
        objects.faults.add("box where an outline is needed", where)
        return
    if len(numbers) == 4:
        x, y, w, h = numbers
        box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    else:
        xs, ys = np.array(numbers[0::2]), np.array(numbers[1::2])
        box = (xs.min(), ys.min(), xs.max(), ys.max())
        outline = [np.stack([xs * width, ys * height], axis=1).ravel().tolist()] if masks else None
    corners = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    objects.add(corners, int(label), where, outline=outline)


def _yolo(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is no YAML: {one_line(error)}") from error
    if not isinstance(content, dict) or "names" not in content:
        raise UserError(f"{file} is no data.yaml of YOLO: it must have names, the list of the classes")
    return content


def _yolo_names(file: Path) -> list[str]:
    text = file.suffix == ".txt"  # a name in each line
    names = [line.strip() for line in _lines(file) if line.strip()] if text else _yolo(file)["names"]
    if isinstance(names, dict):  # by number
        if set(names) != set(range(len(names))):
            raise UserError(f"{file}: names must be numbered from 0 without gaps, got {list(names)[:20]}")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or len({*map(str, names)}) < len(names):
        raise UserError(f"{file}: names must be a list of different class names, got {str(names)[:200]}")
    return [str(name) for name in names]


class Format(NamedTuple):
    """How the labels of a split, "train", "val" or "test", are found in a folder and read."""

    find: Callable[[Path, str], Place | None]  # None if there are none
    read: Callable[..., LabelSet] | None  # with the arguments of `read_coco`; None for masks
    layout: str  # what a folder with such labels has, in words
    whole: Callable[[Path], Place | None] = lambda root: None  # finds labels without splits, all for training

    def place(self, root: Path, split: str) -> Place | None:
        """Where the labels of a split are; None if there are none."""
        found = self.find(root, split)
        if found is None and split == "train" and not any(self.find(root, other) for other in ("val", "test")):
            return self.whole(root)
        return found


COCO = "a COCO file (train.json beside train/, annotations/instances_train*.json, or one JSON file)"
YOLO = "YOLO (data.yaml, or classes.txt, with text files of the images)"
VOC = "Pascal VOC (Annotations/ and JPEGImages/, or XML files beside the images)"
FORMATS = {
    "coco": Format(find_coco, read_coco, COCO, whole_coco),
    "voc": Format(find_voc, read_voc, VOC, whole_voc),
    "yolo": Format(find_yolo, read_yolo, YOLO, whole_yolo),
}


def recognise(root: str | os.PathLike, formats: Mapping[str, Format]) -> str:
    """The format of the labels in a folder, a key of `formats`.

    Raises:
        FileNotFoundError: There is none.
        UserError: There are two.
    """
    root = Path(root)
    found = [name for name, form in formats.items() if form.find(root, "train") is not None]
    found = found or [name for name, form in formats.items() if form.place(root, "train") is not None]
    if not found:
        layouts = ", or ".join(form.layout for form in formats.values())
        raise FileNotFoundError(f"no training labels in {root}, which {contents(root)}: it must have {layouts}")
    if len(found) > 1:
        raise UserError(
            f"{root} has labels in the formats {' and '.join(found)}: say which one as format (--data.format)"
        )
    return found[0]


class LabelSource:
    """Base of the sources of (image, truth) of the images in a `LabelSet`."""

    def __init__(self, labels: LabelSet) -> None:
        self.labels, self.where = labels, labels.where

    def __len__(self) -> int:
        return len(self.labels.images)

    def sample_file(self, index: int) -> str:
        return self.labels.images[index].file

    def presence(self) -> np.ndarray:
        """bool (n, K), whether an image has a class."""
        return self.labels.counts > 0


def in_words(names: Sequence[str], counts: np.ndarray, what: str) -> str:
    """How many labels of each class there are, and what lacks, for the line about a split.

    Args:
        names: Of the K classes.
        counts: (n, K), of each image.
        what: The labels, in the plural.
    """
    each = dict(zip(names, counts.sum(0).astype(int).tolist(), strict=True))
    text = f"; {sum(each.values())} {what} ({listed([f'{name} {count}' for name, count in each.items() if count], 20)})"
    if without := int((counts.sum(1) == 0).sum()):
        text += f"; {without} images without {what}"
    never = [name for name, count in each.items() if not count]
    return text + (f"; never occur: {listed(never)}" if never else "")
