"""Benchmarks whose runs are configs of the project with overlays, and whose results come together in one JSON."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule

import luna_vision.data
from experiments.command import Parser, at_least
from experiments.runs import Config, LunaCLI, Run, add_folder_arguments, finished, fit
from luna_vision.utils.files import write_json

__all__ = ["config_parser", "recipe_config", "fit_and_test", "recipe_data", "write_results"]

CONFIGS = Path(__file__).parents[2] / "configs"


def config_parser(name: str, description: str) -> Parser:
    """The arguments that all benchmarks of configs have."""
    out = Parser(prog=f"python -m experiments.benchmarks.{name}", description=description)
    out.add_argument("--epochs", type=at_least(1), help="of every run; if left out, what the configs say")
    add_folder_arguments(out, name)
    return out


def recipe_config(name: str, overlay: Config, seed: int = 0, epochs: int | None = None) -> Config:
    """Everything that the numbers of a run depend on: a config of the project, and what is laid over it."""
    recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    seeded: Config = {"seed_everything": seed, "data": {"init_args": {"seed": seed}}}
    if epochs is not None:
        seeded["trainer"] = {"max_epochs": epochs}
    return {"recipe": recipe, "overlays": [overlay, seeded], "seed": seed}


def recipe_data(config: Config, root: str, **changes: Any) -> LightningDataModule:
    """The data module of a recipe."""
    data = config["recipe"]["data"]
    arguments = {**data["init_args"], "root": root, **changes}
    return getattr(luna_vision.data, data["class_path"].rpartition(".")[2])(**arguments)


def fit_and_test(run: Run, root: str, work: Path, overlays: Sequence[Config] = ()) -> tuple[LunaCLI, dict[str, Any]]:
    """Train, or go on from the checkpoint in `work`, and test the best weights, which the model then has.

    Args:
        run: What to do.
        root: Folder of the data.
        work: Folder of this run's checkpoints.
        overlays: What differs from the configuration on this machine alone.

    Returns:
        What was built, and the result.
    """
    ledger = [{"class_path": "experiments.runs.Ledger"}]
    here = {
        "data": {"init_args": {"root": root}},
        "trainer": {"logger": False, "enable_progress_bar": False, "callbacks+": ledger},
    }
    cli, ledger = fit([run.config["recipe"], *run.config["overlays"], here, *overlays], work)
    scores = {name: float(cli.trainer.callback_metrics[name]) for name in ("test_acc1", "test_loss")}
    return cli, {**scores, "val_acc1": ledger.validation, "seconds": round(ledger.seconds, 1)}


def write_results(
    out: Path, draw: Callable[[dict[str, Any], Path], None], name: Callable[[dict[str, Any]], str]
) -> dict[str, Any]:
    """Write `results.json` and `results.png` from the results that there are; returns those by name."""
    rows = {name(row): row for row in finished(out)}
    if rows:
        write_json(out / "results.json", {"runs": rows})
        draw(rows, out / "results.png")
    return rows
