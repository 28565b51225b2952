"""``luna-vision report``: the report of a run that has ended."""

import json
from pathlib import Path

from .recipe import WordParser

ABOUT = """\
Test the best weights of a run once more, and write RUN/report/report.html, a page that needs no other file, and its
pictures. Options of `luna-vision test`, such as --data.root FOLDER, or --config FILE over that of the run, are taken as
they are."""


def main(words: list[str]) -> int | None:
    """Run the command with these words."""
    parser = WordParser("report", "RUN [--SECTION.OPTION VALUE ...]", ABOUT)
    parser.add_argument("run", type=Path, metavar="RUN", help="its folder, or the one above, whose newest run is taken")
    own, rest = parser.parse_known_args(words)
    run = find_run(own.run)
    from . import train

    report = {"class_path": "luna_vision.tasks.Report", "init_args": {"run": str(run)}}
    weights = ["--ckpt_path", str(run / "checkpoints" / "best.ckpt"), "--trainer.logger=false"]
    added = f"--trainer.callbacks+={json.dumps(report)}"
    return train.run_words(["test", "--config", str(run / "config.yaml"), *weights, added, *rest])


def find_run(folder: Path) -> Path:
    """The folder of a run, or the newest run in a folder.

    Raises:
        FileNotFoundError: There is none, or it has no best weights.
    """
    runs = [folder, *(path.parent for path in folder.glob("*/config.yaml"))]
    runs = [run for run in runs if (run / "config.yaml").is_file() and (run / "checkpoints" / "best.ckpt").is_file()]
    if not runs:
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no config.yaml and checkpoints/best.ckpt")
    return max(runs, key=lambda run: (run / "config.yaml").stat().st_mtime)
