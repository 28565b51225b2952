"""Models on batches of columns, alone and by Ray Data: the rows of one process, and a killed worker costs nothing."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import tifffile
from safetensors.torch import save_file
from timm.models import save_for_hf

from luna_vision.downstream import batches
from luna_vision.downstream.batches import Embedder, Encoder
from luna_vision.downstream.embed import Settings, embed_images
from luna_vision.execution import encode
from luna_vision.images import open_image
from luna_vision.models.factory import PIXELS, load_model


@pytest.fixture
def model(tiny):
    return tiny(num_classes=5)


@pytest.fixture
def how(model, tmp_path) -> dict:
    """What an actor is made of."""
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    arguments = {"embed_dim": 32, "depth": 2, "num_classes": 5}
    checkpoint = str(tmp_path / "tiny.safetensors")
    return {"model": "test_luna_vit", "arguments": arguments, "checkpoint": checkpoint, "device": "cpu"}


@pytest.fixture
def slides(tmp_path, pictures) -> list[str]:
    """Files of images, and one that is none."""
    paths = [tmp_path / f"{i}.tif" for i in range(4)]
    for path, picture in zip(paths, pictures, strict=False):
        tifffile.imwrite(path, np.asarray(picture), photometric="rgb", tile=(16, 16))
    paths.insert(2, tmp_path / "none.tif")
    paths[2].write_bytes(b"no image")
    return list(map(str, paths))


def check_encodings(rows: list[dict], slides: list[str], model) -> None:
    assert [row["path"] for row in rows] == slides
    for row in rows:
        if "none" in row["path"]:
            assert "none.tif" in row["error"] and row["embedding"] is None and row["size"] is None
            continue
        image = open_image(row["path"], **({"region": (2, 3, 20, 17)} if row["region"] else {}))
        want = encode(model, image, progress=False)
        assert row["embedding"] == want.embedding.tolist() and row["logits"] == want.logits.tolist()
        assert row["size"] == list(image.shape[:2]) and row["error"] == ""


def test_a_batch_of_paths(how, model, slides):
    regions = np.array([None, "", np.nan, "2 3 20 17", ""], object)
    encoder = Encoder(**how)
    table = encoder({"path": np.array(slides), "region": regions, "patient": np.arange(5)})
    rows = table.to_pylist()
    check_encodings(rows, slides, model)
    assert [row["patient"] for row in rows] == list(range(5)) and rows[3]["region"] == "2 3 20 17"
    with pytest.raises(ValueError, match="store would be shared by all rows"):
        Encoder(**how, store="run")
    failed = encoder({"path": slides[2:3], "region": ["2 3 20 17"]}).to_pylist()
    assert failed[0]["error"] and failed[0]["region"] == "2 3 20 17"
    nothing = encoder({"path": slides[2:3], "patient": [7]})
    assert nothing.num_rows == 1 and nothing.schema.equals(table.schema)


@pytest.mark.parametrize("given", [None, {"bands": [2, 2, 1]}])
def test_paths_are_read_as_the_slides_of_training_unless_told_otherwise(given, how, slides, monkeypatch):
    def load(*args, **kwargs):
        model = load_model(*args, **kwargs)
        model.pretrained_cfg = model.pretrained_cfg | {"slides": {"bands": [3, 2, 1], "mask": "otsu"}}
        return model

    monkeypatch.setattr(batches, "load_model", load)
    for words, mask in (({}, "otsu"), ({"mask": "none"}, None)):
        encoder = Encoder(**how, choice=given, **words)
        (row,) = encoder({"path": slides[:1]}).to_pylist()
        image = open_image(slides[0], **given or {"bands": [3, 2, 1]})
        want = encode(encoder.model, image, mask=mask, progress=False)
        assert row["embedding"] == want.embedding.tolist()
        assert row["patches"] == (math.prod(want.grid_size) if mask is None else int(want.patch_valid.sum()))


def test_a_batch_of_images(how, tiny, model, photos, pictures):
    embedder = Embedder(**how, memory=True)
    images = np.empty(len(pictures) + 1, object)
    images[:-1] = [np.asarray(picture) for picture in pictures]
    images[-1] = np.zeros((8, 8, 7), np.uint8)
    table = embedder({"image": images, "path": list(map(str, range(len(images))))})
    want = embed_images(model, photos, Settings(memory=True))
    at = [int(Path(path).stem) for path in want.paths]
    rows = table.to_pylist()
    np.testing.assert_allclose([rows[i]["embedding"] for i in at], want.embedding, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([rows[i]["memory"] for i in at], want.memory, rtol=1e-4, atol=1e-5)
    assert rows[-1]["embedding"] is None and "7" in rows[-1]["error"] and table.column_names[0] == "path"
    assert embedder({"image": images[-1:], "path": ["x"]}).schema.equals(table.schema)


class Mortal(Encoder):
    """Kills its process once, in the middle of the work."""

    def __init__(self, grave: str, **how) -> None:
        super().__init__(**how)
        self.grave = Path(grave)

    def __call__(self, batch):
        table = super().__call__(batch)
        if batch["path"][0].endswith("1.tif") and not self.grave.exists():
            self.grave.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return table


# on a busy machine Ray's own processes start slowly; nothing is written to the home, nor sent anywhere
RAY = {"agent_register_timeout_ms": "300000", "worker_register_timeout_seconds": "300", "worker_niceness": "0"}
RAY |= {"AUTH_MODE": "disabled", "USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def ray():
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, str(Path(__file__).parent)])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY.items():
            patch.setenv(f"RAY_{name}", value)
        ray = pytest.importorskip("ray", reason="takes ray (pip install 'luna-vision[ray]')")
        variables = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
        for last in (False, False, True):
            try:  # with more places than actors, as others read and write
                ray.init(num_cpus=4, include_dashboard=False, runtime_env=variables, log_to_driver=False)
                break
            except Exception as error:
                ray.shutdown()
                if last or "timed out during startup" not in str(error):  # after 30 seconds, whatever the machine
                    raise
        yield ray
        ray.shutdown()


@pytest.mark.slow
def test_ray_gives_the_rows_of_one_process_and_a_killed_worker_costs_nothing(ray, how, model, slides, tmp_path):
    data = ray.data.from_items([{"path": path} for path in slides])
    how = how | {"grave": str(tmp_path / "grave")}
    found = data.map_batches(Mortal, fn_constructor_kwargs=how, batch_size=1, concurrency=1).take_all()
    assert (tmp_path / "grave").exists()
    check_encodings(sorted(found, key=lambda row: slides.index(row["path"])), slides, model)


@pytest.mark.slow
def test_ray_embeds_decoded_images(ray, how, model, photos, tmp_path):
    data = ray.data.read_images(str(photos), include_paths=True)
    found = data.map_batches(Embedder, fn_constructor_kwargs=how, batch_size=4, concurrency=1)
    found.write_parquet(str(tmp_path / "o"))
    rows = {Path(row["path"]).name: row for row in ray.data.read_parquet(str(tmp_path / "o")).take_all()}
    want = embed_images(model, photos)
    assert len(rows) == len(want.paths) == 11
    found = [rows[Path(path).name]["embedding"] for path in want.paths]
    np.testing.assert_allclose(np.stack(found), want.embedding, rtol=1e-4, atol=1e-5)


def test_a_size_that_the_model_does_not_take_is_one_line():
    with pytest.raises(ValueError, match="96"):
        Embedder(model="vit_tiny_patch16_224", img_size=96, device="cpu")


@pytest.mark.parametrize("kind", [Embedder, Encoder])
def test_models_of_other_bands_and_without_zeros(kind, tiny, tmp_path):
    model = tiny(in_chans=4, num_classes=0)
    save_for_hf(model, tmp_path / "it")
    file = tmp_path / "it" / "config.json"
    config = json.loads(file.read_text())
    config[PIXELS] = {"nodata": 0, "fill": "error"}
    file.write_text(json.dumps(config))
    kind(model=f"local-dir:{tmp_path / 'it'}", device="cpu")
