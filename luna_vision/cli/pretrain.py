"""``luna-vision pretrain``: a Luna ViT learns features from images alone."""

from typing import NoReturn

from .recipe import Recipe, common_options, fit


def main(words: list[str]) -> NoReturn:
    """Run the command and exit."""
    parser = Recipe(
        "pretrain",
        usage="--data FOLDER --out FOLDER [options] [options of fit]",
        description="Train a Luna ViT on your own images by LeJEPA, without labels, a teacher or other weights.",
    )
    parser.add_argument("--model", metavar="NAME", help="(default: luna_vit_small)")
    args, overrides = parser.parse_known_args(words)
    fit("pretrain.yaml", common_options(args) | {"model.init_args.model_name": args.model}, overrides)
