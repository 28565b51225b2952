"""The map of what the memory looks at in an image in pieces: that of the model on the whole image."""

import numpy as np
import pytest
import rasterio
import tifffile
import torch
import zarr

from luna_vision.cli.encode import main
from luna_vision.execution import encode
from luna_vision.execution.checkpoint import Checkpoint
from luna_vision.images import open_image
from tests.stopping import stopped_anywhere

from .conftest import close, normalised
from .test_budget import allocated
from .test_mask import blobs


@torch.no_grad()
def whole(model, image: np.ndarray, layer: int | None = None, valid: np.ndarray | None = None) -> torch.Tensor:
    """(L, H', W'), the weights of a pack in multiples of their mean, averaged over heads; 0 where invalid."""
    x, mask = normalised(model, image), None if valid is None else torch.from_numpy(valid).view(1, -1)
    grid_size = tuple(-(-n // p) for n, p in zip(x.shape[2:], model.patch_embed.patch_size, strict=True))
    if layer is not None or model.final_pack is None:
        (maps,) = model.get_attention_maps(x, [-1 if layer is None else layer], patch_valid=mask)
        pack = maps.pack[0]
    else:
        cut, kept = model.final_pack, []
        handle = cut.register_forward_pre_hook(lambda _, args: kept.append(args))
        model.encode(x, patch_valid=mask)
        handle.remove()
        patches, memory = kept[0][:2]
        pack = cut.attention_maps(patches, memory, grid_size, mask)[0][0].unflatten(-1, grid_size)
    count = grid_size[0] * grid_size[1] if valid is None else int(valid.sum())
    pack = pack.mean(dim=0) * count
    return pack if valid is None else pack * torch.from_numpy(valid)


OPTIONS = [
    {},
    {"global_pool": "avg"},
    {"pack_form": "projected", "tie_kv": False, "pack_heads": 1},
    {"norm_first": False, "local_mixing": "before"},
    {"local_mixing": "attn", "memory_mlp": "own", "global_pool": "both"},
]


def test_a_memory_of_one_slot(make, photo, tmp_path):
    model, image = make(memory_len=1), photo[:79, :95]
    encode(model, image, attention=tmp_path / "a.tif", progress=False)
    found = torch.from_numpy(tifffile.imread(tmp_path / "a.tif")).double()
    close(found.view(1, 20, 24), whole(model, image), 1e-6)


@pytest.mark.parametrize("layer, masked", [(None, False), (None, True), (0, True), (-1, False)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_map_is_that_of_the_whole_image(options, layer, masked, make, photo, tmp_path):
    model, image = make(**options), photo[:79, :95]
    valid = blobs(20, 24) if masked else None
    path = tmp_path / "a.zarr"
    how = {"mask": valid, "band_rows": 3, "progress": False}
    got = encode(model, image, attention=path, attention_layer=layer, **how)
    found = torch.from_numpy(zarr.open_group(path, mode="r")["0"][:]).double()
    close(found, whole(model, image, layer, valid), 1e-6)  # written in float32
    close(got.raw_memory, encode(model, image, **how).raw_memory, 1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def test_it_lies_over_the_image(make, photo, tmp_path):
    model, where = make(), rasterio.Affine(10.0, 0, 500000.0, 0, -10.0, 5200000.0)
    kind = {"driver": "GTiff", "count": 3, "height": 200, "width": 300, "dtype": "uint8", "crs": "EPSG:32633"}
    with rasterio.open(tmp_path / "a.tif", "w", transform=where, tiled=True, **kind) as file:
        file.write(photo[:200, :300].transpose(2, 0, 1))
    opened = open_image(tmp_path / "a.tif", region=(30, 20, 201, 150))
    encode(model, opened, attention=tmp_path / "m.tif", progress=False)
    with rasterio.open(tmp_path / "m.tif") as file:
        assert file.transform == rasterio.Affine(40.0, 0, 500300.0, 0, -40.0, 5199800.0)
        assert file.descriptions == ("slot 0", "slot 1", "slot 2") and file.crs.to_epsg() == 32633
        close(torch.from_numpy(file.read()).double(), whole(model, photo[20:170, 30:231]), 1e-6)
    encode(model, photo[:90, :90], attention=tmp_path / "p.tif", progress=False)
    close(torch.from_numpy(tifffile.imread(tmp_path / "p.tif")).double(), whole(model, photo[:90, :90]), 1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_a_run_that_is_stopped_anywhere_is_resumed(masked, make, photo, tmp_path, monkeypatch):
    model, image, valid = make(depth=2), photo[:79, :95], blobs(20, 24) if masked else None
    want = whole(model, image, 1, valid)
    how = {"store": tmp_path / "store", "attention": tmp_path / "a.zarr", "attention_layer": 1, "band_rows": 4}
    how |= {"mask": valid, "progress": False}
    for _ in stopped_anywhere(lambda: encode(model, image, **how), monkeypatch, (Checkpoint, "save"), at_least=5):
        encode(model, image, **how)
        close(torch.from_numpy(zarr.open_group(tmp_path / "a.zarr", mode="r")["0"][:]).double(), want, 1e-6)
        assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def test_what_is_allocated_stays_within_the_plan(make, photo, tmp_path):
    model = make(dtype=torch.float32, memory_len=32)
    found, planned = allocated(model, photo[:400], attention=tmp_path / "a.tif")
    assert found < planned


def test_the_command(photo, tmp_path):
    np.save(tmp_path / "a.npy", photo[:90, :90])
    words = [str(tmp_path / "a.npy"), "--model", "test_luna_vit", "--device", "cpu", "--out"]
    assert (
        main([*words, str(tmp_path / "o.npz"), "--attention", str(tmp_path / "m.tif"), "--attention-layer", "-2"]) == 0
    )
    assert tifffile.imread(tmp_path / "m.tif").shape == (8, 6, 6)
    words += [str(tmp_path / "n.npz"), "--attention"]
    with pytest.raises(FileExistsError, match=r"m.tif exists: give --overwrite"):
        main([*words, str(tmp_path / "m.tif")])
    with pytest.raises(ValueError, match="a map must end in"):
        main([*words, str(tmp_path / "m.png")])
    with pytest.raises(ValueError, match="attention_layer 9 does not exist: the model has 4, 0 to 3"):
        main([*words, str(tmp_path / "n.tif"), "--attention-layer", "9"])
    with pytest.raises(ValueError, match="attention_layer 1 chooses a block of attention, which is not given"):
        main([*words[:-1], "--attention-layer", "1"])
