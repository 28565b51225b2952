"""A very large image through a Luna ViT, out of core: `python -m experiments.benchmarks.gigapixel --help`."""

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from experiments.command import Parser, at_least, json_file, measured_on
from luna_vision.downstream.pyramid import PyramidBackbone
from luna_vision.downstream.segmentation import FCN
from luna_vision.downstream.whole import segment
from luna_vision.execution import Encoded, encode
from luna_vision.execution.checkpoint import Checkpoint
from luna_vision.images import open_image
from luna_vision.images.pixels import Pixels, pixel_statistics
from luna_vision.utils.files import write_json

from .cell import Spec
from .jobs import peak_resident

__all__ = ["Mosaic", "main", "write_tiff"]

MAP = "classes.tif"
STORE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Mosaic:
    """A square image of any side that is made when it is read: scikit-learn's two photographs, in pieces.

    Each piece is a part of one of them, of its own place, scale, turn and colours, which follow from its position. So
    there is structure at all scales, and no two pieces are the same.
    """

    PIECE = 512
    dtype = np.dtype(np.uint8)

    def __init__(self, side: int) -> None:
        """
        Args:
            side: Pixels.
        """
        self.shape = (side, side, 3)
        self.chunks = (self.PIECE, self.PIECE, 3)
        self.identity = f"mosaic {side}"
        self.photos = [Image.fromarray(photo) for photo in load_sample_images().images]

    def piece(self, row: int, column: int) -> np.ndarray:
        """(512, 512, 3) uint8."""
        rng = np.random.default_rng((row, column))
        photo = self.photos[rng.integers(len(self.photos))]
        side = int(rng.integers(64, min(photo.size)))
        left, top = (int(rng.integers(0, n - side)) for n in photo.size)
        part = photo.rotate(float(rng.uniform(-20, 20)), Image.Resampling.BILINEAR)
        part = part.crop((left, top, left + side, top + side)).resize(
            (self.PIECE, self.PIECE), Image.Resampling.BICUBIC
        )
        pixels = np.rot90(np.asarray(part), int(rng.integers(4)))
        gain = rng.uniform(0.6, 1.4, 3)
        table = (np.arange(256)[:, None] * gain).clip(0, 255).astype(np.uint8)
        return np.stack([table[pixels[:, :, c], c] for c in range(3)], axis=2)

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        side = self.shape[1]
        out = np.empty((stop - start, side, 3), np.uint8)
        for i in range(start // self.PIECE, -(-stop // self.PIECE)):
            top, bottom = max(i * self.PIECE, start), min((i + 1) * self.PIECE, stop)
            for j in range(-(-side // self.PIECE)):
                left, right = j * self.PIECE, min((j + 1) * self.PIECE, side)
                piece = self.piece(i, j)[top - i * self.PIECE : bottom - i * self.PIECE, : right - left]
                out[top - start : bottom - start, left:right] = piece
        return out


def write_tiff(image: Mosaic, path: Path) -> None:
    """Write an image as a tiled TIFF, a tile at a time."""
    import tifffile

    count = -(-image.shape[0] // image.PIECE)

    def pieces() -> Iterator[np.ndarray]:
        for i in range(count):
            for j in range(count):
                yield np.ascontiguousarray(image.piece(i, j))

    kind = {"shape": image.shape, "dtype": image.dtype, "tile": (image.PIECE, image.PIECE), "photometric": "rgb"}
    tifffile.imwrite(path, pieces(), bigtiff=True, **kind)


def _pixels(model: nn.Module, side: int) -> Tensor:
    parameter = next(model.parameters())
    statistics = (
        ([0.0] * 3, [1.0] * 3) if isinstance(model, FCN) else pixel_statistics(model)
    )  # a segmenter normalises by itself
    image = Pixels(Mosaic(side), 3, *statistics, device=parameter.device)
    return image.rows(0, side).to(parameter.dtype)


def segmenter(spec: Spec, classes: int) -> FCN:
    """A segmenter of the shape that `luna-vision finetune` trains."""
    return FCN(PyramidBackbone(spec.name, [4], 128, **spec.args), classes)


def disc(share: float) -> np.ndarray:
    """(512, 512) bool, a disc that covers this share of a square."""
    y, x = np.mgrid[:512, :512] - 255.5
    return np.hypot(y, x) <= 512 * math.sqrt(share / math.pi)


@torch.inference_mode()
def ordinary(model: nn.Module, side: int, repeats: int) -> dict[str, Any]:
    """Time of the forward pass on an image of this side, which is in memory already."""
    x, times = _pixels(model, side), []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        model(x).sum().item()
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times[1:])  # the first warms up
    return {"side": side, "seconds": seconds, "all_seconds": times[1:], "pixels_per_second": side * side / seconds}


def streamed(model: nn.Module, image: Any, arguments: dict[str, Any], folder: Path) -> Encoded:
    """An image in pieces; a segmenter writes the class of each pixel into the folder, as `luna-vision predict` does."""
    if isinstance(model, FCN):
        return segment(model, image, folder / MAP, **arguments)
    return encode(model, image, **arguments)


@torch.inference_mode()
def equality(model: nn.Module, side: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Largest differences between the two ways on an image of this side, over the largest number; of a segmenter, the
    share of pixels whose class differs."""
    if isinstance(model, FCN):
        import tifffile

        want = model(_pixels(model, side))[0].argmax(0).cpu().numpy()
        with tempfile.TemporaryDirectory() as folder:
            streamed(model, Mosaic(side), arguments, Path(folder))
            found = tifffile.imread(Path(folder, MAP))
        return {"side": side, "classes": float((found != want).mean())}
    tokens = model.forward_features(_pixels(model, side))
    embedding = model.forward_head(tokens, pre_logits=True)[0]
    want = {"embedding": embedding.cpu(), "logits": model.head(embedding).cpu()}
    want["memory"] = tokens[0, : model.num_prefix_tokens].cpu()
    del tokens
    got = encode(model, Mosaic(side), **arguments)
    values = {name: getattr(got, name) for name in want}
    errors = {n: float((values[n] - w).abs().max() / w.abs().max()) for n, w in want.items() if values[n] is not None}
    return {"side": side, **errors}


def _parser() -> Parser:
    parser = Parser(
        prog="python -m experiments.benchmarks.gigapixel",
        description="Seconds and resident memory of a very large image, out of core, beside the ordinary forward pass "
        "on one that fits; and how far the two ways are apart on an image that both can do.",
    )
    parser.add_argument("--side", type=at_least(1), default=32768, metavar="PIXELS", help="of the image")
    parser.add_argument("--tiff", type=Path, help="write the image there first, if it is not there, and read the file")
    parser.add_argument("--ordinary-side", type=at_least(1), default=2048, metavar="PIXELS", help="of one that fits")
    parser.add_argument("--check-side", type=at_least(1), default=4096, metavar="PIXELS", help="of one for both ways")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="of the ordinary forward pass")
    parser.add_argument("--memory-budget", default="6GB", metavar="SIZE", help="of the streamed pass")
    parser.add_argument("--store", type=Path, metavar="FOLDER", help="keep the patches there; without, in memory")
    parser.add_argument("--store-dtype", choices=STORE_TYPES, help="type in which they are kept")
    parser.add_argument("--band-rows", type=at_least(1), metavar="N", help="rows of patches at a time")
    parser.add_argument("--threads", type=at_least(1), help="CPU threads; torch's choice if left out")
    parser.add_argument("--out", type=json_file, metavar="FILE", help=".json")
    parser.add_argument("--model", type=Spec.parse, default="luna_vit_tiny", metavar="NAME[,ARG=VALUE...]")
    parser.add_argument(
        "--classes", type=at_least(2), metavar="K", help="with a segmentation head, whose map is written"
    )
    parser.add_argument("--tissue", type=float, metavar="SHARE", help="with a mask, a disc of this share of the image")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.store is not None and (args.store / Checkpoint.STATE).exists():
        parser.error(f"--store {args.store} holds a run that was stopped, of which only the rest would be timed")
    model = segmenter(args.model, args.classes) if args.classes else args.model.create()
    model = model.eval().to(args.device)  # with random weights, which cost what others do
    image: Any = Mosaic(args.side)
    if args.tiff is not None:
        if not args.tiff.exists():
            write_tiff(image, args.tiff)
        image = open_image(args.tiff)
        if image.shape != (args.side, args.side, 3):
            parser.error(f"{args.tiff} has shape {image.shape}, not that of --side {args.side}: remove it")
    names = ("memory_budget", "band_rows", "store")
    arguments = {name: getattr(args, name) for name in names} | {"store_dtype": STORE_TYPES.get(args.store_dtype)}

    before = peak_resident()
    started = time.perf_counter()
    masked = arguments if args.tissue is None else arguments | {"mask": disc(args.tissue)}
    with tempfile.TemporaryDirectory() as folder:
        result = streamed(model, image, masked, Path(folder))
    seconds = time.perf_counter() - started
    # of the process up to here: what follows holds images and patches as a whole
    peak = peak_resident()
    found = {
        "side": args.side,
        "seconds": seconds,
        "pixels_per_second": args.side**2 / seconds,
        "patches": result.grid_size[0] * result.grid_size[1],
        **({} if args.tissue is None else {"valid_patches": int(result.patch_valid.sum())}),
        "planned_bytes": result.peak_bytes,
        "peak_resident_bytes": peak,
        "resident_bytes_before": before,
    }
    report = {
        "command": f"python -m experiments.benchmarks.gigapixel {' '.join(sys.argv[1:] if argv is None else argv)}",
        **measured_on(args.device),
        "threads": torch.get_num_threads(),
        "model": args.model.text,
        **({"classes": args.classes} if args.classes else {}),
        "random_weights": True,
        "source": "tiff" if args.tiff else "made when read",
        **{name: str(value) for name, value in arguments.items() if value is not None},
        "streamed": found,
        "ordinary": ordinary(model, args.ordinary_side, args.repeats),
        "equality": equality(model, args.check_side, arguments),
    }
    ratio = found["pixels_per_second"] / report["ordinary"]["pixels_per_second"]
    report["throughput_ratio"] = ratio
    print(f"{args.side} x {args.side} pixels, streamed: {seconds:.1f} s, {args.side**2 / seconds / 1e6:.2f} Mpixel/s")
    print(f"peak resident memory: {peak / 1e9:.2f} GB ({before / 1e9:.2f} GB before)")
    usual = report["ordinary"]
    rate = usual["pixels_per_second"] / 1e6
    print(f"ordinary forward at {usual['side']}: {usual['seconds']:.2f} s, {rate:.2f} Mpixel/s")
    print(f"throughput, streamed over ordinary: {ratio:.2f}")
    errors = ", ".join(f"{n} {e:.1e}" for n, e in report["equality"].items() if n != "side")
    print(f"largest relative differences at {args.check_side}: {errors}")
    if args.out is not None:
        write_json(args.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
