"""Tiles that cannot be read: by request they are filled or left out, and counted."""

import numpy as np
import openslide
import pytest
import tifffile
import torch

from luna_vision.cli.encode import main
from luna_vision.execution import encode
from luna_vision.execution.checkpoint import Checkpoint
from luna_vision.images import open_image
from luna_vision.images.slides import open_slide

from .conftest import close, normalised

TILE = 32  # of the files; patches have 4 pixels


class Torn:
    """An image of tiles, some of which raise."""

    def __init__(self, array: np.ndarray, broken: set[tuple[int, int]], **others) -> None:
        self.array, self.broken, self.shape, self.dtype = array, broken, array.shape, array.dtype
        self.chunks = (TILE, TILE)
        vars(self).update(others)

    def window(self, rows: slice, columns: slice) -> np.ndarray:
        for row, column in self.broken:
            y, x = row * TILE, column * TILE
            if rows.start < y + TILE and y < rows.stop and columns.start < x + TILE and x < columns.stop:
                raise RuntimeError(f"tile {row} {column} is damaged")
        return self.array[rows, columns]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.window(rows, slice(0, self.shape[1]))

    def gone(self) -> np.ndarray:
        """(H, W) bool, the pixels in broken tiles."""
        found = np.zeros(self.shape[:2], bool)
        for row, column in self.broken:
            found[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = True
        return found


@torch.no_grad()
def reference(model, image: np.ndarray, gone: np.ndarray, skip: bool):
    """The model's memory and logits where pixels that are gone are the mean, or their patches are left out."""
    x = normalised(model, image).masked_fill(torch.from_numpy(gone), 0.0)
    p = model.patch_embed.patch_size[0]
    there = np.pad(~gone, [(0, -n % p) for n in gone.shape])
    valid = there.reshape(there.shape[0] // p, p, -1, p).any(axis=(1, 3))
    mask = torch.from_numpy(valid).view(1, -1) if skip else None
    return model.encode(x, patch_valid=mask)[1][0], model(x, patch_valid=mask)[0], valid


@pytest.mark.parametrize("policy", ["fill", "skip"])
@pytest.mark.parametrize("side", [4, 6])  # which divides the tiles, or not
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_broken_tiles(policy, side, dtype, make, photo):
    model, image = make(patch_size=side), photo[:150, :170]
    image = image if dtype == np.uint8 else (image / 255).astype(np.float32)
    torn = Torn(image, {(0, 0), (1, 3), (2, 2), (2, 3), (4, 5)})
    memory, logits, valid = reference(model, image, torn.gone(), policy == "skip")
    got = encode(model, torn, on_error=policy, band_rows=3, progress=False)
    close(got.raw_memory, memory, 1e-6 if dtype == np.float32 else 1e-10)
    close(got.logits, logits, 1e-6 if dtype == np.float32 else 1e-10)
    assert got.broken_tiles == 5
    assert (got.patch_valid is None) if policy == "fill" else np.array_equal(got.patch_valid, valid)
    with pytest.raises(OSError, match="tile 0 0 is damaged"):
        encode(model, torn, progress=False)


def test_with_a_mask_and_a_fill(make, photo):
    model, image = make(), photo[:150, :170]
    torn, mask = Torn(image, {(1, 1), (3, 4)}), np.zeros((38, 43), bool)
    mask[5:30, 4:20] = True  # the second broken tile is not looked at
    got = encode(model, torn, on_error="skip", mask=mask, progress=False)
    gone = torn.gone() | ~np.kron(mask, np.ones((4, 4), bool))[:150, :170]
    close(got.logits, reference(model, image, gone, True)[1], 1e-10)
    assert got.broken_tiles == 1
    grey = np.where(torn.gone()[:, :, None], np.uint8(51), image)
    got = encode(model, torn, on_error="fill", fill=51, progress=False)
    close(got.logits, encode(model, grey, progress=False).logits, 1e-10)


@pytest.mark.parametrize("policy", ["fill", "skip"])
def test_a_resumed_run_counts_all(policy, make, photo, tmp_path, monkeypatch):
    model, torn = make(), Torn(photo[:150, :170], {(0, 2), (3, 4)})
    want, save = encode(model, torn, on_error=policy, band_rows=4, progress=False), Checkpoint.save
    how = {"on_error": policy, "band_rows": 4, "store": tmp_path / "store", "progress": False}

    def stop(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Checkpoint, "save", stop)
            encode(model, torn, **how)
    with pytest.raises(ValueError, match="with other on error"):
        encode(model, torn, **how | {"on_error": "raise"})
    got = encode(model, torn, **how)
    assert torch.equal(got.logits, want.logits) and got.broken_tiles == want.broken_tiles == 2


def test_an_image_without_a_whole_tile_is_refused(make, photo):
    torn = Torn(photo[:60, :60], {(0, 0), (0, 1), (1, 0), (1, 1)})
    with pytest.raises(OSError, match="all of its 4 tiles are broken"):
        encode(make(), torn, on_error="fill", progress=False)
    with pytest.raises(ValueError, match="has no pixel that is not missing"):
        encode(make(), torn, on_error="skip", progress=False)
    with pytest.raises(ValueError, match="on_error must be one of 'raise', 'fill', 'skip'"):
        encode(make(), photo, on_error="ignore")


def damaged(path, image: np.ndarray, tiles: list[int]) -> None:
    tifffile.imwrite(path, image, photometric="rgb", tile=(TILE, TILE), compression="deflate")
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        for tile in tiles:
            offset, count = file.pages[0].dataoffsets[tile], file.pages[0].databytecounts[tile]
            content[offset : offset + count] = b"\xff" * count
    path.write_bytes(content)


def test_a_tiff_and_a_region_of_it(make, photo, tmp_path):
    """A tile is broken as a whole, wherever the region begins."""
    model, image = make(), photo[:200, :256]
    damaged(tmp_path / "a.tif", image, [10, 27])  # of 8 a row: row 1 column 2, row 3 column 3
    gone = Torn(image, {(1, 2), (3, 3)}).gone()
    got = encode(model, open_image(tmp_path / "a.tif"), on_error="fill", progress=False)
    close(got.logits, reference(model, image, gone, False)[1], 1e-10)
    region = open_image(tmp_path / "a.tif", region=(45, 39, 150, 130))
    got = encode(model, region, on_error="fill", progress=False)
    close(got.logits, reference(model, image[39:169, 45:195], gone[39:169, 45:195], False)[1], 1e-10)
    assert got.broken_tiles == 2


def test_the_command_counts(photo, tmp_path, capsys):
    damaged(tmp_path / "a.tif", photo[:96, :96], [4])
    words = [str(tmp_path / "a.tif"), "--model", "test_luna_vit", "--out", str(tmp_path / "o.npz"), "--device", "cpu"]
    assert main([*words, "--on-error", "fill"]) == 0
    assert capsys.readouterr().out.endswith("96 x 96 pixels, 6 x 6 patches; 1 broken tile\n")
    assert '"broken_tiles": 1' in str(np.load(tmp_path / "o.npz")["about"])
    assert main([*words, "--on-error", "skip", "--overwrite"]) == 0
    assert "32 of them looked at; 1 broken tile" in capsys.readouterr().out


def test_openslide_reads_on_after_an_error(make, photo, tmp_path):
    """OpenSlide itself reads nothing more of a slide in which it has met an error."""
    image = photo[:256, :256]
    description = "Aperio Image Library v10\r\n256x256 [0,0 256x256] (64x64) JPEG/RGB Q=90|AppMag = 20|MPP = 0.5"
    tifffile.imwrite(
        tmp_path / "a.svs", image, photometric="rgb", tile=(64, 64), compression="jpeg", description=description
    )
    content = bytearray((tmp_path / "a.svs").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.svs") as file:
        offset, count = file.pages[0].dataoffsets[5], file.pages[0].databytecounts[5]
    content[offset : offset + count] = b"\x00" * count
    (tmp_path / "a.svs").write_bytes(content)
    opened = open_slide(tmp_path / "a.svs").open(0)
    with pytest.raises(openslide.OpenSlideError):
        opened[64:128]
    assert opened[0:64].shape == (64, 256, 3)
    assert encode(make(), opened, on_error="fill", progress=False).broken_tiles == 1
