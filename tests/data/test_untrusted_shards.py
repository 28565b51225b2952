"""Shards from strangers: what they name is not imported or opened elsewhere, and nothing is read that is not needed."""

import io
import json
import os
import shutil
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from luna_vision.data import LitDataDataModule, SampleError, WebDatasetDataModule
from luna_vision.data import webdataset_module as tars
from luna_vision.data.convert import convert

pytestmark = pytest.mark.filterwarnings("ignore:An item was larger")
SMALL = {"img_size": 8, "batch_size": 2, "num_workers": 0, "val_fraction": 0.0, "drop_last": False}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(("cat", "dog")):
        (root / "train" / name).mkdir(parents=True)
        Image.fromarray(np.full((9, 9, 3), i, np.uint8)).save(root / "train" / name / "0.png")
    return root


# ---- LitData


@pytest.fixture
def index(photos: Path, tmp_path: Path) -> Callable[[Callable], Path]:
    """Makes a folder of LitData's whose index a function has changed."""

    def make(change: Callable[[dict], object]) -> Path:
        shutil.rmtree(tmp_path / "lit", ignore_errors=True)
        convert(photos, tmp_path / "lit", "litdata")
        path = tmp_path / "lit" / "train" / "index.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return tmp_path / "lit"

    return make


def tree(context: object, kind: str = "collections.defaultdict") -> str:
    leaf = {"type": None, "context": None, "children_spec": []}
    return json.dumps([1, {"type": kind, "context": json.dumps(context), "children_spec": [leaf] * 3}])


