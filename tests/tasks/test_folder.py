"""Checkpoints that are folders, from strangers: nothing in them is unpickled, however often it is read."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.device_mesh import init_device_mesh

from luna_vision.cli.train import main
from luna_vision.tasks.checkpoints import read_checkpoint
from luna_vision.tasks.reporting import export_weights
from luna_vision.tasks.sharding import FSDP2Strategy, read_weights, shard

from .ranks import without_ema

MARKER = "unpickled"
pytestmark = pytest.mark.filterwarnings("ignore")


class Hostile:
    """Makes a file in the working directory when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (MARKER,)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what users set who follow PyTorch's errors
    yield
    assert not Path(MARKER).exists()


def folder(state: dict | None = None) -> Path:
    path = Path("last.ckpt")
    if path.exists():
        shutil.rmtree(path)
    weights = {"a": torch.ones(3, 2), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(1.0)}
    dcp.save(state or {"state_dict": weights}, checkpoint_id=path)
    torch.save({"global_step": 1}, path / "meta.pt")
    return path


# ---- the index


def with_index(change: Callable[[Metadata], None]) -> bytes:
    index = pickle.loads((folder() / ".metadata").read_bytes())
    change(index)
    return pickle.dumps(index)


A = MetadataIndex("state_dict.a", [0, 0])


def a_call_within(index: Metadata) -> None:
    index.planner_data = Hostile()


def a_file_elsewhere(index: Metadata) -> None:
    index.storage_data[A].relative_path = str(shutil.copy("last.ckpt/__0_0.distcp", Path.cwd()))


def a_file_above(index: Metadata) -> None:
    shutil.copy("last.ckpt/__0_0.distcp", "other")
    index.storage_data[A].relative_path = "../other"


def encoded(index: Metadata) -> None:
    index.storage_data[A].transform_descriptors = ["zstd"]


def larger_than_its_bytes(index: Metadata) -> None:
    size = torch.Size([2**40, 2])
    index.state_dict_metadata["state_dict.a"].size = size
    index.state_dict_metadata["state_dict.a"].chunks = [ChunkStorageMetadata(torch.Size([0, 0]), size)]


def a_part_missing(index: Metadata) -> None:
    index.state_dict_metadata["state_dict.a"].size = torch.Size([2**40, 2])


def a_part_outside(index: Metadata) -> None:
    index.state_dict_metadata["state_dict.a"].chunks[0].sizes = torch.Size([4, 2])


def no_tensor(index: Metadata) -> None:
    index.state_dict_metadata["state_dict.a"] = BytesStorageMetadata()
    index.storage_data[MetadataIndex("state_dict.a")] = index.storage_data.pop(A)


def nowhere(index: Metadata) -> None:
    del index.storage_data[A]


def not_what_it_is(index: Metadata) -> None:
    index.storage_data = torch.Size([1])


def one_list_many_times(index: Metadata) -> None:
    kind = index.state_dict_metadata["state_dict.a"]
    kind.chunks = kind.chunks * 1000
    for name in map(str, range(1000)):
        index.state_dict_metadata[name] = kind
        index.storage_data[MetadataIndex(name, [0, 0])] = index.storage_data[A]


