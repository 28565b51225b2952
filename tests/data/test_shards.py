"""WebDataset and LitData: an epoch is the data set, shared out without losses, and the same on every machine."""

import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from luna_vision.cli.common import run_command
from luna_vision.cli.convert import MODULES as FORMATS
from luna_vision.cli.convert import main
from luna_vision.data import ImageFolderDataModule, LitDataDataModule, TimmDataModule, WebDatasetDataModule
from luna_vision.data import convert as conversion
from luna_vision.data.convert import convert
from luna_vision.data.webdataset_module import decode_sample
from luna_vision.images.decode import SampleError

# litdata warns that chunks as small as those here are unusual
pytestmark = pytest.mark.filterwarnings("ignore:An item was larger", "ignore:This DataLoader will create")
MODULES = {"webdataset": WebDatasetDataModule, "litdata": LitDataDataModule}
TRAIN = 42
PLAIN = {"augmentation": "none", "mean": [0.0], "std": [1.0], "drop_last": False}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder with 42 training and 9 validation images; image i is all of brightness i."""
    root = tmp_path_factory.mktemp("photos")
    number = 0
    for split, count in (("train", TRAIN // 3), ("val", 3)):
        for name in ("cat", "dog", "eel"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = np.full((20, 30, 3), number, np.uint8)
                Image.fromarray(image).save(root / split / name / f"photo {i:02}.v2.png")
                number += 1
    return root


@pytest.fixture(scope="module")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same as several uneven shards in each format."""
    root = tmp_path_factory.mktemp("shards")
    for name in MODULES:
        convert(photos, root / name, name, shard_megabytes=0.0006)
    return {name: root / name for name in MODULES}


def module(source: str, root: Path, rank: int = 0, world_size: int = 1, epoch: int = 0, **kwargs):
    arguments = {"img_size": 8, "batch_size": 4, "num_workers": 0, "persistent_workers": False} | kwargs
    data = MODULES[source](str(root), **arguments)
    data._rank = lambda: (rank, world_size)
    data._next_batch = lambda: (epoch, 0)
    return data


