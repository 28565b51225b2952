"""How files are written: whole or not at all, through no link, with the usual access, and errors that name them."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from luna_vision.utils.files import new_file, new_folder, open_own, remove_leftovers, remove_own, write_json, write_text


@pytest.fixture
def umask():
    """027, as on machines where a group may read and nobody else."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_what_is_written(tmp_path, umask):
    write_text(tmp_path / "new" / "a.txt", "größer\n")
    write_json(tmp_path / "a.json", {"a": [1]})
    with new_file(tmp_path / "a.npy") as file:
        np.save(file, np.arange(3))
    with new_file(tmp_path / "a.safetensors") as file:  # by name, and safetensors puts another file there
        save_file({"a": torch.arange(3)}, file.name)
    with new_folder(tmp_path / "folder") as folder:
        (folder / "a.txt").write_text("a")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "größer\n"
    assert (tmp_path / "a.json").read_text() == '{\n "a": [\n  1\n ]\n}\n'
    assert np.load(tmp_path / "a.npy").tolist() == load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2]
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path
    names = ["a.json", "a.npy", "a.safetensors", "folder", "new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ZeroDivisionError(), KeyboardInterrupt()])
def test_what_is_not_finished_is_not_there(error, tmp_path):
    write_text(tmp_path / "a.txt", "old")
    for call in (new_file, new_folder):
        with pytest.raises(type(error)) as raised, call(tmp_path / ("a.txt" if call is new_file else "folder")) as new:
            Path(new.name if call is new_file else new / "b").write_bytes(b"half")
            raise error
        if isinstance(error, OSError):
            assert str(raised.value).startswith(f"cannot write {tmp_path}/") and "No space left" in str(raised.value)
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_errors_about_other_files_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.txt"), new_file(tmp_path / "a.txt"):
        (tmp_path / "gone.txt").read_text()


def test_only_files_are_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for name in ("folder", "pipe", "file/a.txt"):
        with pytest.raises(OSError, match=f"cannot write .*{name}"):
            write_text(tmp_path / name, "new")
    assert (tmp_path / "folder").is_dir() and (tmp_path / "pipe").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe"]


def test_no_link_is_followed(tmp_path, monkeypatch):
    """Whatever is planted at the name that is about to be written to; it cannot be guessed, so it is given here."""
    monkeypatch.setattr("secrets.token_hex", lambda _: "0123abcd")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".a.0123abcd.partial.txt").symlink_to(victim)
    with pytest.raises(OSError, match="cannot write .*a.txt: File exists"):
        write_text(tmp_path / "a.txt", "new")
    (tmp_path / "b.txt").symlink_to(victim)
    write_text(tmp_path / "b.txt", "new")  # takes the place of the link
    (tmp_path / "c").symlink_to(victim)
    with pytest.raises(OSError):
        open_own(tmp_path / "c", keep=True)
    open_own(tmp_path / "c", keep=False).close()
    assert victim.read_text() == "precious" and (tmp_path / "b.txt").read_text() == "new"
    assert not (tmp_path / "b.txt").is_symlink() and not (tmp_path / "c").is_symlink()


def test_two_writers_of_one_file(tmp_path):
    with new_file(tmp_path / "a.txt") as one, new_file(tmp_path / "a.txt") as other:
        one.write(b"one")
        other.write(b"other")
    assert (tmp_path / "a.txt").read_bytes() == b"one" and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_that_is_there_gets_the_files(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("old", "both"):
        (tmp_path / "folder" / name).write_text("old")
    with new_folder(tmp_path / "folder") as folder:
        for name in ("both", "new"):
            (folder / name).write_text("new")
    found = {path.name: path.read_text() for path in (tmp_path / "folder").iterdir()}
    assert found == {"old": "old", "both": "new", "new": "new"}


def test_only_what_is_known_is_removed(tmp_path):
    folder = tmp_path / "folder"
    remove_own(folder, "a|b/c")  # there is none
    (folder / "b").mkdir(parents=True)
    (folder / "a").touch()
    (folder / "b" / "c").touch()
    for path in (folder / "d", folder / "b" / "a"):
        path.touch()
        with pytest.raises(OSError, match=f"{path} is not of this package"):
            remove_own(folder, "a|b/c")
        assert (folder / "a").exists() and (folder / "b" / "c").exists()
        path.unlink()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(OSError, match="link is not of this package"):
        remove_own(tmp_path / "link", "a|b/c")
    remove_own(folder, "a|b/c")
    assert os.listdir(tmp_path) == ["link"]


def test_what_a_killed_process_leaves_is_removed(tmp_path):
    for path in (tmp_path / "a.ckpt", tmp_path / "folder"):
        if (child := os.fork()) == 0:
            with new_file(path) if path.suffix else new_folder(path):
                os._exit(0)
        os.waitpid(child, 0)
    (tmp_path / ".mine.partial").touch()
    assert len(list(tmp_path.iterdir())) == 3
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [".mine.partial"]
