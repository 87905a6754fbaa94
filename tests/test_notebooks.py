"""The notebooks run, and the outputs that are kept are theirs, small, and of no certain machine."""

import json

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from notebooks import METADATA, NOTEBOOKS, ROOT, execute
from programs import launcher

MOST = 200_000  # bytes of a notebook with its outputs


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows: "stdout" if it prints, and the types of its other outputs."""
    shown = [output.get("name") or ", ".join(sorted(output["data"])) for output in cell.outputs]
    return list(dict.fromkeys(shown))


def test_there_are_three():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3"]


@pytest.fixture(scope="module")
def forked():
    """The kernel is a fork of a process that has imported what it imports."""
    python, environment = launcher()
    return {"python": python, "environment": environment}


@pytest.fixture(scope="module")
def executed(forked):
    return dict(zip(NOTEBOOKS, execute(*NOTEBOOKS, **forked), strict=True))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_is_kept(path, executed):
    kept, made = nbformat.read(path, as_version=4), executed[path]
    assert [cell.source for cell in made.cells] == [cell.source for cell in kept.cells]
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


def test_a_notebook_has_no_names_or_files_of_another_and_fails_with_its_cell(forked, tmp_path):
    for name, source in (
        ("first", "from pathlib import Path; Path('file').touch()"),
        ("second", "import os; assert os.listdir() == []; Path('file')"),
    ):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        nbformat.write(notebook, tmp_path / name)
    with pytest.raises(CellExecutionError, match=r"NameError.*Path"):
        execute(tmp_path / "first", tmp_path / "second", **forked)
