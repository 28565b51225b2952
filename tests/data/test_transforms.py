"""Augmentation backends, evaluation transform, and what they refuse."""

import pickle
import random

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from timm.data import auto_augment
from timm.data.auto_augment import AugmentOp

from luna_vision.data import AUGMENTATIONS, train_transform
from luna_vision.data.transforms import TORCHVISION_POLICIES, Augmentation, AugmentationError
from luna_vision.images.transforms import eval_transform, to_tensor
from luna_vision.images.values import Values


def photo(height: int, width: int, in_chans: int = 3) -> Image.Image:
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(array).convert("RGB" if in_chans == 3 else "L")


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("crop", ["resized", "pad", "none"])
@pytest.mark.parametrize("backend", AUGMENTATIONS)
def test_every_backend_and_crop_at_odd_sizes(backend: str, crop: str, in_chans: int):
    mean, std = (0.4,) * in_chans, (0.2,) * in_chans
    aug = Augmentation(size=(23, 37), crop=crop, rotate=15, mean=mean)
    transform = train_transform(backend, aug, mean, std, random_erasing=1.0)
    for height, width in ((23, 37), (5, 61), (200, 90)):
        image = transform(photo(height, width, in_chans), seed=3)
        assert image.shape == (in_chans, 23, 37) and image.dtype == torch.float32 and image.isfinite().all()
        assert torch.equal(image, transform(photo(height, width, in_chans), seed=3))
        assert not torch.equal(image, transform(photo(height, width, in_chans), seed=4))  # "none" still erases


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(
    "backend, policy",
    [("timm", p) for p in ("rand-m9-mstd0.5-inc1", "augmix-m3", "original", "3a")]
    + [("torchvision", p) for p in TORCHVISION_POLICIES],
)
def test_auto_augment_policies(backend: str, policy: str, in_chans: int):
    mean = (0.4,) * in_chans
    transform = train_transform(backend, Augmentation((24, 24), auto_augment=policy, mean=mean), mean, mean)
    images = [transform(photo(40, 30, in_chans), seed) for seed in range(12)]
    assert all(image.shape == (in_chans, 24, 24) for image in images)
    assert len({image.numpy().tobytes() for image in images}) == 12


def posterize_of_pillow_12(image: Image.Image, bits: int) -> Image.Image:
    mask = ~(2 ** (8 - bits) - 1)
    return image.point([value & mask for value in range(256)] * len(image.getbands()))


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(
    "policy", ["rand-m9-n4-mstd0.5-inc1", "rand-m1-n4-p1", "rand-m30-mmax30-inc1", "v0", "augmix-m10-mstd1"]
)
def test_policies_of_timm_do_what_they_did_before_pillow_13(policy: str, in_chans: int, monkeypatch):
    """0 bits of posterize, and less, which Pillow 13 refuses, are black."""
    mean, image = (0.4,) * in_chans, photo(20, 24, in_chans)
    aug = Augmentation((20, 24), crop="none", hflip=0, auto_augment=policy, mean=mean)
    ours = train_transform("timm", aug, (0.0,) * in_chans, (1.0,) * in_chans)
    ours = pickle.loads(pickle.dumps(ours))  # as for a worker that is spawned
    options = {"interpolation": "bicubic", "hflip": 0, "mean": mean, "normalize": False}
    theirs = timm.data.create_transform((20, 24), is_training=True, auto_augment=policy, **options)
    policies = theirs.transforms[1:]  # after the crop
    results = [ours(image, seed) for seed in range(100)]
    bits = []
    monkeypatch.setattr(ImageOps, "posterize", lambda image, n: bits.append(n) or posterize_of_pillow_12(image, n))
    for seed, result in enumerate(results):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - which timm draws from
        expected = image
        for step in policies:
            expected = step(expected)
        torch.testing.assert_close(result, torch.as_tensor(expected) / 255, rtol=0, atol=0)
    assert min(bits) < 1


def test_timm_itself_is_left_as_it_is():
    before = dict(auto_augment.NAME_TO_OP), auto_augment.posterize
    train_transform("timm", Augmentation((8, 8), auto_augment="rand-m9", mean=(0.5,) * 3), (0.5,) * 3, (0.5,) * 3)
    assert (dict(auto_augment.NAME_TO_OP), auto_augment.posterize) == before