CHANGES = {
    a_call_within: r"mkdir\) are refused",
    a_file_elsewhere: "outside the folder",
    a_file_above: "outside the folder",
    encoded: "encoded",
    larger_than_its_bytes: "more numbers than bytes",
    a_part_missing: "missing",
    a_part_outside: "outside",
    no_tensor: "no tensor",
    nowhere: "nowhere",
    not_what_it_is: "belongs|refused",
    one_list_many_times: "more parts than bytes",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_index_that_says_what_cannot_be(change):
    content = with_index(change)
    Path("last.ckpt/.metadata").write_bytes(content)
    with pytest.raises(ValueError, match=rf"last.ckpt.*({CHANGES[change]})"):
        read_weights("last.ckpt")


@pytest.mark.parametrize("content", [pickle.dumps(Hostile()), pickle.dumps([1]), b"", b"no pickle", b"\x80\x04."])
def test_an_index_that_is_none(content):
    (folder() / ".metadata").write_bytes(content)
    for weights in (True, False):
        with pytest.raises(ValueError, match="last.ckpt/.metadata' is not"):
            read_checkpoint("last.ckpt", weights=weights)


def test_an_index_as_python_writes_it():
    weights = read_weights(folder())
    assert weights["a"].shape == (3, 2) and weights["b"].dtype == torch.bfloat16 and weights["c"] == 1
    index = Path("last.ckpt/.metadata")
    whole = index.read_bytes()
    for protocol in (2, 3, 4, 5):
        index.write_bytes(pickle.dumps(pickle.loads(whole), protocol))
        assert read_weights("last.ckpt")["a"].sum() == 6
    index.write_bytes(whole.replace(b"\x8c\x07pathlib", b"\x8c\x0epathlib._local"))  # that of 3.13
    assert read_weights("last.ckpt")["a"].sum() == 6


def test_an_index_that_nobody_ends_writing():
    os.remove(folder() / ".metadata")
    with pytest.raises(OSError, match="missing"):
        read_weights("last.ckpt")
    os.mkfifo("last.ckpt/.metadata")
    with pytest.raises(OSError, match="missing"):
        read_weights("last.ckpt")


def test_the_index_of_one_process_is_not_read():
    """To which PyTorch turns where that of all is not what it takes."""
    (folder() / "__0.metadata").write_bytes(pickle.dumps(Hostile()))
    assert read_weights("last.ckpt")["a"].sum() == 6


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def changed(target: bytes, entries: bytes, slots: bool = False) -> bytes:
    """BUILD: set the attributes of what is on the stack, and take it away."""
    state = b"}" + entries
    return target + (b"N" + state + b"\x86" if slots else state) + b"b0"


def computed_names(benign: bytes) -> bytes:
    """An index that calls a harmless function when it is read first, and the next time another: it keeps words in the
    function's own cache, which is an attribute, and looks up there what to call."""
    layout, first, module, name = (b"j" + struct.pack("<I", 10_000 + i) for i in range(4))  # get from the memo

    def put(value: bytes) -> bytes:
        return b"r" + value[1:]

    def look_up(key: bytes) -> bytes:
        return layout + key + b"\x85R"

    def cache(*entries: bytes) -> bytes:
        return changed(layout, word("cache") + b"}" + b"".join(entries) + b"s")

    program = b"ctorch.serialization\n_get_layout\n" + put(layout) + b"0"
    program += look_up(word("torch.strided")) + put(first) + b"0"
    program += cache(first + word("torch.serialization") + b"s", word("again") + word("posix") + b"s")
    program += look_up(first) + put(module) + b"0"
    program += cache(first + word("_get_layout") + b"s", word("again") + word("mkdir") + b"s")
    program += look_up(first) + put(name) + b"0"
    program += cache(word("torch.strided") + word("again") + b"s", word(MARKER) + b"Ns")
    program += module + name + b"\x93" + word(MARKER) + b"\x85R0"
    return benign[:-1] + program + b"."


def test_names_that_are_computed(monkeypatch):
    monkeypatch.setattr(torch.serialization._get_layout, "cache", {})
    index = folder() / ".metadata"
    attack = computed_names(index.read_bytes())
    pickle.loads(attack)
    with pytest.raises(FileExistsError):  # it works: once without harm, then not
        os.mkdir(MARKER)
        pickle.loads(attack)
    os.rmdir(MARKER)
    monkeypatch.setattr(torch.serialization._get_layout, "cache", {})
    index.write_bytes(attack)
    for read in (read_weights, read_checkpoint, lambda path: export_weights(path, "out.safetensors")):
        with pytest.raises(ValueError, match=r"last.ckpt/.metadata' is not a checkpoint .* refused"):
            read(Path("last.ckpt"))


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("name", ["metadata\nMetadata", "metadata\nMetadataIndex", "filesystem\n_StorageInfo"])
def test_attributes_of_a_class(name, slots):
    index = folder() / ".metadata"
    target = b"ctorch.distributed.checkpoint." + name.encode() + b"\n"
    index.write_bytes(index.read_bytes()[:-1] + changed(target, word("changed") + b"Ns", slots) + b".")
    with pytest.raises(ValueError, match=r"last.ckpt/.metadata' is not a checkpoint"):
        read_weights("last.ckpt")
    assert not hasattr(Metadata, "changed") and not hasattr(MetadataIndex, "changed")


def test_a_weight_that_is_something_else():
    path = folder()
    file, index = path / "__0_0.distcp", pickle.loads((path / ".metadata").read_bytes())
    payload = io.BytesIO()
    torch.save(Hostile(), payload)
    index.storage_data[A].offset, index.storage_data[A].length = file.stat().st_size, len(payload.getvalue())
    file.write_bytes(file.read_bytes() + payload.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="last.ckpt' is not .* refused"):
        read_weights(path)


# ---- FSDP2


@pytest.fixture
def sharded() -> Iterator[FSDP2Strategy]:
    """The strategy of a run with one process, and of a model with two weights in two groups."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    shard(model, init_device_mesh("cpu", (1,)), torch.device("cpu"))
    strategy = FSDP2Strategy()
    strategy._lightning_module = strategy._model = model
    model.strict_loading = True
    strategy.optimizers = [grouped(model)]
    yield strategy
    dist.destroy_process_group()


def grouped(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Biases first, as timm has them."""
    biases, others = ([p for p in model.parameters() if (p.ndim < 2) == few] for few in (True, False))
    return torch.optim.AdamW([{"params": biases, "weight_decay": 0.0}, {"params": others, "lr": 0.5}])


def folder_of_fsdp2(strategy: FSDP2Strategy, hostile: str) -> Path:
    """As the strategy writes it, but for one place."""
    state = {"state_dict": strategy.lightning_module_state_dict()}
    state["optimizer_0"] = strategy.optimizer_state(strategy.optimizers[0])
    if hostile == "a weight":
        state["state_dict"]["0.weight"] = Hostile()
    elif hostile == "settings":
        state["optimizer_0"]["param_groups"][0]["lr"] = Hostile()
    path = folder(state)
    if hostile == "the rest":
        torch.save({"global_step": Hostile()}, path / "meta.pt")
    return path


FSDP2 = {"a weight": "0.weight is no tensor", "settings": "last.ckpt'.* refused", "the rest": "meta.pt'.* refused"}


@pytest.mark.parametrize("where", FSDP2)
def test_resuming_with_fsdp2(sharded, where):
    assert sharded.load_checkpoint(folder_of_fsdp2(sharded, "nowhere")) == {"global_step": 1}
    path = folder_of_fsdp2(sharded, where)
    with pytest.raises(ValueError, match=FSDP2[where]):
        sharded.load_checkpoint(path, weights_only=False)


def test_fsdp2_reads_index_and_rest_once(sharded, monkeypatch):
    """So they cannot be others when they are read again."""
    path, opened = folder_of_fsdp2(sharded, "nowhere"), []

    def counted(function):
        def call(file, *args, **kwargs):
            opened.append(Path(file).name if isinstance(file, str | Path) else "")
            return function(file, *args, **kwargs)

        return call

    monkeypatch.setattr(builtins, "open", counted(builtins.open))
    monkeypatch.setattr(Path, "open", counted(Path.open))
    sharded.load_checkpoint(path)
    assert opened.count(".metadata") == opened.count("meta.pt") == 1


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_file_with_fsdp2(sharded, kind):
    torch.save({"state_dict": Hostile()}, "last.ckpt", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match="could run any code"):
        sharded.load_checkpoint("last.ckpt")


def test_fsdp2_goes_on_from_a_file(sharded):
    """The state of the optimizer is put to the weights that it belongs to, whatever groups they are in."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    optimizer = grouped(model)
    model(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}, "last.ckpt")
    sharded.load_checkpoint("last.ckpt")
    (loaded,) = sharded.optimizers
    assert [group["lr"] for group in loaded.param_groups] == [1e-3, 0.5]
    for own, given in zip(model.parameters(), sharded.model.parameters(), strict=True):
        assert torch.equal(given.full_tensor(), own)
        assert torch.equal(loaded.state[given]["exp_avg"].full_tensor(), optimizer.state[own]["exp_avg"])
    torch.save({"state_dict": model.state_dict()}, "last.ckpt")
    with pytest.raises(ValueError, match="no state of the optimizer"):
        sharded.load_checkpoint("last.ckpt")


# ---- the commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run under FSDP2, of one process."""
    path = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        config = without_ema(path)
        assert command("fit", f"--config={config}", *SHARDED) == 0
    return path


SHARDED = ["--trainer.strategy=fsdp2", "--trainer.max_epochs=1", "--test_after_fit=false"]
LAST = "runs/debug/version_0/checkpoints/last.ckpt"
USES = {
    "test": ["test", f"--ckpt_path={LAST}"],
    "validate": ["validate", f"--ckpt_path={LAST}"],
    "predict": ["predict", f"--ckpt_path={LAST}", "--data.predict_path=a.png"],
    "fit": ["fit", f"--ckpt_path={LAST}"],
    "FSDP2 resume": ["fit", *SHARDED, "--trainer.max_epochs=2", f"--ckpt_path={LAST}"],
    "FSDP2 test": ["test", "--trainer.strategy=fsdp2", f"--ckpt_path={LAST}"],
    "automatic resume": ["fit", *SHARDED],
    "export": [],
}
ENDS = {"fit": 2}  # a sharded run goes on with fsdp2 alone


def command(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MASTER_ADDR", "MASTER_PORT", "LUNA_VISION_RUN"):
            patch.delenv(name, raising=False)
        patch.setattr(sys, "argv", ["train.py", *words])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return 0


def use(name: str) -> int:
    if name != "export":
        return command(USES[name][0], "--config=config.yaml", *USES[name][1:])
    try:
        export_weights(LAST, "out.safetensors")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@pytest.mark.parametrize("name", USES)
def test_an_index_that_changes_is_unpickled_nowhere(name, trained, monkeypatch, capsys):
    """The last time that a command reads it, or already the first, it is another one."""
    Image.new("RGB", (32, 32)).save("a.png")
    opened, good, hostile = [], Path(trained, LAST, ".metadata").read_bytes(), pickle.dumps(Hostile())
    bad_from, unpatched = [10**9], Path.open

    def read(path: Path, *args, **kwargs):
        if path.name != ".metadata" or "w" in str(args):
            return unpatched(path, *args, **kwargs)
        opened.append(path)
        return io.BytesIO(good if len(opened) < bad_from[0] else hostile)

    def again() -> int:
        for entry in ("runs", "config.yaml"):
            copy = shutil.copytree if entry == "runs" else shutil.copy
            shutil.rmtree(entry, ignore_errors=True)
            copy(trained / entry, entry)
        record = Path("runs/debug/version_0/run.json")
        record.write_text(json.dumps({**json.loads(record.read_text()), "finished": name != "automatic resume"}))
        opened.clear()
        return use(name)

    monkeypatch.setattr(Path, "open", read)
    assert again() == ENDS.get(name, 0)
    readings = len(opened)
    assert readings
    for bad_from[0] in {1, readings}:
        capsys.readouterr()
        code, said = again(), capsys.readouterr()
        assert not Path(MARKER).exists()
        assert code == 2 and "refused" in said.err and "ckpt/.metadata" in said.err


def test_a_checkpoint_that_is_a_folder_is_exported(trained):
    export_weights(trained / LAST, "out.safetensors")
    assert load_file("out.safetensors")["head.weight"].shape == (10, 32)


def test_strategies_that_read_checkpoints_themselves_are_refused(trained, capsys):
    strategy = '--trainer.strategy={"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}'
    path = trained / LAST
    assert command("test", f"--config={trained / 'config.yaml'}", strategy, f"--ckpt_path={path}") == 2
    assert "ModelParallelStrategy" in capsys.readouterr().err
