"""Whatever is wrong in a configuration: one line that says so, and exit code 2."""

import re
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer

from luna_vision.cli.train import main

DEBUG = Path(__file__).parents[2] / "configs" / "debug.yaml"


def leaves(config: dict, prefix: str = "") -> list[str]:
    """The dotted names of a config's values."""
    found = []
    for name, value in config.items():
        found += leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return found


KEYS = [key.rstrip("+") for key in leaves(yaml.safe_load(DEBUG.read_text()))]
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
    max_examples=50, derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(key=st.sampled_from(KEYS), value=VALUES, misspelt=st.sampled_from([False] * 5 + [True]))
@example(key="model.checkpoint", value="1e5", misspelt=False)  # PyYAML writes it without quotes
def test_wrong_values(key, value, misspelt, monkeypatch, capsys):
    assume(not (misspelt and value == "{}"))  # jsonargparse ignores a section of no options, whatever its name
    name = f"{key}s_" if misspelt else key
    code = exit_code(["fit", "--config", str(DEBUG), f"--{name}={value}"], monkeypatch)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == (2 if misspelt else 2 if lines else 0) and len(lines) == (code == 2)
    if lines:
        words = name.split(".")[-1].removesuffix("_path").replace("_", ".")  # "model_name", "model name", "class"
        assert re.search(words, lines[0], re.IGNORECASE), (name, value, lines[0])
    assert not list(Path().iterdir())


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(-9, 9), st.text(max_size=4, alphabet="ab:.{-")),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from("ab"), inner, max_size=2)),
    max_leaves=3,
)


def sections(config: dict, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where a config has a value or a section, from the outermost on."""
    found = []
    for name, value in config.items():
        found += [(*path, name), *(sections(value, (*path, name)) if isinstance(value, dict) else [])]
    return found


@st.composite
def damaged(draw) -> bytes:
    """A config file: something in it is replaced, left out or added, or the file is cut off or overwritten."""
    config = yaml.safe_load(DEBUG.read_text())
    *path, name = draw(st.sampled_from(sections(config)))
    section = config
    for part in path:
        section = section[part]
    how = draw(st.sampled_from(["replace", "replace", "leave out", "add", "cut", "noise", "all"]))
    if how == "replace":
        section[name] = draw(JUNK)
    elif how == "leave out":
        del section[name]
    elif how == "add":
        section[f"{name}s_"] = draw(JUNK)
    text = yaml.safe_dump(config, sort_keys=False).encode()
    at = draw(st.integers(0, len(text)))
    if how == "cut":
        return text[:at]
    if how == "noise":
        return text[:at] + draw(st.binary(min_size=1, max_size=8)) + text[at:]
    return draw(st.binary(max_size=40)) if how == "all" else text


@pytest.mark.slow
@settings(
    max_examples=25, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(content=damaged())
@example(content=DEBUG.read_bytes().partition(b"\ntrainer:")[0] + b"\ntrainer: []")
@example(content=DEBUG.read_bytes().partition(b"\ntrainer:")[0] + b"\ntrainer: 5")
def test_damaged_files(content, monkeypatch, capsys):
    Path("config.yaml").write_bytes(content)
    code = exit_code(["fit", "--config", "config.yaml"], monkeypatch)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) in ((0, 0), (2, 1)), content