SAMPLES = [Image.fromarray(image).resize((80, 60)) for image in load_sample_images().images]  # of scikit-learn
RAND = [("", 15, 8), ("-inc1", 15, 8), ("-inc1-t3a", 3, 8), ("-t3aw", 14, 14), ("-tweights", 15, 15)]


@pytest.mark.slow
@pytest.mark.parametrize("in_chans, magnitude", [(3, 0), (1, 4), (3, 10)])
@pytest.mark.parametrize("options, operations, layers", RAND)
def test_every_operation_of_randaugment_at_any_magnitude(
    options: str, operations: int, layers: int, magnitude: int, in_chans: int, monkeypatch
):
    """On photographs; exact magnitudes, and noise around them. Weighted sets draw each operation once an image."""
    done, call = set(), AugmentOp.__call__
    monkeypatch.setattr(AugmentOp, "__call__", lambda op, image: done.add(op.name) or call(op, image))
    for noise in ("", "-mstd0.5"):
        policy = f"rand-m{magnitude}-n{layers}-p1{noise}{options}"
        aug = Augmentation((32, 48), crop="none", auto_augment=policy, mean=(0.4,) * in_chans)
        check_on_photographs(train_transform("timm", aug, (0.0,), (1.0,)), in_chans, seeds=8)
    assert len(done) == operations


@pytest.mark.slow
@pytest.mark.parametrize("in_chans, noise", [(3, ""), (1, "-mstd3")])
@pytest.mark.parametrize("policy", ["v0", "v0r", "original", "originalr", "3a", "augmix-m0", "augmix-m10"])
def test_every_other_policy_of_timm(policy: str, noise: str, in_chans: int):
    aug = Augmentation((32, 48), crop="none", auto_augment=policy + noise, mean=(0.4,) * in_chans)
    check_on_photographs(train_transform("timm", aug, (0.0,), (1.0,)), in_chans, seeds=40)


@pytest.mark.slow
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("policy", TORCHVISION_POLICIES)
def test_every_policy_of_torchvision(policy: str, in_chans: int):
    """Of which one has 14 operations at up to 31 magnitudes each."""
    aug = Augmentation((32, 48), crop="none", auto_augment=policy, mean=(0.4,) * in_chans)
    check_on_photographs(train_transform("torchvision", aug, (0.0,), (1.0,)), in_chans, seeds=200)


def check_on_photographs(transform, in_chans: int, seeds: int) -> None:
    for sample in SAMPLES:
        image = sample.convert("RGB" if in_chans == 3 else "L")
        for seed in range(seeds):
            result = transform(image, seed)
            assert result.shape == (in_chans, 32, 48) and 0 <= result.min() and result.max() <= 1


def test_what_fails_in_an_augmentation_is_no_mistake_of_the_user(monkeypatch):
    """Nor a broken image: neither a ValueError, which is reported as such, nor a SampleError, which is skipped."""

    def backend(aug: Augmentation):
        return lambda image, seed: ImageOps.posterize(image, 9)

    monkeypatch.setitem(AUGMENTATIONS, "broken", backend)
    with pytest.raises(AugmentationError, match="RGB image of 6 x 4 pixels with seed 7 failed: ValueError") as caught:
        train_transform("broken", Augmentation((8, 8)), (0.5,), (0.5,))(photo(4, 6), 7)
    assert isinstance(caught.value.__cause__, ValueError) and not isinstance(caught.value, (ValueError, OSError))


@pytest.mark.parametrize("backend", ["albumentations", "torchvision", "timm"])
def test_flip_is_as_probable_as_asked(backend: str):
    image = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8) * 16, (16, 1)))
    for p, expected in ((0.0, {False}), (1.0, {True}), (0.5, {False, True})):
        aug = Augmentation((16, 16), crop="none", hflip=p, color_jitter=0, mean=(0.5,))
        transform = train_transform(backend, aug, (0.0,), (1.0,))
        flipped = {bool((transform(image, seed)[0, 0].diff() < 0).all()) for seed in range(20)}
        assert flipped == expected


@pytest.mark.parametrize("backend", ["albumentations", "torchvision", "timm"])
def test_pad_crop_moves_by_at_most_the_padding(backend: str):
    array = np.zeros((16, 16), np.uint8)
    array[8, 8] = 255
    aug = Augmentation((16, 16), crop="pad", crop_padding=3, hflip=0, color_jitter=0, mean=(0.5,))
    transform = train_transform(backend, aug, (0.0,), (1.0,))
    places = {divmod(int(transform(Image.fromarray(array), seed).argmax()), 16) for seed in range(200)}
    assert {row for row, _ in places} == {column for _, column in places} == set(range(5, 12))


