"""Print the versions that CI tests beside those of constraints.txt. Needs uv (`pip install uv`).

    python .ci/constraints.py lowest > .ci/constraints/lowest.txt
    python .ci/constraints.py newest > .ci/constraints/newest.txt

`make constraints` does both. The sets:

lowest: For Python 3.11. Of each package that pyproject.toml names for users (the dependencies and
    the extras other than docs and dev), the lowest version that it allows. Of what these packages
    need, the newest version. Of the tools in docs and dev, the version in constraints.txt.
newest: For every Python from 3.11 on. The newest version that pyproject.toml allows.

torch and torchvision are the pair in constraints.txt in both sets, because their other builds for
CPUs are not on the index that pip uses by default. What only CUDA builds of torch need is left out.
"""

import datetime
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SETS = {
    "lowest": ["--resolution", "lowest-direct"],
    "newest": ["--resolution", "highest", "--universal"],
}
PAIR = {"torch", "torchvision"}
OF_CUDA = re.compile(r"(nvidia|cuda|triton)\b")


def names_of_tools() -> set[str]:
    """The packages that only those who develop hf_dynprune install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tools = {Requirement(each).name for extra in ("docs", "dev") for each in extras[extra]}
    return {canonicalize_name(name) for name in tools - {project["name"]}}


def pins() -> dict[str, str]:
    """The line of constraints.txt for each package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(line.partition("==")[0]): line for line in lines if "==" in line}


def resolved(name: str) -> list[str]:
    """The lines of a set, as uv resolves them. Nothing is installed."""
    fixed = PAIR | names_of_tools() if name == "lowest" else PAIR
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(line for package, line in pins().items() if package in fixed))
        file.flush()
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--python-version=3.11"]
        command += ["--extra=dev", f"--constraint={file.name}", *SETS[name]]
        # Only wheels, so that nothing is built; and no word of where they were found.
        command += ["--only-binary=:all:", "--no-header", "--no-annotate"]
        command += ["--no-emit-index-url", "--no-emit-find-links"]
        done = subprocess.run([*command, "pyproject.toml"], cwd=ROOT, stdout=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return [line for line in done.stdout.decode().splitlines() if not OF_CUDA.match(line)]


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in SETS:
        sys.exit(f"{sys.argv[1:]}: expected one of {', '.join(SETS)}.")
    (name,) = sys.argv[1:]
    lines = resolved(name)
    today = datetime.datetime.now(datetime.UTC).date()
    print(f"# The {name} versions, resolved on {today} by .ci/constraints.py.")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
