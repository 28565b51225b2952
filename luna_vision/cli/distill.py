"""``luna-vision distill``: a Luna ViT learns the features of any timm model, from images alone."""

from typing import NoReturn

from ..utils.errors import UserError
from .recipe import Recipe, common_options, fit


def main(words: list[str]) -> NoReturn:
    """Run the command and exit."""
    parser = Recipe(
        "distill",
        usage="--data FOLDER --teacher NAME --out FOLDER [options] [options of fit]",
        description="Train a Luna ViT to have the features of any model of timm on your own images, without labels.",
    )
    parser.add_argument("--teacher", metavar="NAME", help="any model of timm, such as vit_base_patch14_dinov2.lvd142m")
    parser.add_argument(
        "--teacher-checkpoint",
        metavar="FILE",
        help="its weights (default: timm's, from the Hugging Face hub); a training of this package records the name",
    )
    parser.add_argument("--model", metavar="NAME", help="the student (default: luna_vit_small)")
    parser.add_argument(
        "--cache",
        metavar="FOLDER",
        help="keep the teacher's outputs on the disk: images then have eight views in all, and are not mixed",
    )
    args, overrides = parser.parse_known_args(words)

    from ..models.factory import training_checkpoint

    recorded = training_checkpoint(args.teacher_checkpoint) if args.teacher_checkpoint else {}
    teacher = args.teacher or recorded.get("hyper_parameters", {}).get("model_name")
    if teacher is None:
        raise UserError("give --teacher NAME, or as --teacher-checkpoint a file of a training of this package")
    options = {
        "model.init_args.model_name": args.model,
        "model.init_args.teacher_model": teacher,
        "model.init_args.teacher_checkpoint": args.teacher_checkpoint,
    }
    if args.cache:
        options |= {"model.init_args.cache": args.cache, "model.init_args.mixup": False}
        options["data.init_args.repeat_epochs"] = 8
    fit("distill.yaml", common_options(args) | options, overrides)
