"""A step on an image that is read by rows has the logits and gradients of the ordinary step on the whole image."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from luna_vision.execution.streamed import PatchRows, check_streamed, streamed_logits
from luna_vision.images.pixels import Pixels, pixel_statistics
from luna_vision.layers import LunaBlock
from luna_vision.layers.patches import pad_to_patches

from . import test_parallel
from .conftest import OPTIONS, normalised
from .test_mask import blobs

FLIPS = [(False, False), (True, False), (True, True)]
ONCE = [options for i, options in enumerate(OPTIONS) if options not in OPTIONS[:i] and options.get("num_classes") != 0]


def gradients(model, logits) -> dict[str, torch.Tensor]:
    model.zero_grad()
    F.cross_entropy(logits, torch.tensor([1])).backward()
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def ordinary(model, image, valid=None, flip=(False, False)) -> dict[str, torch.Tensor]:
    axes = [axis for axis in (0, 1) if flip[axis]]
    x = pad_to_patches(normalised(model, image), model.patch_embed.patch_size).flip([axis + 2 for axis in axes])
    mask = None if valid is None else torch.from_numpy(np.flip(valid, axes).copy()).view(1, -1)
    torch.manual_seed(5)  # of what is dropped
    return gradients(model, model(x, patch_valid=mask))


def streamed(model, image, valid=None, flip=(False, False), **how) -> dict[str, torch.Tensor]:
    dtype = next(model.parameters()).dtype
    pixels = Pixels(image, model.in_chans, *pixel_statistics(model), dtype)
    torch.manual_seed(5)
    return gradients(model, streamed_logits(model, PatchRows(model, pixels, valid, flip), **how))


def same(got, want, tolerance=1e-10) -> None:
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("options", ONCE, ids=str)
def test_every_option(options, make, photo):
    model = make(**options).train()
    image = photo[100:127, 200:238, : model.in_chans]
    p, q = model.patch_embed.patch_size
    valid = blobs(-(-27 // p), -(-38 // q), "noise")
    valid[0], valid[:, -1] = False, False
    for flip, mask in (((False, False), None), ((True, True), valid)):
        same(streamed(model, image, mask, flip, rows=2), ordinary(model, image, mask, flip))


@pytest.mark.parametrize("size", [(1, 1), (4, 30), (33, 3), (17, 18)])
@pytest.mark.parametrize("flip", FLIPS)
def test_odd_sizes(size, flip, make, photo):
    model, image = make(stem="conv", drop_path_rate=0.5).train(), photo[: size[0], : size[1]]
    same(streamed(model, image, flip=flip, rows=1), ordinary(model, image, flip=flip))


@pytest.mark.parametrize(
    "kind, rows",
    [*((kind, 5) for kind in ("blobs", "diagonal", "rows", "point", "all")), ("blobs", 1), ("blobs", None)],
)
def test_every_mask_and_band(kind, rows, make, photo, tmp_path):
    model, image, valid = make(local_mixing="mlp").train(), photo[:79, :95], blobs(20, 24, kind)
    same(streamed(model, image, valid, rows=rows, store=tmp_path), ordinary(model, image, valid))
    assert not list(tmp_path.iterdir())


def test_a_single_row_or_column_of_valid_patches_is_flipped(make, photo):
    model, image = make().train(), photo[:47, :63]
    for part in np.s_[3, 2:9], np.s_[2:9, 3], np.s_[3, 3]:
        valid = np.zeros((12, 16), bool)
        valid[part] = True
        same(streamed(model, image, valid, (True, True)), ordinary(model, image, valid, (True, True)))


@pytest.mark.parametrize("store", [True, False])
def test_with_a_bfloat16_store_gradients_are_near_and_do_not_depend_on_the_bands(store, make, photo, tmp_path):
    model, image, valid = make().train(), photo[:47, :63], blobs(12, 16, "noise")
    how = {"store_dtype": torch.bfloat16, "store": tmp_path if store else None}
    want, got = ordinary(model, image, valid), streamed(model, image, valid, rows=2, **how)
    torch.testing.assert_close(got["logits"], want["logits"])
    gap = torch.cat([(got[name] - want[name]).flatten() for name in want]).norm()
    assert 0 < gap / torch.cat([value.flatten() for value in want.values()]).norm() < 0.02
    same(streamed(model, image, valid, rows=7, **how), got)


def test_autocast_is_near(make, photo):
    model, image = make(dtype=torch.float32).train(), photo[:47, :63]
    with torch.autocast("cpu", torch.bfloat16):
        want, got = ordinary(model, image), streamed(model, image, rows=2)
    for name, value in want.items():
        assert (got[name] - value).norm() < 0.1 * value.norm() + 1e-3, name


def test_frozen_parts_get_no_gradient(make, photo):
    model = make().train()
    model.patch_embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    got, want = streamed(model, photo[:30, :30]), ordinary(model, photo[:30, :30])
    assert got["patch_embed.proj.weight"] is None and got["blocks.0.norm1.weight"] is None
    same({k: v for k, v in got.items() if v is not None}, {k: v for k, v in want.items() if v is not None})


def test_missing_pixels_are_left_out_as_in_a_masked_step(make, photo):
    model, image = make().train(), photo[:40, :40].astype(np.float32) / 255
    valid = np.ones((10, 10), bool)
    valid[:, 6:] = valid[3] = False
    image[np.kron(~valid, np.ones((4, 4), bool))] = np.nan
    want = ordinary(model, np.nan_to_num(image), valid)
    same(streamed(model, image, valid, rows=3), want)


@pytest.mark.parametrize("local_mixing", ["none", "before"])
def test_blocks_compute_the_valid_patches_alone(local_mixing, make, photo, monkeypatch):
    model, image, valid = make(local_mixing=local_mixing).train(), photo[:79, :95], blobs(20, 24, "noise")
    valid[4:9] = False  # a whole band, too
    seen = []

    def counted(name):
        function = getattr(LunaBlock, name)

        def count(block, x, *args):
            seen.append(x.shape[1])
            return function(block, x, *args)

        monkeypatch.setattr(LunaBlock, name, count)

    counted("pack_tile")
    counted("unpack_tile")
    streamed(model, image, valid, rows=2)
    # both in both passes; of a band without any, one patch
    assert sum(seen) <= 4 * len(model.stages()) * (valid.sum() + 3)


class Watched:
    """An image that tells how many rows were asked for at once, and how often each was read."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.most, self.reads = 0, np.zeros(len(array), int)

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.most = max(self.most, rows.stop - rows.start)
        self.reads[rows] += 1
        return self.array[rows]


