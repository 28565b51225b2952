"""Finding images: what a folder of images may hold besides images."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from luna_vision.images import class_folders, find_images, split_folder


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(root: Path, **options) -> list[str]:
    return [os.path.relpath(path, root) for path in find_images(root, **options)]


def test_hidden_names_are_skipped_and_counted(tmp_path: Path):
    touch(tmp_path / "a.png", tmp_path / "b" / "c.JPG")
    touch(tmp_path / ".DS_Store", tmp_path / "._a.jpg", tmp_path / "b" / ".ipynb_checkpoints" / "c.jpg")
    touch(tmp_path / "__MACOSX" / "a.png", tmp_path / ".Trash-0" / "files" / "old.png")
    touch(tmp_path / "notes.txt", tmp_path / "b" / "labels.csv")
    said: list[str] = []
    assert names(tmp_path, say=said.append) == ["a.png", "b/c.JPG"]
    assert said == [f"{tmp_path}; skipped 5 hidden and 2 other names (1 .csv, 1 .txt)"]
    assert find_images(tmp_path / ".Trash-0" / "files") == [
        str(tmp_path / ".Trash-0" / "files" / "old.png")
    ]  # asked for
    assert len(find_images([str(tmp_path), str(tmp_path / "a.png")])) == 2


def test_only_regular_files_are_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    touch(tmp_path / "elsewhere" / "photo", tmp_path / "photos" / "a.png")
    os.mkfifo("photos/pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("photos/socket.png")
        Path("photos/null.png").symlink_to("/dev/null")
        Path("photos/link.png").symlink_to("../elsewhere/photo")
        said: list[str] = []
        assert names(Path("photos"), say=said.append) == ["a.png", "link.png"]
    assert said == ["photos; skipped 0 hidden and 3 other names (3 not a file)"]
    with pytest.raises(FileNotFoundError, match="photos/pipe.png"):
        find_images("photos/pipe.png")


def test_links_to_nothing_are_kept_for_whoever_reads_them(tmp_path: Path):
    (tmp_path / "gone.png").symlink_to("nothing.png")
    (tmp_path / "round.png").symlink_to("round.png")
    (tmp_path / "gone").symlink_to("nothing")
    assert names(tmp_path) == ["gone.png", "round.png"]


@pytest.mark.timeout(60)
def test_links_in_circles_end(tmp_path: Path):
    root = tmp_path / "photos"
    for i in range(12):  # each leads to all others: there are 12! ways without a circle
        touch(root / str(i) / f"{i}.png")
        for j in range(12):
            (root / str(i) / f"to{j}").symlink_to(root / str(j))
    for name in ("here", "above"):
        (root / name).symlink_to(root if name == "here" else tmp_path)
    touch(tmp_path / "other" / "no.png")
    assert names(root) == sorted(f"{i}/{i}.png" for i in range(12))
    assert class_folders(root) == sorted(map(str, range(12)))


def test_links_to_folders_are_followed(tmp_path: Path):
    touch(tmp_path / "elsewhere" / "cat" / "a.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    assert names(tmp_path / "photos") == ["cat/a.png"]
    assert class_folders(tmp_path / "photos") == ["cat"]


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines", b"\x1b[31mred"])
def test_classes_whose_names_are_no_text_are_named(name: bytes, tmp_path: Path):
    touch(tmp_path / "ünï cödé 写真" / os.fsdecode(b"caf\xe9.png"))  # what files are called does not matter
    assert class_folders(tmp_path) == ["ünï cödé 写真"] and len(find_images(tmp_path)) == 1
    (tmp_path / os.fsdecode(name)).mkdir()
    with pytest.raises(ValueError) as caught:
        class_folders(tmp_path)
    assert repr(os.fsdecode(name)) in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_the_folder_of_a_split(name: str, tmp_path: Path):
    assert split_folder(tmp_path, "val") is None
    (tmp_path / name).mkdir()
    assert split_folder(tmp_path, "val") == tmp_path / name
    (tmp_path / ("valid" if name == "val" else "val")).symlink_to("nothing")
    with pytest.raises(ValueError, match="val.* and .*val"):
        split_folder(tmp_path, "val")


def test_a_split_that_is_no_folder_is_not_taken_for_none(tmp_path: Path):
    (tmp_path / "test").touch()
    (tmp_path / "val").symlink_to("/not/mounted/val")
    for split in ("val", "test"):
        with pytest.raises(NotADirectoryError, match=f"{split} is no folder"):
            split_folder(tmp_path, split)


def test_neither_lightning_nor_albumentations_is_needed():
    code = "import sys; sys.modules.update(lightning=None, albumentations=None); import luna_vision.images"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_all_that_pillow_opens_by_itself_is_an_image(tmp_path: Path):
    from PIL import Image

    from luna_vision.images.pillow import PROGRAMS

    Image.init()
    data = ("BUFR", "GRIB", "HDF5", "IPTC", "MPEG")  # which Pillow recognises, and does not draw
    suffixes = [s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in data]
    for suffix in suffixes:
        touch(tmp_path / f"a{suffix}")
    drawn = {s for s in suffixes if Image.registered_extensions()[s] in PROGRAMS}
    found = {os.path.splitext(name)[1] for name in names(tmp_path)}
    assert set(suffixes) - drawn - {".heic", ".heif", ".hif", ".heics", ".heifs"} <= found and not drawn & found


def test_what_is_skipped_is_counted_by_suffix(tmp_path: Path):
    touch(tmp_path / "a.png", *(tmp_path / name for name in ("1.xml", "2.XML", "b" * 40, "c.\x1b[31m", "d.eps")))
    said: list[str] = []
    names(tmp_path, say=said.append)
    (line,) = said
    assert "5 other names (2 .xml, " in line and "1 .eps" in line and "1 without suffix" in line and line.isprintable()
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="no images .*5 other names .*2 .xml"):
        find_images(tmp_path)


def test_heic_where_its_library_is(tmp_path: Path):
    heif = pytest.importorskip("pillow_heif")
    import numpy as np
    from PIL import Image

    from luna_vision.images import open_image
    from luna_vision.images.decode import read_image

    picture = Image.fromarray(np.full((40, 60, 3), (200, 30, 60), np.uint8))
    heif.from_pillow(picture).save(tmp_path / "a.heic", quality=90)
    (path,) = find_images(tmp_path)
    np.testing.assert_allclose(np.asarray(read_image(path)), np.asarray(picture), atol=4)
    np.testing.assert_array_equal(open_image(path)[0:40], np.asarray(read_image(path)))
