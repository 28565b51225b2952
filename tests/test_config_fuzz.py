"""Whatever is wrong in a configuration: one line that says so, and exit code 2."""

import re
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer

from luna_vision.tasks.cli import main

DEBUG = Path(__file__).parents[1] / "configs" / "debug.yaml"


def leaves(config: dict, prefix: str = "") -> list[str]:
    """The dotted names of a config's values."""
    found = []
    for name, value in config.items():
        found += leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return found


KEYS = [key for key in leaves(yaml.safe_load(DEBUG.read_text())) if not key.startswith("trainer.logger")]
KEYS += [f"model.{name}" for name in ("checkpoint", "init_from_vit", "optimizer_kwargs", "scheduler_kwargs")]
KEYS += [f"data.init_args.{name}" for name in ("mean", "std", "crop", "auto_augment", "on_error", "max_error_share")]
KEYS += ["model.mix_mode", "trainer.max_steps", "trainer.strategy", "trainer.detect_anomaly"]
VALUES = st.one_of(
    st.sampled_from(["null", "true", "[]", "{}", "", "nope", "-1", "0", "1", "1e400", ".nan", "-.inf", "1.5", "a: b"]),
    st.sampled_from(["[1, 2, 3, 4]", "{x: 1}", "[a]", "!!binary x", "[", "%s", "a\nb"]),
    st.text(min_size=1, max_size=5, alphabet=st.characters(exclude_categories=["Cs", "Cc"])),
    st.integers(-(2**40), 40).map(str),  # a model of 2^40 blocks would be right
    st.floats(max_value=40).map(str),
)


@pytest.fixture(autouse=True)
def no_training(monkeypatch, tmp_path):
    """What is right in spite of all ends where training would begin."""
    monkeypatch.chdir(tmp_path)

    def started(*args, **kwargs):
        raise SystemExit(0)

    monkeypatch.setattr(Trainer, "fit", started)


def exit_code(argv: list[str], monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        warnings.simplefilter("ignore")
        main()
    return end.value.code


@pytest.mark.slow
@settings(
    max_examples=30, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(key=st.sampled_from(KEYS), value=VALUES, misspelt=st.sampled_from([False] * 5 + [True]))
def test_wrong_values(key, value, misspelt, monkeypatch, capsys):
    name = f"{key}s_" if misspelt else key
    code = exit_code(["fit", "--config", str(DEBUG), f"--{name}={value}"], monkeypatch)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == (2 if misspelt else 2 if lines else 0) and len(lines) == (code == 2)
    if lines:
        words = name.split(".")[-1].replace("_", ".")  # "model_name", "model name"
        assert re.search(words, lines[0], re.IGNORECASE), (name, value, lines[0])
    assert not list(Path().iterdir())
