"""``luna-vision finetune``: from labelled files of one's own to a trained model, by a YAML that it writes."""

import shlex
from itertools import count
from pathlib import Path

import yaml

from ..utils.errors import UserError
from ..utils.files import check_folder, write_text
from ..utils.text import printable
from .recipe import WordParser

TASKS = ("classify", "multilabel", "detect", "segment")
USAGE = """\
--task classify|multilabel|detect|segment --data PATH --out FOLDER [--model NAME]
       [--checkpoint FILE] [--SECTION.OPTION VALUE ...]"""
ABOUT = """\
Train on labelled files of your own. The format is recognised and named, and the complete configuration is written to
FOLDER/finetune.yaml, which `luna-vision fit --config FILE` repeats. Options of `luna-vision fit`, such as
--trainer.max_epochs 5 or --data.batch_size 8, are taken as they are.

PATH by task:
  classify    a folder with train/CLASS/*.jpg, and perhaps val/ and test/; or with CLASS/*.jpg
  multilabel  a folder with train.csv, or one CSV file, which names images and their labels
  detect      COCO (a JSON file), Pascal VOC (XML files) or YOLO (data.yaml or classes.txt)
  segment     train/images and train/masks, or images and masks, or COCO or YOLO with outlines
Without folders or files for training, validation and test, all images are for training, and some are held out."""


def main(words: list[str]) -> int | None:
    """Run the command with these words."""
    own, overrides = _parser().parse_known_args(words)
    from ..models.factory import check_model_name
    from . import train
    from .finetune_config import configuration, data_options

    if stray := [word for word in overrides[:1] if not word.startswith("-")]:
        raise UserError(f"unknown word {stray[0]!r}; luna-vision finetune --help shows how it is called")
    if own.checkpoint is not None and not own.checkpoint.is_file():
        raise FileNotFoundError(f"--checkpoint: there is no file {own.checkpoint}")
    if own.model is not None:
        check_model_name(own.model)
    of_data, overrides = data_options(overrides)
    config, said = configuration(own.task, own.data, own.out, own.model, own.checkpoint, of_data)
    check_folder(own.out)
    path = own.out / "finetune.yaml"
    written = shlex.join(["luna-vision", "finetune", *words])
    again = shlex.join(["luna-vision", "fit", "--config", str(path), *overrides])
    head = "\n".join(f"# {printable(line)}" for line in (f"Written by {written}", *said, f"Again: {again}"))
    body = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    if path.is_file() and not path.read_text("utf-8").endswith(f"\n{body}"):  # somebody may have edited it
        kept = next(name for n in count(1) if not (name := path.with_name(f"finetune-{n}.yaml")).exists())
        said.append(f"the earlier configuration: {path.rename(kept)}")
    write_text(path, f"{head}\n{body}")
    print(*map(printable, said), f"configuration: {path}", sep="\n", flush=True)
    return train.run_words(["fit", "--config", str(path), *overrides])


def _parser() -> WordParser:
    parser = WordParser("finetune", USAGE, ABOUT)
    parser.add_argument("--task", required=True, choices=TASKS, help="what to train")
    parser.add_argument(
        "--data", required=True, type=Path, metavar="PATH", help="folder of the images and their labels"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the run is written")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="any of timm's models (default: luna_vit_tiny); luna_vit_nano_patch8 starts from the package's weights",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="weights to start from, of a training or timm's (default: none)"
    )
    return parser