def test_evaluation_resizes_and_normalises():
    transform = eval_transform((8, 8), (0.5,) * 3, (0.25,) * 3)
    assert torch.allclose(transform(Image.new("RGB", (30, 20), (255, 0, 51)), 0)[:, 4, 4], torch.tensor([2, -2, -1.2]))


def test_evaluation_keeps_the_aspect_ratio_with_crop_pct():
    """The centre 80 x 80 of a 100 x 200 image, whose left and right quarters are white."""
    array = np.zeros((100, 200, 3), np.uint8)
    array[:, :50] = array[:, 150:] = 255
    whole = eval_transform((32, 32), (0.0,), (1.0,))(Image.fromarray(array), 0)
    centre = eval_transform((32, 32), (0.0,), (1.0,), crop_pct=0.8)(Image.fromarray(array), 0)
    assert whole.mean() == pytest.approx(0.5, abs=0.05) and centre.mean() < 0.01
    for size in ((3, 500), (500, 3), (1, 1)):
        assert eval_transform((24, 40), (0.0,), (1.0,), crop_pct=0.9)(photo(*size), 0).shape == (3, 24, 40)


def test_to_tensor_accepts_what_backends_return():
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    expected = torch.from_numpy(array).permute(2, 0, 1) / 255
    for image in (array, Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1)):
        assert torch.equal(to_tensor(image), expected)
    assert torch.equal(to_tensor(array[..., 0]), expected[:1])


def test_unknown_names_list_the_options():
    aug = Augmentation((8, 8))
    with pytest.raises(ValueError, match="augmentation must be one of 'albumentations', .*, got 'imgaug'"):
        train_transform("imgaug", aug, (0.5,), (0.5,))
    with pytest.raises(ValueError, match="crop must be one of 'resized', 'pad', 'none', got 'centre'"):
        Augmentation((8, 8), crop="centre")
    named = Augmentation((8, 8), auto_augment="handaugment", mean=(0.5,) * 3)
    with pytest.raises(ValueError, match="auto_augment of torchvision must be one of 'randaugment', "):
        train_transform("torchvision", named, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="timm does not know auto_augment 'handaugment'"):
        train_transform("timm", named, (0.5,) * 3, (0.5,) * 3)
    for backend in ("albumentations", "none"):
        with pytest.raises(ValueError, match="auto_augment needs augmentation 'timm' or 'torchvision'"):
            train_transform(backend, named, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    "argument, message",
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must be 0 < smallest"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale must be 0 < smallest"),
        ({"crop_scale": (0.5,)}, "crop_scale must be 0 < smallest"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio must be 0 < smallest"),
        ({"hflip": 1.5}, "hflip must be in"),
        ({"rotate": -1}, "rotate must be finite and not negative, got -1"),
        ({"crop_padding": -1}, "crop_padding must be finite and not negative"),
        ({"color_jitter": -0.1}, "color_jitter must be finite and not negative"),
        ({"color_jitter": float("nan")}, "color_jitter must be finite and not negative, got nan"),
    ],
)
def test_amounts_out_of_range(argument: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Augmentation((8, 8), **argument)


def test_crop_pct_out_of_range():
    with pytest.raises(ValueError, match=r"crop_pct must be in \(0, 1\], got 1.5"):
        eval_transform((8, 8), (0.5,), (0.5,), crop_pct=1.5)


@pytest.mark.parametrize("backend", ["albumentations", "torchvision"])
def test_pixels_of_many_levels_stay_in_their_range(backend):
    """Also where a crop is enlarged, which overshoots at edges."""
    image = np.indices((12, 12)).sum(0, keepdims=True).transpose(1, 2, 0) % 2 * np.float32(1)
    aug = Augmentation((32, 48), crop_scale=(0.2, 0.5), color_jitter=0.0, mean=(0.4,))
    transform = train_transform(backend, aug, (0.0,), (1.0,), values=Values(mean=(0.4,)))
    for seed in range(5):
        result = transform(image, seed)
        assert 0 <= result.min() and 1 >= result.max() > 0.99
