"""``luna-vision convert``: shards from an image folder, or with --vit a Luna ViT from a softmax ViT."""

from pathlib import Path

from ..utils.text import printable
from . import convert_vit
from .common import Parser, at_least

MODULES = {"webdataset": "WebDatasetDataModule", "litdata": "LitDataDataModule"}  # that read a format


def main(words: list[str]) -> int | None:
    """Convert, and print the number of images and the data module that reads them."""
    if any(word.partition("=")[0] == "--vit" for word in words):
        return convert_vit.main(words)
    parser = Parser(
        "convert",
        description="Write an image folder (the layout of ImageNet) as shards, for file systems that are slow with "
        "many small files. Image files are copied as they are. With --vit, make a Luna ViT of a softmax ViT: see "
        "luna-vision convert --vit --help.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with {train,val,test}/<class>/<image>")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; it appears when it is complete")
    parser.add_argument("--format", choices=list(MODULES), default="webdataset", help="(default: %(default)s)")
    parser.add_argument(
        "--shard-megabytes", type=at_least(1), default=128, metavar="N", help="size of a shard (default: %(default)s)"
    )
    args = parser.parse_args(words)

    from ..data.convert import convert

    arguments = (args.folder, args.out, args.format, args.shard_megabytes)
    for split, (images, shards) in convert(*arguments, say=lambda line: print(printable(line))).items():
        print(f"{split}: {images} images in {shards} shards")
    print(f"data.class_path: luna_vision.data.{MODULES[args.format]}, data.init_args.root: {args.out}")
