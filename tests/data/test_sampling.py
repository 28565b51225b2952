"""Augmentation is a function of (seed, epoch, index): whatever worker draws it, and after a resume."""

import pickle
import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler

from luna_vision.data import DigitsDataModule, EpochSampler, sample_seed
from luna_vision.data.sampling import seeded_rng

BACKENDS = {
    "albumentations": {"hflip": 0.5, "color_jitter": 0.4},
    "torchvision": {"auto_augment": "randaugment"},
    "timm": {"auto_augment": "rand-m9-mstd0.5-inc1", "in_chans": 3},
}


class FixedOrder(EpochSampler):
    """The same few images in the same order in each epoch, so that only augmentation can tell epochs apart."""

    def __iter__(self):
        return ((epoch, i % 4) for i, (epoch, _) in enumerate(super().__iter__()))


def epochs(backend: str, num_workers: int, count: int = 2, seed: int = 0) -> torch.Tensor:
    """(count, 16, C, 16, 16): four images, four times over, for some epochs in a row with persistent workers."""
    module = DigitsDataModule(img_size=16, augmentation=backend, random_erasing=0.3, seed=seed, **BACKENDS[backend])
    dataset = module.dataset("train")
    sampler = FixedOrder(range(16))
    loader = DataLoader(dataset, 4, sampler=sampler, num_workers=num_workers, persistent_workers=num_workers > 0)
    batches = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        batches.append(torch.cat([images for images, _ in loader]))
    return torch.stack(batches)


@pytest.mark.parametrize("backend", BACKENDS)
def test_epochs_differ_and_workers_do_not_matter(backend: str):
    reference = epochs(backend, num_workers=0)
    assert not torch.equal(reference[0], reference[1])
    assert torch.equal(reference, epochs(backend, num_workers=0))  # a second run
    for num_workers in (1, 2):
        assert torch.equal(reference, epochs(backend, num_workers))
    assert not torch.equal(reference, epochs(backend, num_workers=0, seed=1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_workers_draw_different_augmentations(backend: str):
    """Twenty indices of one and the same image over two workers: no two augmented alike."""
    dataset = DigitsDataModule(img_size=16, augmentation=backend, rotate=30, **BACKENDS[backend]).dataset("train")
    dataset.source.images[:20] = dataset.source.images[0]
    loader = DataLoader(dataset, 5, sampler=EpochSampler(range(20)), num_workers=2)
    images = torch.cat([images for images, _ in loader])
    assert len({image.numpy().tobytes() for image in images}) == 20


def test_seeds_do_not_collide():
    seeds = {sample_seed(s, e, i) for s in range(3) for e in range(10) for i in range(1000)}
    assert len(seeds) > 29_990  # 30,000 draws of 32 bits collide 0.1 times on average
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_seeded_rng_restores_the_global_generators():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    with seeded_rng(3):
        first = draw()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    expected = draw()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    with seeded_rng(3):
        assert draw() == first
    assert draw() == expected


def test_sampler_loses_and_repeats_nothing():
    sampler = EpochSampler(range(101), seed=5)
    assert isinstance(sampler, DistributedSampler)  # Lightning would replace anything else under DDP
    orders = []
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        pairs = list(sampler)
        assert {e for e, _ in pairs} == {epoch}
        assert sorted(i for _, i in pairs) == list(range(101))
        orders.append([i for _, i in pairs])
    assert orders[0] != orders[1]


def test_sampler_shares_the_epoch_between_ranks():
    ranks = [list(EpochSampler(range(101), num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 51
    assert {i for pairs in ranks for _, i in pairs} == set(range(101))  # one repetition is DistributedSampler's padding


def test_sampler_begins_where_it_is_told_once():
    sampler = EpochSampler(range(10), seed=3)
    sampler.set_epoch(7)
    whole = list(sampler)
    sampler.begin(7, 4)
    assert list(sampler) == whole[4:]
    assert list(sampler) == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_goes_on_within_an_epoch(num_workers):
    """What a resumed run is shown is what the interrupted one would have been shown."""
    module = DigitsDataModule(img_size=16, batch_size=64, num_workers=num_workers)
    loader = module.train_dataloader()
    loader.sampler.set_epoch(2)
    whole = list(loader)
    module._next_batch = lambda: (2, 10)
    rest = list(module.train_dataloader())
    assert len(rest) == len(whole) - 10
    for (images, targets), (again, labels) in zip(whole[10:], rest, strict=True):
        assert torch.equal(images, again) and torch.equal(targets, labels)


def test_datasets_can_be_pickled_for_spawned_workers():
    for backend in BACKENDS:
        module = DigitsDataModule(img_size=16, augmentation=backend, random_erasing=0.5, **BACKENDS[backend])
        for split in ("train", "val"):
            dataset = module.dataset(split)
            assert torch.equal(pickle.loads(pickle.dumps(dataset))[3][0], dataset[3][0])


class Recorder(L.LightningModule):
    """Trains nothing; remembers what it was shown."""

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


def fit(max_epochs: int, num_workers: int, ckpt_path: str | None = None, callbacks: list | None = None):
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        limit_train_batches=3,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=bool(callbacks),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DigitsDataModule(img_size=16, batch_size=8, num_workers=num_workers), ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saved", ["after_fit", "on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_sees_what_the_uninterrupted_run_sees(saved: str, num_workers: int, tmp_path):
    whole, _ = fit(3, num_workers)
    path = str(tmp_path / "last.ckpt")
    if saved == "after_fit":
        _, trainer = fit(2, num_workers)
        trainer.save_checkpoint(path)
    else:
        checkpoint = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=saved == "on_train_epoch_end")
        fit(2, num_workers, callbacks=[checkpoint])
    resumed, _ = fit(3, num_workers, ckpt_path=path)
    assert sorted(resumed.seen) == [2]
    assert not torch.equal(whole.seen[2][0], whole.seen[0][0])
    assert len(resumed.seen[2]) == len(whole.seen[2]) == 3
    assert all(map(torch.equal, resumed.seen[2], whole.seen[2]))
