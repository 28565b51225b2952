"""``luna-vision export``: a model for use without this package, or for the Hugging Face hub."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import UserError
from ..utils.text import printable
from .common import Parser, add_model_options, add_statistics_options, load, model_options

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from torch import nn

    from ..export import Check

FORMATS = ("onnx", "torch-export", "hf")
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
OUTPUTS = ("logits", "embedding", "features")


def _parser() -> Parser:
    parser = Parser(
        "export",
        usage="%(prog)s --format FORMAT --out PATH [options]",
        description="Export a Luna ViT. The file is compared with the model before it gets its name.",
        epilog="Exit code: 0; 2 for a mistake; 1 for a graph that cannot be made or differs from the model.",
    )
    # a torch-export program stays on the device on which it was made
    add_model_options(parser, device="cpu")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="onnx and torch-export: a file that takes any batch, height and width; hf: a folder for timm and the hub",
    )
    group.add_argument("--out", type=Path, required=True, metavar="PATH", help=".onnx or .pt2 file, or folder")
    group.add_argument("--overwrite", action="store_true", help="replace PATH, which is refused otherwise")
    group.add_argument(
        "--output",
        choices=OUTPUTS,
        help="what the graph returns: the logits, the embedding that the classifier reads, or the patch features "
        "(batch, width, rows, columns) (default: logits if there is a classifier, else embedding)",
    )
    group.add_argument(
        "--memory", action="store_true", help="carry the memory: a second input `memory` and output `new_memory`"
    )
    add_statistics_options(
        group, "one number or one a channel (default: what a training checkpoint says, else ImageNet's)"
    )
    return parser


def main(words: list[str]) -> None:
    """Run the command.

    Raises:
        ValueError, OSError: A mistake of the user.
        ExportError: The graph cannot be made, or differs from the model. Nothing was written.
    """
    args = _parser().parse_args(words)
    if args.format == "hf" and (args.output or args.memory):
        raise UserError("--output and --memory are for graphs, not for --format hf: leave them out")

    from ..export import export_onnx, export_program, onnx_libraries, save_for_hf
    from ..export.compare import check_model
    from ..export.hub import check_hf_folder, training_details
    from ..models.factory import random_weights
    from ..utils.files import check_output

    if args.format == "onnx":
        onnx_libraries()
    if args.format == "hf":
        check_hf_folder(args.out, args.overwrite)
    else:
        check_output(args.out, [SUFFIXES[args.format]], args.overwrite)
    model = load(args)
    check_model(model)
    _normalise(model, args)
    if args.format == "hf":
        training = training_details(args.checkpoint) if args.checkpoint else {}
        checks = save_for_hf(model, args.out, training, random_weights(**model_options(args)), args.overwrite)
    else:
        export = export_onnx if args.format == "onnx" else export_program
        checks = export(model, args.out, args.output, args.memory, args.overwrite)
    _report(args, checks)


def _normalise(model: "nn.Module", args: "Namespace") -> None:
    """Put --mean and --std into the model's configuration, with a note where they are not known."""
    from ..images.transforms import per_channel
    from ..models.factory import knows_its_images

    if args.checkpoint and not (args.mean and args.std) and not knows_its_images(**model_options(args)):
        print(
            f"NOTE: {args.checkpoint} does not say how images are normalised: it is written down as in "
            f"{printable(str(model.pretrained_cfg['architecture']))}'s configuration. --mean and --std say otherwise.",
            file=sys.stderr,
        )
    for name in ("mean", "std"):
        if (values := getattr(args, name)) is not None:
            model.pretrained_cfg = model.pretrained_cfg | {name: per_channel(name, values, model.in_chans)}


def _report(args: "Namespace", checks: "list[Check]") -> None:
    from ..export import HF_FILES
    from ..export.compare import TOLERANCE

    files = [args.out] if args.out.is_file() else [args.out / name for name in HF_FILES]
    print(f"wrote {args.out}, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
    if args.format == "hf":
        print("timm builds the same model from it: outputs are equal bit for bit at")
    else:
        print(f"it was loaded and compared with the model; largest relative error ({TOLERANCE:.0e} is allowed) at")
    for size, error in checks:
        print(f"  {' x '.join(map(str, size)):<20}  {'' if args.format == 'hf' else f'{error:.1e}'}".rstrip())
