"""Imports point one way, and the core needs torch alone: proved in a fresh process, and that the proof can fail."""

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import hf_dynprune

PACKAGE = Path(hf_dynprune.__file__).parent

# Each module of the core and the others of ours that it may import.
CORE = {
    "scores": set(),
    "policies": {"scores"},
    "sampler": {"policies"},
    "losses": set(),
    "distributed": {"policies", "scores"},
    "report": set(),
    "pruner": {"distributed", "policies", "report", "sampler", "scores"},
}
ORDER = ["scores", "policies", "sampler", "pruner", "trainer"]
TOOLS = {"cli"}  # imported by nothing
HEAVY = [
    "transformers",
    "accelerate",
    "datasets",
    "timm",
    "evaluate",
    "matplotlib",
    "safetensors",
    "pyarrow",
    "torchvision",
]


@cache
def imported_by(*modules: str) -> dict[str, list[str]]:
    """For each module, in turn, which heavy packages a fresh process has imported after it."""
    code = (
        "import importlib, json, sys\n"
        f"heavy, seen = {['torch', *HEAVY]}, {{}}\n"
        f"for name in {list(modules)}:\n"
        "    importlib.import_module(name)\n"
        "    seen[name] = [package for package in heavy if package in sys.modules]\n"
        "print(json.dumps(seen))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
        timeout=120,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_package_itself_imports_nothing():
    assert imported_by("hf_dynprune", "hf_dynprune.scores")["hf_dynprune"] == []


def test_core_imports_torch_alone():
    seen = imported_by(*(f"hf_dynprune.{name}" for name in CORE))
    assert seen == {f"hf_dynprune.{name}": ["torch"] for name in CORE}


def test_the_proof_can_fail():
    assert {"torch", "transformers", "accelerate", "datasets"} <= set(
        imported_by("hf_dynprune.trainer")["hf_dynprune.trainer"]
    )


# ---- the sources ---------------------------------------------------------------------------------


def imports_of(source: str, module: str) -> tuple[set[str], set[str]]:
    """(modules of ours, top-level names of others) that a module imports anywhere, also inside functions.

    The modules of a folder are `folder.part`, and its `__init__` is `folder.__init__`; imported, that one is `folder`.
    """
    package = ["hf_dynprune", *module.split(".")[:-1]]
    ours, others = set(), set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            dotted = ".".join(base)
            names = (
                [f"{dotted}.{alias.name}" for alias in node.names]
                if dotted == "hf_dynprune"
                else [dotted]
            )
        for name in names:
            top, _, rest = name.partition(".")
            if top != "hf_dynprune":
                others.add(top)
            elif rest and rest not in ("__version__",):
                ours.add(
                    hf_dynprune._MODULE_OF.get(rest, rest)
                )  # a public name stands for its module
    return ours, others


def sources() -> dict[str, str]:
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text()
        for path in paths
    }


# Each file and those that it imports; and the same for the rooms, where a folder is one.
FILES = {
    name.removesuffix(".__init__"): {
        ours.removesuffix(".__init__") for ours in imports_of(source, name)[0]
    }
    for name, source in sources().items()
}
GRAPH: dict[str, set[str]] = {}
for file, imported in FILES.items():
    room = file.split(".")[0]
    GRAPH.setdefault(room, set()).update({name.split(".")[0] for name in imported} - {room})


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """A path that leads back to where it began; empty where there is none."""

    def search(path):
        for following in sorted(graph.get(path[-1], ())):
            if following in path:
                return [*path[path.index(following) :], following]
            if found := search([*path, following]):
                return found
        return []

    return next((found for name in sorted(graph) if (found := search([name]))), [])


def test_imports_are_read_from_sources():
    source = (
        "import torch.nn as nn, os\nfrom . import distributed, __version__\nfrom .policies import UCB\n"
        "def f():\n    from safetensors.torch import save_file\n    import hf_dynprune.trainer\n"
        "    from hf_dynprune import plots, PruningReport\n    from hf_dynprune.cli import main\n"
    )
    ours, others = imports_of(source, "pruner")
    assert ours == {"distributed", "policies", "trainer", "plots", "cli", "report"}
    assert others == {"torch", "os", "safetensors"}
    assert imports_of("from .base import X\nfrom ..scores import Y", "policies.rules")[0] == {
        "policies.base",
        "scores",
    }
    assert imports_of("from .base import X\nfrom ..scores import Y", "policies.__init__")[0] == {
        "policies.base",
        "scores",
    }


def test_cycles_are_found():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize("module", CORE)
def test_core_imports_what_it_may(module):
    assert module in GRAPH
    assert GRAPH[module] <= CORE[module]


def test_imports_point_one_way():
    for number, module in enumerate(ORDER):
        assert not GRAPH[module] & set(ORDER[number + 1 :])
    assert {"scores"} <= GRAPH["policies"]
    assert {"scores", "policies", "sampler"} <= GRAPH["pruner"]
    assert "pruner" in GRAPH["trainer"]


def test_no_circles():
    assert cycle_in(GRAPH) == []
    assert cycle_in(FILES) == []
    assert {"policies", "policies.base", "policies.bandits", "policies.rivals"} <= set(FILES)


def test_tools_are_imported_by_nothing():
    for module, ours in GRAPH.items():
        if module not in TOOLS:
            assert not ours & TOOLS, module


def test_losses_join_at_scoring_and_the_trainers():
    assert {module for module, ours in GRAPH.items() if "losses" in ours} <= {
        "trainer",
        "scoring",
        "sft",
    }


def test_only_one_module_talks_to_other_ranks():
    for module, source in sources().items():
        if module != "distributed":
            assert "torch.distributed" not in {
                name.name if isinstance(node, ast.Import) else node.module
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in node.names
            }, module


def test_core_imports_no_more_than_torch_numpy_and_file_formats():
    files = [
        (module, source) for module, source in sources().items() if module.split(".")[0] in CORE
    ]
    assert len(files) > len(CORE)  # a folder has several
    for module, source in files:
        _, others = imports_of(source, module)
        assert others - set(sys.stdlib_module_names) <= {
            "torch",
            "numpy",
            "safetensors",
            "pyarrow",
        }, module
