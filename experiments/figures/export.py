"""Draw docs/figures/export.png, an ONNX file beside its model: `python -m experiments.figures.export`.

One file, written once, takes all these sizes. Each time is the median of `REPEATS` runs of one image after a first one;
PyTorch and onnxruntime take turns and have the same number of threads. The numbers go to docs/results/export.json.
"""

import statistics
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import onnxruntime
import timm
import torch

import luna_vision  # noqa: F401  (registers the models)
from experiments.command import Parser, measured_on
from luna_vision.export import export_onnx
from luna_vision.utils.files import save_figure, write_json

DOCS = Path(__file__).parents[2] / "docs"
MODEL = "luna_vit_small"
SIDES = (224, 448, 896, 1344, 1792)
REPEATS = 9


@torch.inference_mode()
def measure(model: torch.nn.Module, session: onnxruntime.InferenceSession, side: int) -> dict[str, float]:
    """Milliseconds of both, and their largest difference over the largest output."""
    image = torch.randn(1, 3, side, side)
    forms = {"PyTorch": lambda: model(image), "onnxruntime": lambda: session.run(None, {"image": image.numpy()})[0]}
    expected, found = (torch.as_tensor(run()) for run in forms.values())
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(REPEATS):
        for name, run in forms.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    difference = float((found - expected).abs().max() / expected.abs().max())
    return {"side": side, "difference": difference, **{k: round(statistics.median(t), 2) for k, t in times.items()}}


def draw(rows: list[dict[str, float]], threads: int) -> None:
    """Times on the left, differences on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    sides = [row["side"] for row in rows]
    for name, marker in (("PyTorch", "o"), ("onnxruntime", "s")):
        left.plot(sides, [row[name] for row in rows], marker=marker, label=name)
    left.set(ylabel=f"ms an image, {threads} threads", title="One file, any size", ylim=(0, None))
    left.legend()
    right.semilogy(sides, [row["difference"] for row in rows], marker="o", color="C2")
    right.set(title="Largest difference of the logits, relative", ylim=(1e-8, 1e-3))
    right.axhline(1e-4, color="grey", linestyle="--")
    right.text(sides[-1], 1.2e-4, "refused above", ha="right", va="bottom", color="grey", fontsize=9)
    for ax in (left, right):
        ax.set(xlabel="side of the image in pixels", xticks=sides)
        ax.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, DOCS / "figures" / "export.png", dpi=110)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="of both")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=1000).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = args.threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        rows = [measure(model, session, side) for side in SIDES]
    about = {"model": MODEL, "threads": args.threads, "onnxruntime": onnxruntime.__version__}
    write_json(DOCS / "results" / "export.json", {**measured_on(), **about, "rows": rows})
    draw(rows, args.threads)


if __name__ == "__main__":
    main()