NAMES = ["image", "label", "name"]
FACTORY = {"default_factory_module": "hostile", "default_factory_name": "run", "dict_context": NAMES}
CHANGES = {
    "a module": lambda c: c["config"].update(data_spec=tree(FACTORY)),
    "another tree": lambda c: c["config"].update(data_spec=tree(NAMES, "collections.OrderedDict")),
    "no tree": lambda c: c["config"].update(data_spec=None),
    "pickle": lambda c: c["config"].update(data_format=["bytes", "int", "pickle"]),
    "one more value": lambda c: c["config"]["data_format"].append("str"),
    "compression": lambda c: c["config"].update(compression="zstd"),
    "encryption": lambda c: c["config"].update(encryption={"level": "sample"}),
    "another format": lambda c: c["config"].update(format="mds"),
    "another loader": lambda c: c["config"].update(item_loader="TokensLoader"),
    "shards": lambda c: c.update(shards=[]),
    "a chunk elsewhere": lambda c: c["chunks"][0].update(filename="../../secret.bin"),
    "an absolute chunk": lambda c: c["chunks"][0].update(filename="/etc/passwd"),
    "another file": lambda c: c["chunks"][0].update(filename="index.json"),
    "another length": lambda c: c["chunks"][0].update(chunk_bytes=10**12),
    "too many items": lambda c: c["chunks"][0].update(chunk_size=10**12),
    "less than none": lambda c: c["chunks"][0].update(chunk_size=-1),
    "no number": lambda c: c["chunks"][0].update(chunk_size="2"),
    "tokens": lambda c: c["chunks"][0].update(dim=2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_the_index_that_convert_writes(change: str, index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "hostile.py").write_text("import os\nos.mkdir('imported')\ndef run(): os.mkdir('called')\n")
    (tmp_path / "secret.bin").write_bytes(b"secret")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    data = LitDataDataModule(str(index(lambda content: None)), **SMALL)
    assert [len(targets) for _, targets in data.train_dataloader()] == [2]
    with pytest.raises(ValueError, match="train/index.json"):
        next(iter(LitDataDataModule(str(index(CHANGES[change])), **SMALL).train_dataloader()))
    assert not Path("imported").exists() and "hostile" not in sys.modules


def test_names_that_are_files_where_convert_runs(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(photos)
    convert(Path("."), tmp_path / "lit", "litdata")
    data = LitDataDataModule(str(tmp_path / "lit"), **SMALL)
    assert sorted(t for _, targets in data.train_dataloader() for t in targets.tolist()) == [0, 1]


# ---- tars


def png() -> bytes:
    image = io.BytesIO()
    Image.new("RGB", (9, 9)).save(image, "PNG")
    return image.getvalue()


def member(name: str, content: bytes) -> bytes:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    return about.tobuf() + content + b"\0" * (-len(content) % 512)


def sparse(name: str, size: int) -> bytes:
    """A file of so many zeros, of which the tar has none: as `tar --sparse` writes it."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0%011o\0" % (size, 0)
    header[483:495] = b"%011o\0" % size
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    return bytes(header)


def shard(folder: Path, members: bytes, samples: int = 1, name: str = "train.tar") -> WebDatasetDataModule:
    (folder / name).write_bytes(members + b"\0" * 1024)
    listed = {"train": {"filenames": [name], "shard_lengths": [samples]}}
    (folder / "_info.json").write_text(json.dumps({"splits": listed}))
    (folder / "classes.txt").write_text("cat\n")
    return WebDatasetDataModule(str(folder), **SMALL)


@pytest.fixture
def little_memory():
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 10**7, f"{peak:,} bytes"


@pytest.mark.parametrize("name", ["0.bin", "0.mp4", "1", "__meta__/1.png", "0.txt.png"])
def test_files_that_are_not_used_are_not_read(name: str, tmp_path: Path, little_memory):
    members = member("0.png", png()) + member("0.cls", b"0") + sparse(name, 3 * 2**30)
    data = shard(tmp_path, members)
    assert (tmp_path / "train.tar").stat().st_size < 10_000
    assert [targets.tolist() for _, targets in data.train_dataloader()] == [[0]]


@pytest.mark.parametrize("name", ["1.png", "1.cls"])
def test_a_sparse_image_is_a_fault(name: str, tmp_path: Path, error_of: Callable, little_memory):
    good = {"png": png(), "cls": b"0"}
    broken = [sparse(f"1.{k}", 3 * 2**30) if name == f"1.{k}" else member(f"1.{k}", v) for k, v in good.items()]
    members = b"".join([*(member(f"0.{k}", v) for k, v in good.items()), *broken])
    assert "train.tar/1 has a file of more than" in error_of(shard(tmp_path, members, 2).train_dataloader())


def test_an_image_that_is_too_large_is_a_fault(tmp_path: Path, error_of: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tars, "MAX_BYTES", 10_000)
    members = member("0.png", png() + b"\0" * 10_000) + member("0.cls", b"0")
    assert "train.tar/0 has a file of more than 10000 bytes" in error_of(shard(tmp_path, members).train_dataloader())


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2"])
def test_a_compressed_tar_is_refused(kind: str, tmp_path: Path, error_of: Callable):
    """Of which a header can be of any size, too."""
    with tarfile.open(tmp_path / "a.tar", f"w:{kind}") as tar:
        about = tarfile.TarInfo("0.png")
        about.size = len(png())
        tar.addfile(about, io.BytesIO(png()))
    data = shard(tmp_path, (tmp_path / "a.tar").read_bytes())
    assert f"cannot read shard {tmp_path}/train.tar: " in error_of(data.train_dataloader())


@pytest.mark.parametrize("name", ["../secret.tar", "/secret.tar", "a/../../secret.tar"])
def test_shards_outside_the_folder(name: str, tmp_path: Path):
    (tmp_path / "a").mkdir()
    data = shard(tmp_path / "a", b"")
    content = json.loads((tmp_path / "a" / "_info.json").read_text())
    content["splits"]["train"]["filenames"] = [name]
    (tmp_path / "a" / "_info.json").write_text(json.dumps(content))
    (tmp_path / "secret.tar").write_bytes(member("0.png", png()) + member("0.cls", b"0"))
    with pytest.raises(ValueError, match="_info.json names a shard that is not in its folder"):
        data.dataset("train")


@pytest.mark.parametrize("length", [10**12, -1])
def test_more_samples_than_a_tar_can_hold(length: int, tmp_path: Path):
    with pytest.raises(ValueError, match=f"train.tar does not have {length} samples"):
        shard(tmp_path, member("0.png", png()) + member("0.cls", b"0"), length).dataset("train")


def test_links_in_tars_are_not_followed(tmp_path: Path, error_of: Callable):
    link = tarfile.TarInfo("0.png")
    link.type, link.linkname = tarfile.SYMTYPE, os.fspath(tmp_path / "secret.png")
    (tmp_path / "secret.png").write_bytes(png())
    data = shard(tmp_path, link.tobuf() + member("0.cls", b"0"))
    assert "has no image file" in error_of(data.train_dataloader())


def test_what_is_no_sample_is_still_counted(tmp_path: Path):
    stream = shard(tmp_path, member("0.txt", b"hello") + member("1.png", png()) + member("1.cls", b"0"), 2).make_source(
        "train"
    )
    (_, first), (_, second) = stream
    with pytest.raises(SampleError, match="it has txt"):
        tars.decode_sample(first)
    assert tars.decode_sample(second)[1] == 0
