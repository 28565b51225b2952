"""``luna-vision preview``: training images as the model gets them, with their labels, before a run."""

import sys
from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from .recipe import WordParser

ABOUT = """\
Draw the first training images of a configuration, augmented, with their boxes, masks or labels, and say what the data
holds. Options of `luna-vision fit`, such as --data.root FOLDER, are taken as they are."""


def main(words: list[str]) -> int | None:
    """Run the command with these words."""
    usage = "--config FILE [--out FILE] [--overwrite] [--count N] [--SECTION.OPTION VALUE ...]"
    parser = WordParser("preview", usage, ABOUT)
    parser.add_argument("--out", type=Path, default=Path("preview.png"), metavar="FILE", help="the .png to write")
    parser.add_argument("--overwrite", action="store_true", help="replace it, which is refused otherwise")
    parser.add_argument("--count", type=int, default=16, metavar="N", help="number of images (default: 16)")
    own, rest = parser.parse_known_args(words)
    if own.count < 1:
        raise UserError(f"--count must be at least 1, got {own.count}")
    if not any(word.partition("=")[0] in ("-c", "--config") for word in rest):
        raise UserError("preview needs a --config FILE, as luna-vision fit takes it")
    from ..tasks.pictures import sheet
    from ..utils.files import check_output, new_file
    from ..utils.text import printable
    from .preview_pictures import pictures, sizes
    from .train import build

    check_output(own.out, [".png"], own.overwrite)
    sys.path.append("")  # a config may name the user's own classes
    sys.argv[1:] = rest  # which Lightning compares with what it is given
    data: Any = build(run=False).datamodule
    data.setup("fit")  # which says what it has found
    found = pictures(data, own.count)
    print(printable(sizes(found)))
    with new_file(own.out) as file:
        sheet([picture for picture, _ in found]).save(file, "PNG")
    print(f"preview: {own.out}")
    return 0
