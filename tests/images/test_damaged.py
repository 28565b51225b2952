"""No damaged file is a traceback, in any reader: a few of each kind. tests/nightly/decoders.py reads many."""

import json
import multiprocessing
from collections import Counter
from pathlib import Path

import pytest

NIGHTLY = Path(__file__).parents[1] / "nightly"


@pytest.mark.timeout(300)
def test_damaged_files_are_named_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a process of its own, which a decoder may end, and which has little memory."""
    monkeypatch.syspath_prepend(str(NIGHTLY))
    import decoders

    process = multiprocessing.get_context("spawn").Process(target=decoders.work_together, args=(5, 0, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0, f"it died at {tmp_path / 'damaged.bin'}"
    results = json.loads((tmp_path / "result.json").read_text())
    assert not [text for _, wrong in results.values() for text in wrong]
    counts = sum((Counter(counts) for counts, _ in results.values()), Counter())
    assert len(results) > 60 and counts["whole: named"] > 100 and counts["rows: pixels"] > 50
