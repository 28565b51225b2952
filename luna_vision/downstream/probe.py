"""Probes measure frozen features by nearest neighbours and by a linear classifier.

The features are the embeddings of a model that is not trained further. Images are not augmented.

- **kNN**, as in DINO (Caron et al. 2021, arXiv 2104.14294, section 3.2; Wu et al. 2018, arXiv 1805.01978, section 3.4):
  the k nearest training images by cosine similarity s vote for their class, with weight exp(s / T); k is 20, T 0.07.
- **Linear**: multinomial logistic regression on standardised features, fitted to convergence. A fifth of the training
  images is held out to choose C from `C_GRID`; then the classifier is fitted to all training images.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from luna_vision.data.base import hold_out
from luna_vision.utils.progress import progress_bar

from .features import Extractor, Features
from .probe_data import DATA, ProbeData, check_classes, open_data

__all__ = [
    "DATA",
    "LinearProbe",
    "ProbeData",
    "Probes",
    "extract_features",
    "knn_accuracy",
    "linear_probe_accuracy",
    "open_data",
    "probe_model",
]

K, TEMPERATURE = 20, 0.07
C_GRID = tuple(10.0**exponent for exponent in range(-5, 3))
HELD_OUT = 0.2
MAX_ITER = 1000


class LinearProbe(NamedTuple):
    """The result of the linear probe."""

    accuracy: float
    """Top-1 on the test images, 0 to 1."""
    C: float
    """The chosen inverse strength of the L2 penalty, as in scikit-learn."""
    held_out: dict[float, float]
    """Accuracy on the held-out training images for each C of the grid."""
    converged: bool
    """Whether the last fit took fewer than `MAX_ITER` iterations."""


class Probes(NamedTuple):
    """The result of both probes."""

    knn: float
    """Top-1 of the nearest neighbours on the test images, 0 to 1."""
    linear: LinearProbe
    """The linear classifier."""
    features: int
    """Width of the embedding."""


def probe_model(
    model: nn.Module,
    data: str | ProbeData,
    data_args: dict[str, Any] | None = None,
    k: int = K,
    temperature: float = TEMPERATURE,
    progress: bool = True,
    say: Callable[[str], object] = lambda line: None,
) -> Probes:
    """Run both probes on a model.

    Args:
        model: A timm model, on its device; it is put in eval mode.
        data: A key of `DATA`, such as "digits" or "imagefolder", or the result of `open_data`.
        data_args: Arguments of the data module, if `data` is a key. `in_chans` is the model's; `mean` and `std` are by
            default those with which `train.py` trains on these data.
        k, temperature: As in `knn_accuracy`.
        progress: Show progress bars on stderr or, if that is no terminal, a line from time to time.
        say: Called with the results as lines of text.

    Raises:
        ValueError: The data, the model and the arguments do not fit together; see the other functions of this module.
        OSError: The data do not exist.
    """
    if data_args and not isinstance(data, str):
        raise ValueError(f"data_args are for data that is given by name, and not for {type(data).__name__}")
    in_chans = Extractor(model).in_chans
    if isinstance(data, str):
        data = open_data(data, {"in_chans": in_chans, **(data_args or {})})
    check_vote(k, temperature, len(data.train.dataset))
    if data.train_labels is not None:
        hold_out(data.train_labels, HELD_OUT)  # the linear probe will need it: fail now and not at the end
    train = extract_features(model, data.train, progress, "training images")
    test = extract_features(model, data.test, progress, "test images")
    features = train[0].shape[1]
    say(f"{features} features from {type(model).__name__}; top-1 in %:")
    knn = knn_accuracy(*train, *test, k, temperature)
    say(f"{f'kNN, k={k}, cosine, T={temperature:g}':<40}{100 * knn:6.2f}")
    linear = linear_probe_accuracy(*train, *test, progress=progress)
    say(f"{f'linear, logistic regression, C={linear.C:g}':<40}{100 * linear.accuracy:6.2f}")
    return Probes(knn, linear, features)


def extract_features(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], progress: bool = True, name: str = "features"
) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings of labelled images.

    Args:
        model: A timm model, on its device; it is put in eval mode.
        loader: Batches of images (B, channels, height, width) and labels (B,).
        progress: Show a progress bar on stderr or, if that is no terminal, a line from time to time.
        name: Its title.

    Returns:
        Features (n, C) float32 and labels (n,).

    Raises:
        ValueError: The model does not take the images, or there are none.
    """
    extractor = Extractor(model)
    features: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    running: deque[Callable[[], list[Features]]] = deque()
    for images, targets in progress_bar(loader, progress, desc=name, unit="batch"):
        running.append(extractor.submit(images))
        labels.append(targets.numpy())
        if len(running) > 1:  # a GPU has a batch to work on while the next one is read
            features += [found.embedding for found in running.popleft()()]
    for finish in running:
        features += [found.embedding for found in finish()]
    if not features:
        raise ValueError(f"{name}: there are no images")
    return np.stack(features), np.concatenate(labels)