def test_few_rows_of_pixels_are_read_at_once_and_each_twice(make, photo):
    image = Watched(photo[:200, :64])
    streamed(make().train(), image, rows=2)
    assert image.most == 8 and (image.reads == 2).all()


def strip_step(group: dist.ProcessGroup, options: dict, flip: tuple[bool, bool], masked: bool, store: Path) -> list:
    """A step of processes that share an image, against that of one; the rows of pixels that this process read."""
    model = test_parallel.make(**options).train()
    image = np.random.default_rng(3).integers(0, 256, (79, 38, model.in_chans)).astype(np.uint8)
    p, q = model.patch_embed.patch_size
    valid = None
    if masked:
        valid = blobs(-(-79 // p), -(-38 // q), "blobs")
        valid[0] = valid[-3:] = valid[:, -1] = False
        valid[6:12] = False  # of three processes, all that the second one has
    want, watched = ordinary(model, image, valid, flip), Watched(image)
    pixels = Pixels(watched, model.in_chans, *pixel_statistics(model), torch.float64)
    model.zero_grad()
    torch.manual_seed(5 + dist.get_rank(group))  # the first process's counts
    logits = streamed_logits(model, PatchRows(model, pixels, valid, flip, group), rows=2, store=store)
    F.cross_entropy(logits, torch.tensor([1])).backward()
    same({"logits": logits.detach()} | test_parallel.average_gradients(model, group), want)
    return np.flatnonzero(watched.reads).tolist()


@pytest.mark.parametrize(
    "options",
    [
        *({"local_mixing": m, "stem": s} for m, s in (("none", "conv"), ("before", "conv"), ("attn", "patch"))),
        *({"local_mixing": "mlp", "global_pool": g, "memory_mlp": "own"} for g in ("avg", "map", "both")),
        *({"last_block": b, "local_mixing": "attn"} for b in ("patches", "both", "final_pack")),
        *({"global_pool": "avgmax", "norm_first": False}, {"pack_by_row": True}, {"patch_size": (4, 6)}),
    ],
    ids=str,
)
def test_processes_that_share_an_image_take_the_step_of_one(options, ranks, tmp_path):
    for count, flip, masked in ((2, (False, False), False), (3, (True, True), True)):
        ranks.run(strip_step, count, options=options, flip=flip, masked=masked, store=tmp_path)


def test_a_process_reads_its_own_rows_alone(ranks):
    for flip in ((False, False), (True, False)):
        how = {"options": {"stem": "patch", "patch_size": 4}, "flip": flip, "masked": False, "store": None}
        first, second = ranks.run(strip_step, 2, **how)[:: -1 if flip[0] else 1]
        assert first == list(range(40)) and second == list(range(40, 79))


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_is_kept_is_the_inputs_of_the_blocks_on_the_disk_if_there_is_a_store(on_disk, make, photo, tmp_path):
    """Numbers that autograd holds in memory, of an image that is twice as large."""
    model = make(depth=2, embed_dim=32, global_pool="avg", dtype=torch.float32).train()

    def kept(side: int) -> int:
        sizes = {}

        def note(x):
            mapped = any(str(tmp_path) in line for line in _maps(x.data_ptr()))
            sizes[x.data_ptr()] = 0 if mapped else x.numel()
            return x

        pixels = Pixels(photo[:side, :64], 3, *pixel_statistics(model))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            streamed_logits(model, PatchRows(model, pixels), rows=2, store=tmp_path if on_disk else None)
        return sum(sizes.values())

    patches = (128 - 64) // 4 * 16
    assert kept(128) - kept(64) == (0 if on_disk else 3 * patches * 32)  # of two blocks, and of the norm


def _maps(address: int) -> list[str]:
    """The line of this process's memory map that an address is in."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    return [line for line, (start, stop) in zip(lines, ends, strict=True) if start <= address < stop]


def test_a_full_or_missing_disk_is_said(make, photo, tmp_path):
    with pytest.raises(OSError, match="there is no room for .* bytes"):
        streamed(make().train(), photo[:30, :30], store=tmp_path / "missing")


@pytest.mark.parametrize(
    "options",
    [
        *({"pos_drop_rate": 0.1}, {"patch_drop_rate": 0.1}, {"proj_drop_rate": 0.1}),
        *({"global_pool": ""}, {"num_classes": 0}, {"mixer": "softmax", "global_pool": "avg"}),
    ],
    ids=str,
)
def test_what_does_not_go_is_said(options, make):
    with pytest.raises(ValueError, match="need"):
        check_streamed(make(**options))