def numbers(loader) -> list[list[int]]:
    """The brightness of the images, batch by batch; their labels are checked."""
    batches = []
    for images, targets in loader:
        batches.append((images[:, 0, 0, 0] * 255).round().int().tolist())
        assert [n // 14 if n < TRAIN else (n - TRAIN) // 3 for n in batches[-1]] == targets.tolist()
    return batches


@pytest.mark.parametrize("source", MODULES)
def test_several_shards(source: str, shards: dict[str, Path]):
    files = sorted(path.name for path in shards[source].rglob("*") if path.suffix in (".tar", ".bin"))
    assert len(files) > 6  # what the tests below rely on


@pytest.mark.parametrize("source", MODULES)
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_and_workers_share_an_epoch(source: str, num_workers: int, world_size: int, shards: dict[str, Path]):
    ranks = []
    for rank in range(world_size):
        data = module(source, shards[source], rank, world_size, num_workers=num_workers, **PLAIN)
        loader = data.train_dataloader()
        batches = numbers(loader)
        assert len(batches) == len(loader) == math.ceil(TRAIN / world_size / 4)
        ranks.append([n for batch in batches for n in batch])
    assert sorted(n for rank in ranks for n in rank) == list(range(TRAIN))


@pytest.mark.parametrize("source", MODULES)
def test_uneven_ranks_have_as_many_batches(source: str, shards: dict[str, Path]):
    ranks = [numbers(module(source, shards[source], r, 4, **PLAIN).train_dataloader()) for r in range(4)]
    assert [[len(batch) for batch in rank] for rank in ranks] == [[4, 4, 3]] * 4
    counts = Counter(n for rank in ranks for batch in rank for n in batch)
    assert set(counts) == set(range(TRAIN)) and sum(counts.values()) == 44  # 42 do not go into 4, as in EpochSampler


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("source", MODULES)
def test_only_the_last_batch_is_dropped(source: str, num_workers: int, shards: dict[str, Path]):
    data = module(source, shards[source], num_workers=num_workers, **PLAIN | {"drop_last": True})
    batches = numbers(data.train_dataloader())
    assert [len(batch) for batch in batches] == [4] * 10
    assert len({n for batch in batches for n in batch}) == 40
    alone = module(source, shards[source], num_workers=num_workers, batch_size=50, **PLAIN | {"drop_last": True})
    assert [len(batch) for batch in numbers(alone.train_dataloader())] == [42]


@pytest.mark.parametrize("source", MODULES)
def test_order_is_a_function_of_seed_and_epoch(source: str, shards: dict[str, Path]):
    def order(**kwargs) -> list[int]:
        return [
            n for batch in numbers(module(source, shards[source], **PLAIN, **kwargs).train_dataloader()) for n in batch
        ]

    first = order()
    assert first == order() and len({tuple(o) for o in (first, order(epoch=1), order(seed=7))}) == 3
    labels = [n // 14 for n in first]
    assert all(len(set(labels[i : i + 14])) == 3 for i in (0, 14, 28))  # classes are mixed


def test_a_small_shuffle_buffer_still_mixes_shards(shards: dict[str, Path]):
    orders = []
    for epoch in range(2):
        data = module("webdataset", shards["webdataset"], epoch=epoch, shuffle_buffer=1, **PLAIN)
        orders.append([n for batch in numbers(data.train_dataloader()) for n in batch])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(TRAIN))


@pytest.mark.parametrize("source", MODULES)
def test_augmentation_is_a_function_of_seed_epoch_and_sample(source: str, shards: dict[str, Path]):
    def images(ranks: int, num_workers: int, epoch: int) -> set[bytes]:
        settings = {
            "drop_last": False,
            "color_jitter": 0.9,
            "random_erasing": 1.0,
            "seed": 5,
            "num_workers": num_workers,
        }
        loaders = [module(source, shards[source], r, ranks, epoch, **settings).train_dataloader() for r in range(ranks)]
        return {image.numpy().tobytes() for loader in loaders for batch, _ in loader for image in batch}

    reference = images(1, 0, 0)
    assert len(reference) == TRAIN
    assert images(1, 2, 0) == images(3, 0, 0) == reference
    pixels = [np.frombuffer(image, np.float32) for image in reference]  # of one brightness, but for what was erased
    assert len({(p != np.median(p)).tobytes() for p in pixels}) > TRAIN // 2
    assert not images(1, 0, 1) & reference


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", MODULES)
def test_evaluation(source: str, num_workers: int, shards: dict[str, Path], photos: Path):
    data = module(source, shards[source], num_workers=num_workers, batch_size=3, **PLAIN)
    data.setup("fit")
    for loader in (data.val_dataloader(), data.test_dataloader()):
        batches = numbers(loader)
        assert [len(batch) for batch in batches] == [3, 3, 3]
        assert sorted(n for batch in batches for n in batch) == list(range(TRAIN, TRAIN + 9))
    assert (data.num_classes, data.class_names) == (3, ["cat", "dog", "eel"])
    folder = ImageFolderDataModule(str(photos), img_size=8)
    assert torch.equal(next(iter(folder.val_dataloader()))[1].bincount(), torch.tensor([3, 3, 3]))


def test_litdata_predicts_and_holds_out(shards: dict[str, Path], tmp_path: Path):
    data = module("litdata", shards["litdata"], **PLAIN)
    assert [name for _, names in data.predict_dataloader() for name in names] == [str(i) for i in range(9)]
    (tmp_path / "train").symlink_to(shards["litdata"] / "train")
    (tmp_path / "classes.txt").write_text("cat\ndog\neel\n")
    data = module("litdata", tmp_path, val_fraction=1 / 3, **PLAIN)
    train, val = (
        {n for b in numbers(loader) for n in b} for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert len(train) == 28 and len(val) == 14 and not train & val
    assert {n for batch in numbers(data.test_dataloader()) for n in batch} == val


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", MODULES)
def test_loading_goes_on_within_an_epoch(source: str, shards: dict[str, Path], num_workers: int):
    data = module(source, shards[source], epoch=1, num_workers=num_workers)
    whole = list(data.train_dataloader())
    data._next_batch = lambda: (1, 3)
    rest = list(data.train_dataloader())
    assert len(rest) == len(whole) - 3 > 2
    for (images, targets), (again, labels) in zip(whole[3:], rest, strict=True):
        assert torch.equal(images, again) and torch.equal(targets, labels)


class Recorder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[torch.Tensor]] = {}

    def training_step(self, batch, batch_idx):
        self.seen.setdefault(self.current_epoch, []).append(batch[0])
        return self.weight * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", MODULES)
def test_a_resumed_run_sees_what_the_uninterrupted_run_sees(source: str, shards: dict[str, Path], tmp_path: Path):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}

    def fit(max_epochs: int, ckpt_path: str | None = None) -> tuple[Recorder, L.Trainer]:
        recorder = Recorder()
        trainer = L.Trainer(accelerator="cpu", max_epochs=max_epochs, logger=False, **quiet)
        data = MODULES[source](str(shards[source]), img_size=8, batch_size=16, num_workers=1)
        trainer.fit(recorder, data, ckpt_path=ckpt_path)
        return recorder, trainer

    whole, _ = fit(2)
    _, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, _ = fit(2, str(tmp_path / "last.ckpt"))
    assert len(whole.seen[0]) == len(whole.seen[1]) == 2 and not torch.equal(whole.seen[0][0], whole.seen[1][0])
    assert sorted(resumed.seen) == [1] and all(map(torch.equal, resumed.seen[1], whole.seen[1]))


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A folder of 24 training photos of which three are broken."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        for i in range(12):
            path = tmp_path / "photos" / "train" / name / f"{i:02}.png"
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    folder = tmp_path / "photos" / "train" / "cat"
    for i, content in ((3, b""), (7, b"no picture"), (8, (folder / "08.png").read_bytes()[:200])):
        (folder / f"{i:02}.png").write_bytes(content)
    for source in MODULES:
        convert(tmp_path / "photos", tmp_path / source, source, shard_megabytes=0.002)
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", MODULES)
def test_raise_names_the_sample_of_a_shard(source: str, num_workers: int, faulty: Path, error_of: Callable):
    data = module(source, faulty / source, num_workers=num_workers, val_fraction=0.0)
    error = error_of(data.train_dataloader())
    name = r"/train-00000\d.tar/000000\d\d_0[378].png" if source == "webdataset" else "/train: train/cat/0[378].png"
    assert re.match(rf"{type(data).__name__} train sample \d+: .*image file .*{name}", error) and "\n" not in error


