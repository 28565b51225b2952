"""Which image files there are in a folder: the one walk of all commands."""

import csv
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..utils.errors import UserError, one_line
from ..utils.text import csv_separator, printable
from .pillow import has_heif

# All that Pillow opens by itself, the most frequent first, .npy, and what slide scanners call TIFF. The content decides
# how a file is read; of an animation, that is the first frame.
IMG_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"),
    *(".apng", ".avif", ".avifs", ".bif", ".blp", ".btf", ".bw", ".cur", ".dcx", ".dds", ".dib", ".fit", ".fits"),
    *(".flc", ".fli", ".ftc", ".ftu", ".gbr", ".icb", ".icns", ".ico", ".im", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc"),
    *(".jpe", ".jpf", ".jpx", ".mpo", ".msp", ".ndpi", ".npy", ".pbm", ".pcd", ".pcx", ".pfm", ".pnm", ".psd", ".pxr"),
    *(".qoi", ".qptiff", ".ras", ".rgb", ".rgba", ".scn", ".sgi", ".svs", ".tga", ".vda", ".vst", ".xbm", ".xpm"),
)
HEIF_EXTENSIONS = (".heic", ".heif", ".hif")  # where pillow-heif is installed
# slides that are more than one file, and arrays
LARGE_EXTENSIONS = (".mrxs", ".svslide", ".vms", ".vmu", ".zarr.zip")
ZARR = ".zarr"  # a folder
HIDDEN = ("__MACOSX", "@eaDir")  # what macOS adds to archives, and a NAS to folders, beside names that begin with a dot
VAL_NAMES = ("val", "validation", "valid")
# what a line of text cannot hold: control characters, line ends, and bytes that are no UTF-8
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Folder(NamedTuple):
    """What is in one folder.

    Attributes:
        path: As the walk has come to it.
        images: Paths of the image files, sorted. Links to nothing are among them: whoever reads one says what it lacks.
        folders: Names of the folders, sorted.
        hidden: How many names were skipped because they are hidden.
        others: How many were skipped that are neither, by suffix: other files, pipes, sockets, devices, links to a
            folder above.
        dangling: Those of the images that are links to nothing.
    """

    path: str
    images: list[str]
    folders: list[str]
    hidden: int
    others: Counter[str]
    dangling: list[str]


def walk(
    root: str | os.PathLike, on_error: Callable[[OSError], object] | None = None, large: bool = False
) -> Iterator[Folder]:
    """A folder, and then all folders in it, in any order. Links are followed, and each folder is visited once.

    Args:
        root: The folder.
        on_error: Is told of each folder that cannot be read; without it, the first one is raised.
        large: Images are also what only `luna_vision.images.open_image` reads, such as a folder of zarr.

    Raises:
        OSError: A folder cannot be read.
    """
    folders, links, seen, suffixes = [os.fspath(root)], [], set(), image_suffixes()
    suffixes += LARGE_EXTENSIONS * large
    while folders or links:
        path = (folders or links).pop()  # by way of a link only what is not found otherwise
        place = os.path.realpath(path)
        if place in seen:
            continue
        seen.add(place)
        try:
            with os.scandir(path) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        here = Folder(path, [], [], 0, Counter(), [])
        hidden = 0
        for entry in found:
            kind = "hidden" if entry.name.startswith(".") or entry.name in HIDDEN else _kind(entry)
            hidden += kind == "hidden"
            if large and kind == "folder" and entry.name.lower().endswith(ZARR):
                here.images.append(entry.path)
            elif kind == "folder" and not (entry.is_symlink() and _is_above(entry.path, place)):
                here.folders.append(entry.name)
                (links if entry.is_symlink() else folders).append(entry.path)
            elif kind in ("file", "nothing") and entry.name.lower().endswith(suffixes):
                here.images.append(entry.path)
                here.dangling.extend([entry.path] * (kind == "nothing"))
            elif kind != "hidden":
                here.others[_suffix(entry.name) if kind in ("file", "nothing") else "not a file"] += 1
        yield here._replace(hidden=hidden)


def image_suffixes() -> tuple[str, ...]:
    """What the names of image files end in, in lower case."""
    return IMG_EXTENSIONS + (HEIF_EXTENSIONS if has_heif() else ())


