"""Text from strangers: what steers a terminal or a spreadsheet is made harmless, and everything else stays as it is."""

import csv
import io
import os

import pytest

from luna_vision.cli import train as cli
from luna_vision.cli.common import run_command
from luna_vision.cli.embed import main as embed_main
from luna_vision.data.faults import SkipFaults
from luna_vision.images.decode import SampleError
from luna_vision.utils.errors import UserError
from luna_vision.utils.text import csv_cell, printable, utf8

ESCAPES = {
    "a\x1b[31mred\x1b[0m": r"a\x1b[31mred\x1b[0m",
    "a\x1b]0;title\x07": r"a\x1b]0;title\x07",
    "two\nlines\r\x85\u2028": r"two\x0alines\x0d\x85\u2028",
    "\x9b2J": r"\x9b2J",
    "gpj.\u202egnp": r"gpj.\u202egnp",
    os.fsdecode(b"06\xff.png"): r"06\xff.png",
    "lone \ud800": r"lone \ud800",
}


@pytest.mark.parametrize("text", ESCAPES)
def test_what_steers_a_terminal_is_shown(text):
    assert printable(text) == ESCAPES[text]
    printable(text).encode()


@pytest.mark.parametrize(
    "text", ["a.png", "größer/Bild 1.jpg", "写真.png", "👩‍🔬.png", "5\u202f01\u202fPM.png", r"a\b.png"]
)
def test_other_text_stays(text):
    assert printable(text) == utf8(text) == csv_cell(text) == text


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "\r=1", "\n=1", "'=1", "＝1+1", "-", "'"]
)
def test_formulas_are_text_and_can_be_recovered(text):
    file = io.StringIO(newline="")
    csv.writer(file).writerow([csv_cell(text), "0.5"])
    cell = next(csv.reader(io.StringIO(file.getvalue(), newline="")))[0]
    assert cell[0] == "'" and cell[1:] == text


@pytest.mark.parametrize("text", ["-5", "+5", "-0.25", "7", "0.5", "cat = dog", "a-b", ""])
def test_numbers_and_plain_text_stay(text):
    assert csv_cell(text) == text


def test_a_file_name_that_is_no_utf8_can_be_written():
    assert csv_cell(os.fsdecode(b"=06\xff.png")).encode() == rb"'=06\xff.png"


HOSTILE = "\x1b[31mred\x1b[0m\u202egnp.png"


def shown(text: str) -> bool:
    return "red" in text and not set(text) & set("\x1b\u202e")


def fail() -> None:
    raise UserError(f"cannot read {HOSTILE}")


def test_errors_of_commands(monkeypatch, capsys):
    monkeypatch.setattr(cli, "build", fail)
    monkeypatch.setattr("sys.argv", ["train.py", "fit"])
    for command in (cli.main, lambda: run_command(fail)):
        with pytest.raises(SystemExit):
            command()
        assert shown(capsys.readouterr().err)


def test_names_in_logs(caplog, capsys, tmp_path):
    def read(index: int) -> int:
        if not index:
            raise SampleError(f"cannot read {HOSTILE}")
        return index

    assert SkipFaults(4, 0.5, "train").read(read, 0) == 1
    assert shown(caplog.text)
    path = tmp_path / HOSTILE
    path.write_bytes(b"no image")
    embed = ["--model", "test_luna_vit", "--out", str(tmp_path / "o.npz"), "--device", "cpu"]
    assert embed_main([str(path), *embed]) == 1
    assert shown(capsys.readouterr().err)