@pytest.mark.parametrize("source", MODULES)
def test_skip_in_shards(source: str, faulty: Path, error_of: Callable):
    epochs = []
    for num_workers, epoch in ((0, 0), (2, 0), (2, 1)):
        data = module(
            source, faulty / source, epoch=epoch, num_workers=num_workers, val_fraction=0.0, on_error="skip",
            max_error_share=3 / 24, **PLAIN,
        )  # fmt: skip
        batches = list(data.train_dataloader())
        assert [len(targets) for _, targets in batches] == [4] * 6
        epochs.append(Counter(image.numpy().tobytes() for images, _ in batches for image in images))
        assert int(data.dataset("train").faults.broken.sum()) == 3
    assert epochs[0] == epochs[1] == epochs[2]  # the same images take the place of the broken ones
    data = module(source, faulty / source, val_fraction=0.0, on_error="skip", max_error_share=2 / 24, **PLAIN)
    message = f"{type(data).__name__} train: 3 of 24 samples cannot be read, more than max_error_share=0.0833333 allows"
    assert error_of(data.train_dataloader()).startswith(message)


def test_webdataset_mistakes(shards: dict[str, Path], tmp_path: Path, error_of: Callable):
    root = tmp_path / "wds"
    root.mkdir()
    with pytest.raises(FileNotFoundError, match="no file .*_info.json, the list of the shards: luna-vision convert"):
        module("webdataset", root).dataset("train")
    info = json.loads((shards["webdataset"] / "_info.json").read_text())
    for path in shards["webdataset"].glob("*.tar"):
        (root / path.name).write_bytes(path.read_bytes())

    def data(**kwargs) -> WebDatasetDataModule:
        (root / "_info.json").write_text(json.dumps(info))
        return module("webdataset", root, **PLAIN | kwargs)

    with pytest.raises(FileNotFoundError, match="no file .*classes.txt, the names of the classes: luna-vision convert"):
        data().setup("fit")
    (root / "classes.txt").write_text("cat\ndog\neel\n")
    with pytest.raises(ValueError, match="there is no indexed test set to predict: give predict_path"):
        data().predict_dataloader()
    with pytest.raises(ValueError, match="shuffle_buffer must be at least 1, got 0"):
        data(shuffle_buffer=0)
    train = info["splits"]["train"]
    train["shard_lengths"][0] += 1
    message = rf"shard {root}/train-000000.tar ends after \d+ samples, _info.json says \d+"
    assert re.fullmatch(message, error_of(data().train_dataloader()))
    train["shard_lengths"][0] -= 1
    content = (root / "train-000001.tar").read_bytes()
    (root / "train-000001.tar").write_bytes(content[: len(content) // 2 + 100])
    assert f"shard {root}/train-000001.tar ends after " in error_of(data().train_dataloader())
    (root / "train-000001.tar").write_bytes(b"no tar" * 2000)
    assert f"cannot read shard {root}/train-000001.tar: " in error_of(data().train_dataloader())
    train["filenames"].pop()
    with pytest.raises(ValueError, match=r"_info.json: \d+ filenames, but \d+ shard_lengths"):
        data().setup("fit")
    train["shard_lengths"].pop()
    (root / "train-000002.tar").unlink()
    with pytest.raises(FileNotFoundError, match="names shards that are missing: .*train-000002.tar \\(1 in all\\)"):
        data().setup("fit")
    del info["splits"]["val"]
    with pytest.raises(ValueError, match="has no split 'val', and nothing can be held out of a stream: give val_fract"):
        data().dataset("val")
    assert data(val_fraction=0.0).val_dataloader() == data().test_dataloader() == []
    del info["splits"]["train"]
    with pytest.raises(ValueError, match="_info.json has no split 'train'"):
        data().dataset("train")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: '(splits|chunks)'"),
        ('{"splits": {"train": {"filenames": []}}, "chunks": [{"filename": "a"}]}', "KeyError: '(shard_l|chunk_size)"),
        ('{"splits": {"train": []}, "chunks": 1}', "TypeError"),
    ],
)
@pytest.mark.parametrize("source", ["webdataset", "litdata"])
def test_lists_of_shards_that_make_no_sense(source: str, content: str, what: str, tmp_path: Path):
    path = tmp_path / ("_info.json" if source == "webdataset" else "train/index.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(ValueError, match=f"^{path} is not as docs/data.md describes it: {what}"):
        module(source, tmp_path, val_fraction=0.0).dataset("train")


def test_litdata_mistakes(shards: dict[str, Path], tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match="no file .*train/index.json, LitData's index of its chunks: luna-vision convert"
    ):
        module("litdata", tmp_path).dataset("train")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "index.json").write_bytes((shards["litdata"] / "train" / "index.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="index.json names a chunk that is missing: chunk-0-0.bin"):
        module("litdata", tmp_path).dataset("train")


@pytest.mark.parametrize("source", MODULES)
def test_a_missing_library_says_how_to_get_it(source: str, shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, source, None)
    with pytest.raises(ValueError, match=rf"^{source} is not installed: pip install 'luna-vision\[shards\]'$"):
        module(source, shards[source]).dataset("train")


def test_labels_outside_the_classes(shards: dict[str, Path], tmp_path: Path, error_of: Callable):
    for source, root in shards.items():
        (tmp_path / source).mkdir()
        for path in root.iterdir():
            (tmp_path / source / path.name).symlink_to(path)
        (tmp_path / source / "classes.txt").unlink()
        (tmp_path / source / "classes.txt").write_text("cat\ndog\n")
        data = module(source, tmp_path / source, on_error="skip", max_error_share=0.9)
        assert "has label 2, outside the 2 declared classes" in error_of(data.train_dataloader())


def test_timm_reads_our_tars(shards: dict[str, Path]):
    data = TimmDataModule(
        "wds/photos", 3, str(shards["webdataset"]), val_split="val", img_size=8, num_workers=0, batch_size=4, **PLAIN
    )
    assert sorted(n for batch in numbers(data.val_dataloader()) for n in batch) == list(range(TRAIN, TRAIN + 9))


def test_conversion_is_the_same_every_time(photos: Path, shards: dict[str, Path], tmp_path: Path):
    counts = convert(photos, tmp_path / "again", "webdataset", shard_megabytes=0.0006)
    tars = sorted(path.name for path in (tmp_path / "again").glob("*.tar"))
    assert {split: images for split, (images, _) in counts.items()} == {"train": 42, "val": 9}
    assert sum(count for _, count in counts.values()) == len(tars)
    assert all((tmp_path / "again" / n).read_bytes() == (shards["webdataset"] / n).read_bytes() for n in tars)


@pytest.mark.parametrize("source", MODULES)
def test_a_conversion_that_fails_leaves_nothing(
    source: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def samples(*args):
        yield "train/cat/0.png", str(photos / "train" / "cat" / "photo 00.v2.png"), 0
        raise OSError("disk full")

    monkeypatch.setattr(conversion, "_samples", samples)
    with pytest.raises(OSError, match="disk full"):
        convert(photos, tmp_path / "out", source)
    assert os.listdir(tmp_path) == []


def test_conversion_command(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    main([str(photos), str(tmp_path / "out"), "--format", "litdata"])
    output = capsys.readouterr().out
    assert "train: 42 images in 1 shards\nval: 9 images in 1 shards\n" in output
    assert "luna_vision.data.LitDataDataModule" in output
    assert FORMATS == {form: MODULES[form].__name__ for form in conversion.FORMATS}
    assert os.listdir(tmp_path) == ["out"]
    for words, message in (
        ([photos, tmp_path / "out"], f"error: {tmp_path}/out exists already: give a folder to make\n"),
        ([tmp_path, tmp_path / "x"], f"error: no folder {tmp_path}/train: FOLDER must contain "),
        ([photos, tmp_path, "--shard-megabytes", "0"], "error: argument --shard-megabytes: must be a whole"),
    ):
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda words=words: main([str(word) for word in words]))
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and error.startswith(message) and error.count("\n") == 1


@pytest.mark.parametrize("source", MODULES)
def test_conversion_of_a_folder_as_it_is(source: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "photos"
    shutil.copytree(photos / "train", folder / "train")
    shutil.copytree(photos / "val", folder / "valid")
    (folder / "train" / "cat" / "photo 00.v2.png").rename(folder / "train" / "cat" / os.fsdecode(b"photo \xff.png"))
    for name in (".ipynb_checkpoints", "train/.Trash-0", "masks"):
        (folder / name).mkdir()
    for path in (folder / "train" / "dog" / "._photo.png", folder / "train" / "dog" / "notes.txt"):
        path.write_bytes(b"x")
    os.mkfifo(folder / "train" / "dog" / "pipe.png")
    main([str(folder), str(tmp_path / "out"), "--format", source])
    assert capsys.readouterr().out.splitlines()[:5] == [
        f"train: 42 images in {folder}/train, 3 classes; skipped 2 hidden and 2 other names (1 .txt, 1 not a file)",
        f"val: 9 images in {folder}/valid, 3 classes",
        f"not used of {folder}: masks",
        "train: 42 images in 1 shards",
        "val: 9 images in 1 shards",
    ]
    data = module(source, tmp_path / "out", **PLAIN)
    assert sorted(n for batch in numbers(data.train_dataloader()) for n in batch) == list(range(TRAIN))
    assert sum(map(len, numbers(data.val_dataloader()))) == 9
    for made, message in (("train/empty", "of .*train: empty$"), ("val", "photos/val and .*photos/valid are both")):
        (folder / made).mkdir()
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / "again", source)
    assert not (tmp_path / "again").exists()


def test_litdata_takes_the_usual_names_of_the_validation_folder(shards: dict[str, Path], tmp_path: Path):
    for name, of in (("train", "train"), ("validation", "val"), ("classes.txt", "classes.txt")):
        (tmp_path / name).symlink_to(shards["litdata"] / of)
    data = module("litdata", tmp_path, **PLAIN)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [42, 9, 9]


def test_names_that_tars_cannot_hold(photos: Path, tmp_path: Path):
    folder = tmp_path / "photos" / "train" / "a.b"
    folder.mkdir(parents=True)
    source = photos / "train" / "cat" / "photo 00.v2.png"
    for name in ("x.y.z.PNG", "é" * 60 + ".png", "n" * 200 + ".png"):
        (folder / name).write_bytes(source.read_bytes())
    convert(tmp_path / "photos", tmp_path / "out", "webdataset")
    data = module("webdataset", tmp_path / "out", val_fraction=0.0, **PLAIN)
    assert [len(targets) for _, targets in data.train_dataloader()] == [3]


def test_files_that_are_no_samples():
    sample = {"__url__": "a.tar", "__key__": "1", "txt": b"hello"}
    with pytest.raises(SampleError, match=r"a.tar/1 has no image file \(jpg, .*\) or no .* \(cls\): it has txt"):
        decode_sample(sample)
    with pytest.raises(SampleError, match="the label a.tar/1.cls is not a number: b'cat'"):
        decode_sample(sample | {"png": b"", "cls": b"cat"})
