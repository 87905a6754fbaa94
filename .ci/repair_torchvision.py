"""Make torchvision importable next to a CPU build of PyTorch.

Run with the Python of a virtual environment, after installing into it::

    .venv/bin/python .ci/repair_torchvision.py

Why. A plain ``pip install torchvision`` brings a CUDA build on Linux. Next to a CPU build of torch its compiled half
cannot be loaded (it wants libtorch_cuda.so), so its operators are never registered, and ``import torchvision`` ends in

    RuntimeError: operator torchvision::nms does not exist

That takes more with it than torchvision: timm, evaluate, and ``from transformers import Trainer`` import torchvision
when it is installed, and fail with it. The CPU build of torchvision lives on an index that pip does not ask by itself.

What. All that the import needs is that the *schemas* of two operators, ``nms`` and ``qnms``, exist. So two small files
are written into the environment's site-packages: a ``.pth``, one line that Python runs whenever it starts (hence in
``torchrun`` ranks and loader workers too), and the module that this line imports. It defines the two schemas while
torchvision is being imported, if torchvision has found its operators missing, and does nothing at any other time.
Models, transforms and datasets of torchvision then work; its compiled operators (``torchvision.ops.nms``, decoding in
``torchvision.io``) still raise when called. This project uses neither.

Where torchvision is healthy, nothing is written. This is for the environment that the Makefile sets up for developers:
the library itself neither needs nor contains any of it. To undo it, delete the two files.
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
"""Lets a CUDA build of torchvision be imported next to a CPU build of torch (written by .ci/repair_torchvision.py)."""

import sys

library = None  # keeps the definitions alive


class Finder:
    """Finds no module. It waits for the moment when torchvision.extension is imported and nms is needed next."""

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
    """Run `code` in a fresh interpreter of this environment."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def write(path: Path, text: str) -> None:
    """Write the whole file or none of it: every start of Python in this environment reads it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def main() -> int:
    site_packages = Path(sysconfig.get_path("purelib"))
    module, pth = site_packages / f"{MODULE}.py", site_packages / f"{MODULE}.pth"
    repaired = module.exists() and pth.exists()
    if repaired and module.read_text(encoding="utf-8") != SOURCE:
        write(module, SOURCE)

    attempt = run(IMPORTS)
    if attempt.returncode == 0:
        print(
            "torchvision: can be imported"
            + (" (repaired earlier)" if repaired else "")
            + ", nothing to do."
        )
        return 0
    if "torchvision::nms does not exist" not in attempt.stderr:
        print(
            f"{attempt.stderr}\ntorchvision or timm cannot be imported: a reason not known here.",
            file=sys.stderr,
        )
        return 1
    cuda = run("import torch; print(torch.version.cuda)")
    if cuda.stdout.strip() != "None":
        print(
            f"{attempt.stderr}{cuda.stderr}\ntorchvision: its operators are missing although torch is a CUDA build "
            f"({cuda.stdout.strip() or 'unknown'}). The two do not match: install the pair in constraints.txt.",
            file=sys.stderr,
        )
        return 1
    if sys.prefix == sys.base_prefix:
        print(
            "torchvision: refusing to repair a Python that is not a virtual environment.",
            file=sys.stderr,
        )
        return 1

    write(module, SOURCE)  # before the line that imports it
    write(pth, f"import {MODULE}\n")
    check = run(IMPORTS)
    if check.returncode != 0:
        print(
            f"{check.stderr}\ntorchvision: repaired in {site_packages}, and still broken.",
            file=sys.stderr,
        )
        return 1
    print("torchvision: a CUDA build next to a CPU torch; repaired, it can be imported now.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
