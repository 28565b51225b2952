"""Four images side by side, so that a larger image has more in it."""

import numpy as np

from luna_vision.data import ImageDataModule
from luna_vision.data.images import Source, TransformedDataset, known_labels

__all__ = ["Mosaics", "mosaic_dataset"]

SEED = 20  # of what stands beside an image


class Mosaics:
    """2 x 2 images of a source, whose label is the class that appears twice; the other two are of a class each.

    Each image of the source is the first of its class in one mosaic. Which others stand there, and where, only depends
    on its index and on the source.

    Args:
        source: Images of one size with labels that are known (`known_labels`): three classes or more, two images each.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.targets = source, known_labels(source)
        self.classes = {label: np.flatnonzero(self.targets == label) for label in np.unique(self.targets)}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        label, rng = self.targets[index], np.random.default_rng((SEED, index))
        second = rng.choice(np.setdiff1d(self.classes[label], index))
        others = rng.choice(np.setdiff1d(list(self.classes), label), 2, replace=False)
        chosen = [index, second, *(rng.choice(self.classes[other]) for other in others)]
        a, b, c, d = (np.asarray(self.source[i][0]) for i in rng.permutation(chosen))
        return np.concatenate([np.concatenate([a, b], axis=1), np.concatenate([c, d], axis=1)]), int(label)


def mosaic_dataset(data: ImageDataModule, split: str) -> TransformedDataset:
    """The mosaics of a split, resized as the images of `data` are in evaluation."""
    source = data.dataset(split).source
    return TransformedDataset(Mosaics(source), data.eval_transform, data.in_chans, data.num_classes, name="mosaics")
