"""`luna-vision` from the outside: help without torch, options from files, and what is a mistake and what a bug."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentError

from luna_vision.cli.common import Parser, at_least, is_mistake, message, pairs, run_command
from luna_vision.cli.main import COMMANDS, TRAINING, main
from luna_vision.cli.training_help import short_help
from luna_vision.utils.errors import UserError, arguments_of

ROOT = Path(__file__).parents[2]
# what the console script does, and then whether torch was imported
SCRIPT = """
import sys
sys.argv[0] = "luna-vision"
import jsonargparse
from luna_vision.cli.main import main
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def console(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", [*TRAINING, *COMMANDS])
def test_help_of_every_command_comes_without_torch(name):
    done = console(name, "--help")
    assert (done.returncode, done.stderr) == (0, "False\n")
    assert done.stdout.startswith(f"usage: luna-vision {name} ") and "--config FILE" in done.stdout
    assert "type: " not in done.stdout and "null" not in done.stdout


def test_all_commands_are_listed_and_a_mistake_needs_no_torch():
    listed = console("--help")
    assert listed.returncode == 0 and all(f"  {name} " in listed.stdout for name in TRAINING | COMMANDS)
    for words, said in ((["embde"], "did you mean embed?"), (["embed", "--out", "a.npz"], "images")):
        done = console(*words)
        (line, torch) = done.stderr.splitlines()
        assert (done.returncode, torch) == (2, "False") and line.startswith("error: ") and said in line


def test_the_console_script_is_declared():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"luna-vision": "luna_vision.cli.main:main"}


def test_models_are_registered_in_a_console_script_when_they_are_asked_for():
    code = "import sys; sys.argv[0] = '/bin/luna-vision'; import luna_vision; assert 'torch' not in sys.modules; "
    code += "luna_vision.LunaVit, luna_vision.init_from_vit; import timm; assert timm.is_model('luna_vit_tiny')"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=300).returncode == 0


@pytest.mark.parametrize("name", TRAINING)
def test_the_short_help_of_training_says_how_to_see_all(name):
    text = short_help([name, "--help"])
    for word in ("--help_all", "--print_config", "--model.help", "--data.help", "--name", "runs/NAME"):
        assert word in text
    assert ("--out FILE" in text) == (name == "predict") and ("--resume" in text) == (name == "fit")
    assert not short_help([name]) and not short_help(["embed", "--help"])
    assert "--out" in console("embed", name, "--help").stdout  # a folder of this name


# ---------------------------------------------------------------- options


def parser() -> Parser:
    made = Parser("test")
    made.add_argument("images", nargs="+")
    made.add_argument("--max-size", type=at_least(1))
    made.add_argument("--mean", type=float, nargs="+")
    return made


def test_options_come_from_a_file_and_the_command_line_goes_over_it(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"images": ["a.png"], "max_size": 3, "mean": [0.5]}))
    args = parser().parse_args(["--config", str(tmp_path / "a.yaml"), "--max-size", "4"])
    assert (args.images, args.max_size, args.mean) == (["a.png"], 4, [0.5])


@pytest.mark.parametrize(
    "words, said",
    [
        (["a.png", "--max-size", "0"], "must be a whole number of at least 1, got '0'"),
        (["a.png", "--max-size", "x"], "must be a whole number of at least 1, got 'x'"),
        (["a.png", "--max-size", "1.5"], "must be a whole number of at least 1, got '1.5'"),
        (["a.png", "--max", "1"], "unrecognized arguments: --max"),  # no option is guessed
        (["a.png", "--mean", "x"], "mean: Expected a float. Got value: x"),
        (["a.png", "--config", "zero.yaml"], "max_size: must be a whole number of at least 1, got 0"),
        (["a.png", "--config", "other.yaml"], "'max_sise' is not accepted; did you mean max_size?"),
        (["a.png", "--config", "gone.yaml"], "config: File does not exist"),
        ([], "images"),
    ],
)
def test_mistakes_in_options_are_one_clause(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("zero.yaml").write_text("max_size: 0")
    Path("other.yaml").write_text("max_sise: 1")
    with pytest.raises(SystemExit) as end:
        run_command(lambda: parser().parse_args(words) and None)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and said in line and "Parser key" not in line


def test_pairs():
    assert pairs(["a=1", "b=[1, 2]", "c=luna", "d=x=y"], "--model-args") == {
        "a": 1,
        "b": [1, 2],
        "c": "luna",
        "d": "x=y",
    }
    with pytest.raises(UserError, match="--model-args are NAME=VALUE, got 'memory'"):
        pairs(["memory"], "--model-args")


# ---------------------------------------------------------------- mistakes and bugs


def code_of(raised: BaseException) -> int:
    def command():
        raise raised

    with pytest.raises(SystemExit) as end:
        run_command(command)
    return end.value.code


@pytest.mark.parametrize(
    "raised, code",
    [
        (KeyboardInterrupt(), 130),
        (UserError("a mistake"), 2),
        (PermissionError(13, "denied", "x.npz"), 2),
        (OSError(28, "No space left on device"), 2),
        (ArgumentError(None, "what"), 2),
    ],
)
def test_exit_codes(raised, code):
    assert code_of(raised) == code


@pytest.mark.parametrize("raised", [ValueError("of a library"), OSError("of a library"), KeyError("a bug")])
def test_what_is_no_mistake_keeps_its_traceback(raised):
    def command():
        raise raised

    with pytest.raises(type(raised)):
        run_command(command)


def test_checks_of_this_package_are_mistakes_and_its_bugs_are_none():
    for call, mistake in ((lambda: at_least(1)(0), True), (lambda: pairs([None], "--x"), False)):
        try:
            call()
        except Exception as error:
            found = error
        assert is_mistake(found) == mistake
    namespace = {"__name__": "luna_vision.made_up"}
    exec("def check():\n    raise ValueError\ndef bug():\n    int('x')\ndef unpack():\n    a, b = (1, 2, 3)", namespace)
    for name in ("check", "bug", "unpack"):
        with pytest.raises(ValueError) as raised:
            namespace[name]()
        assert is_mistake(raised.value) == (name == "check"), name


def test_arguments_that_a_library_refuses_are_a_mistake_and_nothing_else_is():
    with pytest.raises(UserError, match="^x do not fit: no"), arguments_of("x do not fit", IndexError):
        raise IndexError("no")
    with pytest.raises(KeyError), arguments_of("x do not fit", IndexError):
        raise KeyError("a bug")


def test_the_traceback_of_a_mistake_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("LUNA_VISION_TRACEBACK", "1")
    with pytest.raises(UserError):
        run_command(lambda: pairs(["x"], "--model-args") and None)


def test_error_of_a_data_worker_is_reduced_to_its_last_line():
    error = UserError(
        "Caught SampleError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\npackage.SampleError: cannot decode image file a.png: broken'
    )
    assert message(error) == "cannot decode image file a.png: broken"


@pytest.mark.parametrize("name, missing", [("fit", "lightning.pytorch"), ("embed", "luna_vision.downstream.embed")])
def test_what_is_not_installed_is_said_with_the_extra_that_brings_it(name, missing, monkeypatch, capsys):
    extra = {"fit": "train", "embed": "downstream"}[name]
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "luna_vision.cli.train", raising=False)
    monkeypatch.setattr(sys, "argv", ["luna-vision", name, "a.png", "--out", "a.npz"])
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(f"error: {name} needs ") and f"luna-vision[{extra}]" in error


def test_nothing_asked_for_is_an_overview(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["luna-vision"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "usage: luna-vision COMMAND" in capsys.readouterr().out
