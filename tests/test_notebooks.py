"""Every notebook runs from top to bottom, calls the package and defines nothing, and is committed with its outputs."""

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


# what takes long there, in small
SMALLER = {
    "sides = (224, 384, 512, 768, 1024)": "sides = (64, 96)",
    "min_run_time=1.0": "min_run_time=0.01",
    "torch.randn(1, 3, 2048, 2048)": "torch.randn(1, 3, 128, 128)",
}


@pytest.mark.slow
def test_notebooks_run():
    """In one kernel, which has imported everything once and forgets all names before each of them."""
    whole = nbformat.v4.new_notebook()
    for path in NOTEBOOKS:
        whole.cells += [nbformat.v4.new_code_cell("%reset -f"), *nbformat.read(path, as_version=4).cells]
    for long, short in SMALLER.items():
        assert any(long in cell.source for cell in whole.cells), long
        for cell in whole.cells:
            cell.source = cell.source.replace(long, short)
    # the limit is for one cell: it ends one that hangs, and says nothing of how long a notebook should take
    NotebookClient(whole, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
