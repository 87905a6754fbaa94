"""Runs the notebooks of recipes/notebooks and keeps their outputs.

    python tests/notebooks.py                    # all of them
    python tests/notebooks.py 1_first_run.ipynb  # this one

A notebook runs in an empty folder, with the repository on its path and one thread. Its texts and
pictures are kept. Other libraries' warnings, which go to stderr, and the editor's notes are not.
"""

import os
import resource
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


# What stands between two notebooks in one kernel: the next one has no names, and an empty folder.
ANEW = ("import os, tempfile; os.chdir(tempfile.mkdtemp())", "%reset -f")


def execute(*paths, python=None, environment=None):
    """The notebooks with new outputs, run one after the other in one kernel, which imports once.

    Args:
        python: The program that runs the kernel, in place of this one.
        environment: What this program needs in its environment.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails. The message has its traceback.
    """
    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    cells = []
    for notebook in notebooks:
        cells += [*map(nbformat.v4.new_code_cell, ANEW), *notebook.cells]
    for i, cell in enumerate(cells):
        cell.id = f"cell-{i}"
    together = nbformat.v4.new_notebook(cells=cells)
    with tempfile.TemporaryDirectory() as folder:  # a short path: it has the kernel's sockets
        _execute(together, Path(folder), python or sys.executable, environment or {})
    ran = iter(together.cells)
    for notebook in notebooks:
        for _ in ANEW:
            next(ran)
        notebook.cells = [next(ran) for _ in notebook.cells]
        _tidy(notebook)
    return notebooks


def _tidy(notebook):
    """Leave what is kept. Cells and their outputs are counted from the notebook's beginning."""
    count = 0
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", nbformat.NotebookNode()
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
            for each in cell.outputs:
                if "execution_count" in each:
                    each.execution_count = count
    notebook.metadata = nbformat.from_dict(METADATA)


def _execute(notebook, folder, python, environment):
    environment = {
        **environment,
        "OMP_NUM_THREADS": "1",  # tiny models: a second thread gains nothing
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder / "ipython"),
        "TMPDIR": str(folder),  # what the notebook leaves behind goes with the folder
    }
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=None,
        record_timing=False,
        coalesce_streams=True,  # else a busy machine prints in more pieces
        resources={"metadata": {"path": str(folder)}},
    )
    manager = client.create_kernel_manager()
    manager.transport = "ipc"  # no ports: only this user can reach the kernel
    manager.connection_file = str(folder / "kernel.json")
    manager.kernel_spec.argv[0] = python
    client.execute(env={**os.environ, **environment})


def texts():
    """The texts of the notebooks, by their paths in the repository."""
    found = {}
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        found[path.relative_to(ROOT).as_posix()] = text
    return found


def children_seconds():
    """The CPU time of all kernels that have ended: unlike wall time, other programs add little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main():
    chosen = [FOLDER / name for name in sys.argv[1:]] or NOTEBOOKS
    for path in chosen:
        before = children_seconds()
        (notebook,) = execute(path)
        nbformat.write(notebook, path)
        seconds, size = children_seconds() - before, path.stat().st_size / 1000
        print(f"{path.name}: {seconds:.0f} s of CPU time, {size:.0f} KB", flush=True)


if __name__ == "__main__":
    main()
