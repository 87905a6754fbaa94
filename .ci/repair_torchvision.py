"""Make torchvision importable next to a CPU build of PyTorch.

Run with the Python of a virtual environment, after installing into it::

    .venv/bin/python .ci/repair_torchvision.py

Why. On Linux, ``pip install torchvision`` installs a CUDA build. Next to a CPU build of torch its
compiled half cannot be loaded, because it needs libtorch_cuda.so. So its operators are not
registered, and ``import torchvision`` raises

    RuntimeError: operator torchvision::nms does not exist

timm, evaluate and ``from transformers import Trainer`` import torchvision if it is installed, so
they fail, too. The CPU build of torchvision is on an index that pip does not use by default.

What. The import only needs the *schemas* of two operators, ``nms`` and ``qnms``. So two small files
are written into the environment's site-packages: a ``.pth`` file with one line that each start of
Python runs (also in ranks of ``torchrun`` and in loader workers), and the module that this line
imports. The module defines the two schemas while torchvision is being imported, if its operators
are missing. It does nothing else. Models, transforms and datasets of torchvision then work. Its
compiled operators (``torchvision.ops.nms``, decoding in ``torchvision.io``) still raise when they
are called; this project uses neither.

If torchvision can be imported, nothing is written. This is for the environment that the Makefile
makes for developers: the library neither needs nor contains it. To undo it, delete the two files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

IMPORTS = "import torchvision, timm"
MODULE = "_torchvision_next_to_cpu_torch"

SOURCE = '''\
"""Makes a CUDA build of torchvision importable next to a CPU build of torch.

Written by .ci/repair_torchvision.py.
"""

import sys

library = None  # keeps the definitions alive


class Finder:
    """Finds no module. It waits until torchvision.extension is imported and nms is needed next."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torchvision._meta_registrations":
            define_missing_operators()
        return None


def define_missing_operators():
    global library
    torch, extension = sys.modules.get("torch"), sys.modules.get("torchvision.extension")
    if library is not None or torch is None or extension is None:
        return
    if torch.version.cuda is not None or extension._has_ops():
        return
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Finder)
'''


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter of this environment."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def write(path: Path, text: str) -> None:
    """Write the whole file or nothing: each start of Python in this environment reads it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def repair(module: Path, pth: Path) -> str:
    """Write the two files; return an error message, or "" if torchvision can be imported then."""
    cuda = run("import torch; print(torch.version.cuda)")
    if cuda.stdout.strip() != "None":
        return (
            f"{cuda.stderr}\ntorchvision: its operators are missing although torch is a CUDA build "
            f"({cuda.stdout.strip() or 'unknown'}). The two do not match: install the pair in "
            "constraints.txt."
        )
    if sys.prefix == sys.base_prefix:
        return "torchvision: only a virtual environment is repaired, and this Python is not in one."
    write(module, SOURCE)  # before the line that imports it
    write(pth, f"import {MODULE}\n")
    check = run(IMPORTS)
    if check.returncode != 0:
        return f"{check.stderr}\ntorchvision: repaired in {module.parent}, but still broken."
    return ""


def main() -> int:
    site_packages = Path(sysconfig.get_path("purelib"))
    module, pth = site_packages / f"{MODULE}.py", site_packages / f"{MODULE}.pth"
    repaired = module.exists() and pth.exists()
    if repaired and module.read_text(encoding="utf-8") != SOURCE:
        write(module, SOURCE)
    attempt = run(IMPORTS)
    if attempt.returncode == 0:
        earlier = " (repaired earlier)" if repaired else ""
        print(f"torchvision: can be imported{earlier}, nothing to do.")
        return 0
    if "torchvision::nms does not exist" not in attempt.stderr:
        error = "torchvision or timm cannot be imported, for a reason that is not known here."
    else:
        error = repair(module, pth)
    if error:
        print(f"{attempt.stderr}\n{error}", file=sys.stderr)
        return 1
    print("torchvision: a CUDA build next to a CPU torch. Repaired, it can be imported now.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