def _suffix(name: str) -> str:
    """The suffix of a file in lower case, printable, and not longer than suffixes are."""
    suffix = printable(os.path.splitext(name)[1].lower())
    return suffix if 1 < len(suffix) <= 12 else "without suffix"


def _kind(entry: os.DirEntry) -> str:
    """Of what a name stands for, links followed: "folder", "file", "nothing", or "other" such as a pipe."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else "other" if os.path.exists(entry.path) else "nothing"
    except OSError:  # a link to itself, or to where nobody may look
        return "nothing"


def _is_above(link: str, place: str) -> bool:
    """Whether a link leads to the folder ``place`` or one that this lies in."""
    target = os.path.realpath(link)
    return os.path.commonpath([target, place]) == target


def skipped(found: Sequence[Folder]) -> str:
    """What a walk has left out, in words that follow others; empty if that is nothing."""
    hidden, others = sum(at.hidden for at in found), sum((at.others for at in found), Counter())
    if not hidden and not others:
        return ""
    kinds = listed([f"{count} {suffix}" for suffix, count in sorted(others.items(), key=lambda at: (-at[1], at[0]))])
    heif = "; HEIC takes pillow-heif: pip install 'luna-vision[heif]'" if set(HEIF_EXTENSIONS) & set(others) else ""
    return f"; skipped {hidden} hidden and {others.total()} other names{f' ({kinds}{heif})' if others else ''}"


def contents(path: str | os.PathLike) -> str:
    """What is in a folder, in words that follow its name, for an error about what is not."""
    if not os.path.isdir(path):
        return "is a file" if os.path.exists(path) else "is not there"
    found = next(walk(path))
    files = found.others + Counter(map(_suffix, found.images))
    parts = [f"{count} {suffix}" for suffix, count in files.most_common()]
    if found.folders:
        parts.insert(0, f"the folders {listed(list(map(printable, found.folders)), 5)}")
    return f"has {listed(parts)}" if parts else "is empty"


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def find_images(
    path: str | Sequence[str],
    on_error: Callable[[OSError], object] | None = None,
    say: Callable[[str], object] = lambda line: None,
    large: bool = False,
) -> list[str]:
    """Image files named by a file, a folder (searched with all folders in it, sorted) or a list of these.

    In folders, hidden names are skipped, and so is what is no image file by its name or no file at all.

    Args:
        path: The file, folder or list.
        on_error: Is told of each folder inside of these that cannot be read; without it, the first one is raised.
        say: Is told, in a line for each folder, what was skipped.
        large: As in `walk`.

    Raises:
        FileNotFoundError: A path does not exist, or is neither a file nor a folder.
        OSError: A folder cannot be read.
        ValueError: There is not a single image.
    """
    roots = [path] if isinstance(path, str | os.PathLike) else list(path)
    files: list[str] = []
    left_out: list[str] = []
    for root in map(Path, roots):
        if root.is_dir() and not (large and root.name.lower().endswith(ZARR)):
            found = list(walk(root, on_error, large))
            files += sorted(image for folder in found for image in folder.images)
            if words := skipped(found):
                say(f"{root}{words}")
                left_out.append(words)
        elif root.is_file() or root.is_dir():
            files.append(str(root))
        else:
            raise FileNotFoundError(f"there is no image file or folder {root}")
    files = list(dict.fromkeys(files))  # a file may also lie in a folder that was named
    if not files:
        where = ", ".join(map(str, roots)) or "an empty list"
        raise ValueError(f"no images ({listed(IMG_EXTENSIONS)} suffixes) in {where}{'; '.join(left_out)}")
    return files


def class_folders(folder: str | os.PathLike) -> list[str]:
    """Names of the classes in folder/<class>/<images>, sorted.

    Raises:
        ValueError: There are none, or one has a name that no list of names could hold.
        OSError: The folder cannot be read.
    """
    names = next(walk(folder)).folders
    if not names:
        raise ValueError(f"no class folders in {folder}: expected {folder}/<class>/<images>")
    check_class_names(names, folder)
    return names


def check_class_names(names: Iterable[str], folder: str | os.PathLike) -> None:
    """Raise a ValueError where the name of a class is no line of UTF-8 text."""
    for name in names:
        if UNPRINTABLE.search(name):
            raise ValueError(f"the class folder {name!r} in {folder} must be renamed: its name is no line of UTF-8")


def split_folder(root: str | os.PathLike, split: str) -> Path | None:
    """The folder of "train", "val" or "test" in ``root``, None if there is none; that of "val" has one of three names.

    Raises:
        ValueError: There are two of them.
        NotADirectoryError: It is no folder, such as a link to nothing.
    """
    names = VAL_NAMES if split == "val" else (split,)
    found = [path for path in (Path(root, name) for name in names) if os.path.lexists(path)]
    if len(found) > 1:
        raise ValueError(f"{' and '.join(map(str, found))} are both for validation: rename or remove one of them")
    if found and not found[0].is_dir():
        raise NotADirectoryError(f"{found[0]} is no folder, or a link to none: it must contain <class>/<images>")
    return found[0] if found else None


def unused_folders(root: str | os.PathLike, used: Iterable[Path | None]) -> list[str]:
    """Names of the folders in ``root`` that are none of those, hidden ones not counted."""
    used = [path for path in used if path is not None]
    return [name for name in next(walk(root)).folders if Path(root, name) not in used]


def find_files(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    say: Callable[[str], object] = lambda line: None,
    large: bool = False,
) -> tuple[list[str], list[tuple[str, str]]]:
    """All image files, each once, and (path, reason) of what is not there, has no images or cannot be searched.

    `say` is told, in a line for each folder, what was skipped; `large` is that of `walk`.

    Raises:
        ValueError, OSError: There is not a single image.
    """
    files: dict[str, str] = {}
    errors: list[tuple[str, Exception]] = []
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        try:
            for file in find_images(path, lambda error: errors.append((error.filename, error)), say, large):
                files.setdefault(os.path.abspath(file), file)
        except (ValueError, OSError) as error:
            errors.append((os.fspath(path), error))
    if not files:
        raise errors[0][1] if errors else ValueError("there are no images: the list of paths is empty")
    return list(files.values()), [(path, printable(one_line(error))) for path, error in errors]


MASK_WORDS = ("otsu", "valid")  # masks that are no files


class Listed(NamedTuple):
    """A line of a list of large images.

    Attributes:
        path: The image.
        mask: Its own mask, if it has one, see `luna_vision.images.foreground.patch_mask`.
        region: Its own rectangle, if it has one: x, y, width and height.
    """

    path: str
    mask: str | None = None
    region: tuple[float, ...] | None = None


def read_list(path: str | os.PathLike) -> list[Listed]:
    """The lines of a CSV file with a column "path" and, if wanted, "mask" and "region" ("X Y WIDTH HEIGHT").

    Paths are relative to the folder of the file; "otsu" and "valid" are masks, too. Empty cells are none, rows without
    any are skipped, and other columns are for others.

    Raises:
        UserError: It is no such file.
        OSError: It cannot be read.
    """
    path = Path(path)
    found = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = file.readlines()
            reader = csv.reader(lines, delimiter=csv_separator(lines), strict=True)
            rows = ([cell.strip() for cell in row] for row in reader)
            header = next(rows, [])
            if "path" not in header:
                raise UserError(f"{path} must have a column path, got {', '.join(header) or 'nothing'}")
            for row in filter(any, rows):
                where = f"{path} line {reader.line_num}"
                if len(row) != len(header):
                    raise UserError(
                        f"{where} has {len(row)} cells and the header {len(header)}: a cell with a comma takes quotes"
                    )
                cells = dict.fromkeys(Listed._fields, "") | dict(zip(header, row, strict=True))
                if not cells["path"]:
                    raise UserError(f"{where} has no path")
                mask = cells["mask"] or None
                if mask is not None and mask not in MASK_WORDS:
                    mask = str(path.parent / mask)
                region = region_of(cells["region"], where) if cells["region"] else None
                found.append(Listed(str(path.parent / cells["path"]), mask, region))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV file: {one_line(error)}") from error
    if not found:
        raise UserError(f"{path} lists no images")
    return found


def region_text(region: Iterable[float]) -> str:
    """What `region_of` reads: all digits, as those of coordinates on a map are many."""
    return " ".join(f"{number:.15g}" for number in region)


def region_of(text: str, where: str) -> tuple[float, ...]:
    """The four numbers of "X Y WIDTH HEIGHT"; a UserError about `where` if they are none."""
    try:
        numbers = tuple(map(float, re.split(r"[\s,;]+", text)))
    except ValueError:
        numbers = ()
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise UserError(f"{where}: region must be X Y WIDTH HEIGHT, got {text!r}")
    return numbers