def knn_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    k: int = K,
    temperature: float = TEMPERATURE,
) -> float:
    """Top-1 accuracy, 0 to 1, of a vote of the nearest training images; see the module's docstring.

    Args:
        train_features: (n, C).
        train_labels: (n,).
        test_features: (m, C).
        test_labels: (m,).
        k: The number of neighbours that vote.
        temperature: T; with a smaller one, the nearest neighbours count more.

    Raises:
        ValueError: k is larger than the training set, T is not above 0, or a class has no training images.
    """
    check_vote(k, temperature, len(train_features))
    _check(train_features, train_labels, test_features, test_labels)

    def weights(distance: np.ndarray) -> np.ndarray:
        # exp(s / T) with s = 1 - distance, divided by that of the nearest: exp(1 / T) can overflow
        distance = distance.astype(np.float64)
        return np.exp((distance.min(axis=1, keepdims=True) - distance) / temperature)

    classifier = KNeighborsClassifier(k, weights=weights, algorithm="brute", metric="cosine")
    classifier.fit(train_features, train_labels)
    return float(classifier.score(test_features, test_labels))


def linear_probe_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    progress: bool = True,
) -> LinearProbe:
    """Top-1 accuracy of logistic regression; see the module's docstring.

    Args:
        train_features, train_labels, test_features, test_labels: As in `knn_accuracy`.
        progress: Show a progress bar on stderr or, if that is no terminal, a line from time to time.

    Raises:
        ValueError: There is only one class, a class has too few images to hold some out, or no training images.
    """
    _check(train_features, train_labels, test_features, test_labels)
    if len(np.unique(train_labels)) < 2:
        raise ValueError("a linear classifier needs two classes, and all training images are of one")
    kept, held = hold_out(train_labels, HELD_OUT)
    held_out = {}
    for c in progress_bar(C_GRID, progress, desc="linear", unit="fit"):
        model = _fit(train_features[kept], train_labels[kept], c)
        held_out[c] = model.score(train_features[held], train_labels[held])
    best = max(held_out, key=lambda c: (held_out[c], -c))
    model = _fit(train_features, train_labels, best)
    converged = bool(model[-1].n_iter_.max() < MAX_ITER)
    return LinearProbe(model.score(test_features, test_labels), best, held_out, converged)


def _fit(features: np.ndarray, labels: np.ndarray, c: float) -> Pipeline:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=MAX_ITER))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # LinearProbe.converged reports it for the last fit
        return model.fit(features.astype(np.float64), labels)  # in float32, rounding can end the fit too soon


def _check(
    train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray
) -> None:
    for name, features in (("training", train_features), ("test", test_features)):
        if not np.isfinite(features).all():
            raise ValueError(f"the features of the {name} images are not all finite numbers")
    check_classes(train_labels, test_labels)


def check_vote(k: int, temperature: float, images: int) -> None:
    """Raise a ValueError unless there are k training images, and the temperature is above 0."""
    if not 1 <= k <= images:
        raise ValueError(f"k (--knn-k) must be from 1 to the number of training images, {images}, got {k}")
    if not temperature > 0:
        raise ValueError(f"temperature (--knn-t) must be above 0, got {temperature}")
