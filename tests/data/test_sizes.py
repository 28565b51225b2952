"""Batches of several sizes: as many patches in each, every image once, and the same ones wherever they are loaded."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from luna_vision.data import CanvasDataModule, DigitsDataModule
from luna_vision.data.sizes import SizeSampler, parse_sizes, patches_of

SIZES = [(16, 16), (32, 32), (16, 24)]
DIGITS = {"img_size": 32, "batch_size": 16, "patch_size": 8, "train_sizes": [16, 32, [16, 24]]}


def sampler(length: int = 1001, **kwargs) -> SizeSampler:
    return SizeSampler(range(length), SIZES, patch_size=8, patches=64, seed=5, **kwargs)


def batches(sampler: SizeSampler, epoch: int = 0, start: int = 0) -> list[tuple[tuple[int, int], list[int]]]:
    sampler.begin(epoch, start)
    out = []
    for keys in sampler:
        ((of, size),) = {(e, s) for e, _, s in keys}
        assert of == epoch
        out.append((size, [index for _, index, _ in keys]))
    return out


def test_batches_have_as_many_patches_and_sizes_as_many_batches():
    whole = batches(sampler())
    images = {size: {len(indices) for s, indices in whole[:-1] if s == size} for size in SIZES}
    assert images == {(16, 16): {16}, (32, 32): {4}, (16, 24): {11}}  # of 4, 16 and 6 patches, to make 64
    counts = [sum(size == s for size, _ in whole) for s in SIZES]
    assert max(counts) - min(counts) <= 1
    assert len(whole[-1][1]) == 1001 % (16 + 4 + 11) % 16  # what is left comes last


def test_every_image_is_seen_once_in_an_order_that_is_new_in_each_epoch():
    ours = sampler()
    first, second = batches(ours, 0), batches(ours, 1)
    for whole in (first, second):
        assert sorted(index for _, indices in whole for index in indices) == list(range(1001))
        assert len(whole) == len(ours)  # a schedule counts on it
    assert first[:10] != second[:10] and [size for size, _ in first] != [size for size, _ in second]
    assert batches(sampler(), 1) == second
    sizes = [size for size, _ in first]
    assert any(a == b for a, b in zip(sizes, sizes[1:], strict=False))  # drawn, and not in turn


def test_goes_on_within_an_epoch_once():
    ours = sampler()
    whole = batches(ours, 3)
    assert batches(ours, 3, start=7) == whole[7:]
    assert batches(ours, 3) == whole


def test_last_batch_can_be_left_out():
    whole, cut = batches(sampler()), batches(sampler(drop_last=True))
    assert cut == whole[:-1] and len(sampler(drop_last=True)) == len(cut)
    assert len(batches(sampler(length=3, drop_last=True))) == 1  # unless it is the only one


def test_ranks_have_the_same_size_and_other_images():
    ranks = [batches(sampler(length=1000, num_replicas=2, rank=rank), epoch=2) for rank in (0, 1)]
    assert [(size, len(indices)) for size, indices in ranks[0]] == [(size, len(indices)) for size, indices in ranks[1]]
    seen = [[index for _, indices in whole for index in indices] for whole in ranks]
    assert sorted(seen[0] + seen[1]) == list(range(1000))
    assert isinstance(sampler(), DistributedSampler)  # Lightning would replace anything else under DDP


@pytest.mark.parametrize("length", [1, 31, 39, 61])  # one less than fills the batches of both
def test_ranks_leave_out_what_cannot_be_shared_out(length):
    ranks = [batches(sampler(length=length, num_replicas=2, rank=rank, drop_last=True)) for rank in (0, 1)]
    seen = [index for whole in ranks for _, indices in whole for index in indices]
    assert len(seen) == len(set(seen)) or length == 1


def test_loader_goes_on_within_an_epoch_whatever_the_workers():
    reference = check_loader(num_workers=0)
    for (images, targets), (others, labels) in zip(reference, check_loader(num_workers=2), strict=True):
        assert torch.equal(images, others) and torch.equal(targets, labels)


def check_loader(num_workers: int) -> list[list[torch.Tensor]]:
    """All batches of an epoch; the last of them are those of a loader that goes on."""
    module = DigitsDataModule(**DIGITS, num_workers=num_workers)
    loader = module.train_dataloader()
    assert isinstance(loader.sampler, DistributedSampler)
    module._next_batch = loader.next_batch = lambda: (2, 0)
    whole = list(loader)
    assert {tuple(images.shape[-2:]) for images, _ in whole} == set(SIZES)
    assert all(len(images) * patches_of(images.shape[-2:], 8) in (256, 258) for images, _ in whole)
    module._next_batch = lambda: (2, 10)
    rest = list(module.train_dataloader())
    assert len(rest) == len(whole) - 10
    for (images, targets), (again, labels) in zip(whole[10:], rest, strict=True):
        assert torch.equal(images, again) and torch.equal(targets, labels)
    return whole


def test_evaluation_is_at_one_size_and_augmentation_at_that_of_the_batch():
    module = DigitsDataModule(**DIGITS, num_workers=0, augmentation="none")
    assert {tuple(images.shape[-2:]) for images, _ in module.val_dataloader()} == {(32, 32)}
    assert module.timm_cfg()["input_size"] == (1, 32, 32)
    dataset = pickle.loads(pickle.dumps(module.dataset("train")))  # for spawned workers
    small, _ = dataset[(0, 3, (16, 24))]
    plain = DigitsDataModule(img_size=[16, 24], num_workers=0, augmentation="none").dataset("train")
    assert torch.equal(small, plain[3][0])


def test_canvases_are_drawn_at_the_size():
    canvas = {"num_items": 2, "item_size": 12, "patch_size": 8, "num_workers": 0, "batch_size": 8, "num_train": 40}
    module = CanvasDataModule(side=64, train_sizes=[64, 96], **canvas)
    images = {tuple(images.shape[-2:]): images for images, _ in module.train_dataloader()}
    assert set(images) == {(64, 64), (96, 96)} and len(images[(96, 96)]) == 4
    dataset, large = module.dataset("train"), CanvasDataModule(side=96, **canvas).dataset("train")
    assert torch.equal(dataset[(0, 5, (96, 96))][0], large[5][0])
    source = dataset.source
    assert np.array_equal(source.canvas(5).image, source.at((64, 64)).canvas(5).image)
    spans = [(box[2:] - box[:2]).max() for box in source.at((96, 96)).canvas(5).boxes]
    assert max(spans) <= 12


def test_faults_are_skipped_at_a_size_too():
    module = DigitsDataModule(**DIGITS, num_workers=0, on_error="skip", augmentation="none")
    dataset = module.dataset("train")
    source = dataset.source
    dataset.source = [source[i] if i != 3 else (None, 0) for i in range(10)]
    assert torch.equal(dataset[(0, 3, (16, 16))][0], dataset[(0, 4, (16, 16))][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_sizes": []}, "at least one size"),
        ({"train_sizes": [20]}, "multiples of patch_size=8, got 20"),
        ({"train_sizes": [16, [16, 20]]}, r"multiples of patch_size=8, got \[16, 20\]"),
        ({"train_sizes": [[16, 16, 16]]}, r"side or \[height, width\]"),
        ({"train_sizes": [0]}, "got 0"),
        ({"train_sizes": [16, [16, 16]]}, r"\[16, 16\] more than once|16 more than once"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**{**DIGITS, **arguments})


def test_bad_canvases():
    with pytest.raises(ValueError, match=r"canvases are square: train_sizes must be sides, got \[64, 96\]"):
        CanvasDataModule(side=64, num_items=2, item_size=12, patch_size=8, train_sizes=[[64, 96]])
    with pytest.raises(ValueError, match="do not fit loosely on a canvas of side 32"):
        CanvasDataModule(side=64, num_items=2, item_size=12, patch_size=8, train_sizes=[32])


def test_sizes_are_pairs():
    assert parse_sizes([96, [96, 160]], 16) == [(96, 96), (96, 160)]
