"""The notebooks run, and the outputs that are kept are theirs, small, and of no certain machine."""

import json

import nbformat
import pytest
from notebooks import METADATA, NOTEBOOKS, ROOT, execute

MOST = 200_000  # bytes of a notebook with its outputs


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows: "stdout" if it prints, and the types of its other outputs."""
    shown = [output.get("name") or ", ".join(sorted(output["data"])) for output in cell.outputs]
    return list(dict.fromkeys(shown))


def test_there_are_three():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_is_kept(path):
    kept, made = nbformat.read(path, as_version=4), execute(path)
    for before, after in zip(code_cells(kept), code_cells(made), strict=True):
        assert kinds(after) == kinds(before), after.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_is_small_and_of_no_certain_machine(path):
    text = path.read_text()
    assert len(text) < MOST
    for place in (str(ROOT), "/home/", "/root", "/tmp", "site-packages"):
        assert place not in text
    notebook = nbformat.from_dict(json.loads(text))
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {each["output_type"] for cell in cells for each in cell.outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert any(cell.outputs for cell in cells)


def test_a_cell_that_fails_fails_the_notebook(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    with pytest.raises(Exception, match="ZeroDivisionError"):
        execute(tmp_path / "broken.ipynb")
