"""The recipes of the experiments, and that what is documented is what the committed results were made with."""

import re
from pathlib import Path

import pytest

from experiments import compare
from experiments.benchmarks import carry, elastic
from experiments.runs import CONFIGS, Ledger, unfinished
from luna_vision.cli.train import build

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_builds_and_says_what_it_is(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])  # pytest's own arguments make LightningCLI warn
    cli = build(["--config", str(path)], run=False)
    assert cli.model.hparams.in_chans == cli.datamodule.in_chans
    assert cli.datamodule.img_size == (cli.model.hparams.model_kwargs["img_size"],) * 2
    assert any(isinstance(callback, Ledger) for callback in cli.trainer.callbacks)
    assert Path(cli.trainer.default_root_dir).name == path.stem
    header = dict(re.findall(r"^# (Command|Hardware|Time|Score): +(.+)", path.read_text(), re.M))
    assert len(header) == 4
    assert header["Command"] == f"python train.py fit --config {path.relative_to(ROOT)}"


def documented(module: str) -> list[list[str]]:
    """The words of the commands in the documentation that run a module and write to docs/results."""
    texts = [path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]]
    found = [re.findall(rf"python -m {re.escape(module)} ([^`\n]*--out docs/results[^`\n]*)", text) for text in texts]
    return [command.split() for commands in found for command in commands]


@pytest.mark.parametrize("module, count", [(compare, 3), (carry, 1), (elastic, 1)])
def test_documented_commands_find_their_results(module, count):
    """Recipe, options and defaults are those of the results, of which none is missing."""
    commands = documented(module.__name__)
    assert len(commands) == count
    for words in commands:
        args = module._parser().parse_args(words)
        runs = module.plan(args)
        assert len(runs) > 1 and unfinished(runs, ROOT / args.out) == []
