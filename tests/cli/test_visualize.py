"""`luna-vision visualize`: pictures for what can be drawn, one line for what cannot."""

import os

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from luna_vision.cli.common import run_command
from luna_vision.cli.visualize import main
from luna_vision.models import LunaVit
from luna_vision.visualize import pictures

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 57, 3), dtype=np.uint8)
SMALL = ["--model", "test_luna_vit", "--layers", "-1", "--top", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(IMAGE).save("a.png")
    return tmp_path


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main([*words]))
    return end.value.code


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are made, as (function, arguments)."""
    calls = []
    for name in ("plot_memory", "plot_features"):
        true = getattr(pictures, name)
        monkeypatch.setattr(pictures, name, lambda *a, _n=name, _t=true, **k: calls.append((_n, a, k)) or _t(*a, **k))
    return calls


def test_one_picture(drawn, capsys):
    assert run("a.png", *SMALL, "--out", "new/picture.png") == 0
    out, err = capsys.readouterr()
    assert out == "new/picture.png\n"
    assert "RANDOM WEIGHTS" in err
    assert Image.open("new/picture.png").width > 800
    ((name, (_, seen, *_, colors), options),) = drawn
    assert name == "plot_memory" and options["warning"].startswith("RANDOM WEIGHTS")
    assert list(colors) == [3]  # features are drawn, too
    np.testing.assert_array_equal(seen.picture, IMAGE)


def test_weights_of_a_file_are_not_called_random(drawn, capsys):
    torch.manual_seed(0)
    save_file(timm.create_model("test_luna_vit", num_classes=5).state_dict(), "best.safetensors")
    assert run("a.png", *SMALL, "--checkpoint", "best.safetensors") == 0  # the head is of no use
    assert drawn[0][2]["warning"] == "" and "RANDOM" not in capsys.readouterr().err


def test_a_picture_for_each_image_in_a_folder(folder, capsys):
    (folder / "photos").mkdir()
    Image.fromarray(IMAGE[:20]).save("photos/b.jpg")
    Image.fromarray(IMAGE[:30]).save("photos/a.png")
    assert run("a.png", "photos", *SMALL, "--kind", "memory", "--out", "out") == 0
    assert capsys.readouterr().out.split() == ["out/a.png", "out/a-2.png", "out/b.png"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a-2.png", "a.png", "b.png"]
    assert run("a.png", *SMALL, "--kind", "memory", "--out", "out") == 2
    assert "error: out/a.png exists: give --overwrite" in capsys.readouterr().err
    assert run("a.png", *SMALL, "--kind", "memory", "--out", "out", "--overwrite") == 0


def test_hidden_names_are_skipped_and_counted(folder, capsys):
    (folder / "photos" / ".Trash-0").mkdir(parents=True)
    Image.fromarray(IMAGE[:20]).save("photos/b.jpg")
    for name in (".Trash-0/a.png", "._b.jpg"):
        (folder / "photos" / name).write_bytes(b"x")
    os.mkfifo("photos/pipe.png")
    assert run("photos", *SMALL, "--kind", "memory", "--out", "out") == 0
    out, err = capsys.readouterr()
    assert out.split() == ["out/b.png"]
    assert "photos; skipped 2 hidden and 1 other names (1 not a file)" in err.splitlines()


def test_names_differ_on_any_file_system():
    """Some take A.png for a.png; and of many images of one name none is compared with all others."""
    files = ["x/a.png", "y/A.jpg", "z/a-2.png", "z/a.png", "Ä.png", "x/ä.png"]
    assert pictures.picture_names(files) == ["a.png", "A-2.png", "a-2-2.png", "a-3.png", "Ä.png", "ä-2.png"]
    assert pictures.picture_names([f"{i}/1.jpg" for i in range(20_000)])[-1] == "1-20000.png"


def test_images_that_cannot_be_read_are_named_and_the_others_kept(folder, capsys):
    (folder / "empty.png").touch()
    (folder / "words.png").write_text("no image")
    for kind in ("memory", "features", "both"):
        assert run("empty.png", "a.png", "gone.png", "words.png", *SMALL, "--kind", kind, "--out", kind) == 1
        out, err = capsys.readouterr()
        assert out.split() == [f"{kind}/a.png"]
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 3
        for name in ("empty.png", "gone.png", "words.png"):
            assert sum(name in line for line in lines) == 1


@pytest.mark.parametrize("kind", ["memory", "features"])
def test_an_image_without_room_is_named_and_the_others_kept(kind, monkeypatch, capsys):
    Image.fromarray(IMAGE).save("b.png")
    see = pictures.view

    def no_room(model, image, **options):
        if isinstance(image, str) and image == "a.png":
            raise MemoryError
        return see(model, image, **options)

    monkeypatch.setattr(pictures, "view", no_room)
    assert run("a.png", "b.png", *SMALL, "--kind", kind, "--out", kind) == 1
    out, err = capsys.readouterr()
    assert out == f"{kind}/b.png\n"
    assert [line for line in err.splitlines() if line.startswith("error: ")] == ["error: a.png: MemoryError"]


@pytest.mark.parametrize("kind", ["memory", "features"])
@pytest.mark.parametrize("raised", [torch.OutOfMemoryError("CUDA out of memory"), KeyError("a bug")])
def test_what_is_not_about_an_image_stops_with_its_traceback(raised, kind, monkeypatch, capsys):
    for name in "bc":
        Image.fromarray(IMAGE).save(f"{name}.png")
    method = {"memory": "get_attention_maps", "features": "forward_intermediates"}[kind]
    work, left = getattr(LunaVit, method), iter(range(100))

    def fail(self, x, *args, **kwargs):
        if next(left) > 1:
            raise raised
        return work(self, x, *args, **kwargs)

    monkeypatch.setattr(LunaVit, method, fail)
    with pytest.raises(type(raised)):
        main(["a.png", "b.png", "c.png", *SMALL, "--kind", kind, "--out", kind])
    assert "error: " not in capsys.readouterr().err


def test_a_full_disk_stops_in_one_line(monkeypatch, capsys):
    for name in "bc":
        Image.fromarray(IMAGE).save(f"{name}.png")
    save = Figure.savefig

    def full(self, target, **options):
        if ".b." in target.name:
            raise OSError(28, "No space left on device")
        save(self, target, **options)

    monkeypatch.setattr(Figure, "savefig", full)
    assert run("a.png", "b.png", "c.png", *SMALL, "--out", "out") == 2
    out, err = capsys.readouterr()
    assert out == "out/a.png\n" and err.endswith("error: cannot write out/b.png: No space left on device\n")


def test_names_that_are_no_utf8(folder, drawn, capsys):
    os.rename("a.png", os.fsdecode(b"a\xff.png"))
    (folder / os.fsdecode(b"empty\xff.png")).touch()
    assert run(*sorted(os.listdir()), *SMALL, "--out", "out") == 1
    out, err = capsys.readouterr()
    assert out == "out/a\\xff.png\n" and r"error: image file empty\xff.png is empty" in err
    assert drawn[0][1][1].name == r"a\xff.png"


def test_not_a_single_image(folder, capsys):
    (folder / "empty.png").touch()
    assert run("empty.png", *SMALL, "--out", "x.png") == 2
    assert [line for line in capsys.readouterr().err.splitlines() if "error" in line] == [
        "error: image file empty.png is empty (0 bytes)"
    ]
    assert run("empty.png", "gone.png", *SMALL) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if "error" in line]) == 2
    assert not list(folder.glob("**/x.png"))


def test_features_of_a_model_without_memory(drawn):
    assert run("a.png", "--model", "test_vit", "--out", "x.png") == 0
    assert run("a.png", "--model", "test_luna_vit", "--model-args", "mixer=softmax", "--kind", "features") == 0
    assert [name for name, *_ in drawn] == ["plot_features"] * 2


def test_what_the_model_sees(drawn):
    assert run("a.png", *SMALL, "--kind", "memory", "--max-size", "30", "--mean", "0", "--std", "1", "--head", "1") == 0
    ((_, (_, seen, _, slots, head, _), _),) = drawn
    assert seen.pixels.shape == (1, 3, 21, 30) and seen.pixels.min() >= 0 and seen.pixels.max() <= 1
    assert (slots, head) == (1, 1)


@pytest.mark.parametrize(
    "words, message",
    [
        (["gone.png"], "there is no image file or folder gone.png"),
        (["a.png", "--out", "a.png"], "would overwrite an image"),
        (["a.png", "--out", "."], "would overwrite an image"),
        (["a.png", "--out", "x.bmp"], "the format must be one of"),
        (["a.png", "--out", "a.png/x.png"], "cannot write into a.png"),
        (["a.png", "a.png", "b.png", "--out", "x.png"], "is one file, for several images: give a folder"),
        (["a.png", "--layers", "4"], "layer 4 does not exist: the model has 4, 0 to 3"),
        (["a.png", "--slots", "1", "8"], "slot 8 does not exist: the memory has 8, 0 to 7"),
        (["a.png", "--slots", "1", "--top", "2"], "not allowed with"),
        (["a.png", "--head", "2"], "head 2 does not exist"),
        (["a.png", "--max-size", "0"], "must be a whole number of at least 1, got '0'"),
        (["a.png", "--mean", "0.5", "0.5"], "mean must be 1 or 3 finite numbers"),
        (["a.png", "--std", "0"], "std must be 1 or 3 finite numbers, above 0"),
        (["a.png", "--kind", "memory", "--model-args", "mixer=softmax"], "this model has no memory to show"),
        (["a.png", "--kind", "both", "--model", "test_vit"], "this model has no memory to show"),
        (["a.png", "--model-args", "in_chans=4"], "has 3 bands, and the model takes 4"),
        (["a.png", "--kind", "features", "--slots", "1"], "only features are drawn"),
        (["a.png", "--model", "test_vit", "--head", "0"], "only features are drawn"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(words, message, capsys, folder):
    model = [] if "--model" in words else ["--model", "test_luna_vit"]
    assert run(*words, *model) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "WARNING" not in line]
    assert line.startswith("error: ") and message in line
    assert out == "" and [path.name for path in folder.iterdir()] == ["a.png"]


def test_a_folder_that_cannot_be_written_is_refused_before_work(folder, monkeypatch, capsys):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("luna_vision.models.factory.load_model", lambda *_, **__: pytest.fail("work was begun"))
    assert run("a.png", *SMALL, "--out", "x.png") == 2
    assert capsys.readouterr().err == "error: cannot write into .: Permission denied\n"
