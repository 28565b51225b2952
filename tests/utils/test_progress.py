"""Progress in a log is a line now and then."""

import sys

from luna_vision.utils.progress import progress_bar


def test_without_a_terminal_progress_is_lines(capsys):
    with progress_bar(total=4, desc="encoding", unit="row", every=0.0) as bar:
        for _ in range(4):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2 and lines[-1].startswith("encoding: 4 of 4 rows") and "\r" not in "".join(lines)


def test_a_short_run_says_nothing(capsys):
    assert list(progress_bar(range(3), desc="a", unit="image")) == [0, 1, 2]
    assert not any(capsys.readouterr())


def test_a_terminal_has_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress_bar(range(3), desc="a", unit="image")) == [0, 1, 2]
    assert "\r" in capsys.readouterr().err
    list(progress_bar(range(3), show=False))
    assert not any(capsys.readouterr())
