"""Every notebook runs from top to bottom, calls the package and defines nothing, and is committed with its outputs."""

import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_with_outputs_and_defines_nothing(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)
    for cell in cells:
        assert not any(line.startswith(("def ", "class ")) for line in cell.source.splitlines())
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"  # warnings of other packages, with paths of some machine


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, record_property):
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    # the limit is for one cell: it ends one that hangs, and says nothing of how long a notebook should take
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    record_property("seconds", round(time.perf_counter() - start))  # into the report of --junitxml
