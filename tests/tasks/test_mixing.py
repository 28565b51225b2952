# ruff: noqa: NPY002  (the global generator is what is tested)
import numpy as np
import pytest
import torch
from timm.data import Mixup

from luna_vision.tasks import StepMixup


def batch(count: int = 6):
    return torch.rand(count, 3, 8, 8), torch.arange(count) % 4


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_draws_depend_on_seed_and_step_alone(mode):
    images, targets = batch()
    mix = StepMixup(Mixup(0.8, 1.0, mode=mode, num_classes=4), seed=1)
    first = mix(images.clone(), targets, (5, 0, 0))
    np.random.rand(7)
    again = mix(images.clone(), targets, (5, 0, 0))
    other = mix(images.clone(), targets, (6, 0, 0))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[1], other[1])


def test_global_numpy_state_is_restored():
    np.random.seed(3)
    expected = np.random.rand(2)
    np.random.seed(3)
    drawn = [np.random.rand()]
    StepMixup(Mixup(0.8, 1.0, num_classes=4))(*batch(), (9, 9))
    drawn.append(np.random.rand())
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_soft_targets_of_odd_batches(count):
    images, targets = batch(count)
    mixed, soft = StepMixup(Mixup(0.8, 0.0, label_smoothing=0.1, num_classes=4))(images.clone(), targets, (0,))
    assert mixed.shape == images.shape and soft.shape == (count, 4)
    torch.testing.assert_close(soft.sum(1), torch.ones(count))
    if count % 2:  # the last image has no partner
        torch.testing.assert_close(mixed[-1], images[-1])
        assert soft[-1].argmax() == targets[-1] and soft[-1].max() == pytest.approx(0.925)


def test_images_and_targets_share_the_weight():
    images = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    mixed, soft = StepMixup(Mixup(1.0, 0.0, label_smoothing=0.0, num_classes=2))(images, torch.tensor([0, 1]), (4,))
    torch.testing.assert_close(mixed[:, 0, 0, 0], soft[:, 1])
