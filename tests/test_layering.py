"""Imports point one way, and the core needs torch alone. Proved in a fresh process, and by sources.

    core            ──▶ torch, NumPy, file formats
    Trainer's side  ──▶ core, transformers
    tools           ──▶ everything above; no module below imports a tool

Each check is also given something wrong, to show that it can fail.
"""

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from tiny import PATIENCE

import hf_dynprune

PACKAGE = Path(hf_dynprune.__file__).parent

# Each room of the core, and the others of ours that it may import. A folder is one room.
CORE = {
    "checks": set(),
    "files": set(),
    "json_fields": {"files"},
    "selection": set(),
    "schedule": {"checks"},
    "table": {"files"},
    "scores": {"files", "json_fields"},
    "potential": {"checks", "files", "json_fields"},
    "policies": {"checks", "potential", "schedule", "scores", "selection", "table"},
    "collating": set(),
    "sampler": {"collating", "selection"},
    "distributed": {"policies", "table"},
    "report": {"files", "json_fields", "policies"},
    "observations": {"distributed", "selection", "table"},
    "pruner": {
        "checks",
        "distributed",
        "files",
        "observations",
        "policies",
        "potential",
        "report",
        "sampler",
        "schedule",
        "selection",
        "table",
    },
}
TRAINER = [
    "upstream",
    "checkpoints",
    "arguments",
    "losses",
    "scoring",
    "identity",
    "provenance",
    "data_side",
    "loss_check",
    "loss_side",
    "trainer",
    "trl_card",
    "sft",
    "grpo",
    "averages",
    "preference",
    "preference_experimental",
    "embedding",
    "scoring_runs",
    "data",
    "vision",
]
TOOLS = ["escape", "plots", "model_card", "hub", "advice", "cli"]
# Lowest first: a module imports only modules before it. A new module needs a place here.
ORDER = [*CORE, *TRAINER, *TOOLS]
# (importing, imported) pairs that point up, each with a reason.
UPWARD = {
    ("data_side", "model_card"),  # Trainer.create_model_card writes our card; imported when called
}
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
FACADE = "__init__"

# What is longer than it should be, each with its reason. The rest has at most LINES.
LINES = {ast.ClassDef: 300, ast.FunctionDef: 50}
ONE_COMMAND = "one subcommand from its options to what it prints, in the order of its help"
LONG = {
    "cli.advise": ONE_COMMAND,
    "cli.card": ONE_COMMAND,
    "cli.report": ONE_COMMAND,
    "cli._plot_parser": "the options of six kinds of pictures, a list without a decision",
    "data_side.PrunedDataMixin": "every method of the Trainer that the data side overrides; what "
    "they decide is in functions of other modules",
    "loss_side.SampleLossMixin": "as PrunedDataMixin, for the loss",
    "pruner.DynamicPruner": "the one object that a loop of your own holds; its methods share the "
    "position in the run",
    "pruner.DynamicPruner.__init__": "checks, then every field with its meaning, once",
    "report.PruningReport": "the fields of report.json and what follows from them",
    "scoring_runs.score_dataset": "the arguments of the Trainer pass through it",
}


@cache
def imported_by(*modules: str) -> dict[str, list[str]]:
    """Import the modules one after the other in a fresh process.

    Returns:
        For each module, the heavy packages that the process has imported after it.
    """
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
        timeout=PATIENCE,
    )
    return json.loads(done.stdout.splitlines()[-1])


# One process imports all of these in this order, and what it has imported stays. So the package
# itself comes first. The trainer comes last, because it imports more than the core.
ONE_BY_ONE = "hf_dynprune", *(f"hf_dynprune.{name}" for name in CORE), "hf_dynprune.trainer"


def test_package_itself_imports_nothing():
    assert imported_by(*ONE_BY_ONE)["hf_dynprune"] == []


def test_core_imports_torch_alone():
    seen = imported_by(*ONE_BY_ONE)
    assert {tuple(seen[f"hf_dynprune.{name}"]) for name in CORE} == {(), ("torch",)}
    assert seen["hf_dynprune.checks"] == []


def test_the_proof_can_fail():
    seen = imported_by(*ONE_BY_ONE)["hf_dynprune.trainer"]
    assert {"torch", "transformers", "accelerate", "datasets"} <= set(seen)


# ---- the sources ---------------------------------------------------------------------------------


def sources() -> dict[str, str]:
    """The source of each module but the facade; those of a folder are `folder.module`."""
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text()
        for path in paths
    }


MODULES = {name.removesuffix(".__init__") for name in sources()}


def names_in(node: ast.AST, package: list[str]) -> list[str]:
    """The dotted names that an import statement in a module of that package imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = package[: len(package) - node.level + 1] if node.level else []
    base = [*base, *([node.module] if node.module else [])]
    if base != ["hf_dynprune"]:
        return [".".join(base)]
    return [f"hf_dynprune.{alias.name}" for alias in node.names]


def imports_of(source: str, module: str) -> tuple[set[str], set[str]]:
    """What a module imports anywhere, also inside functions.

    Returns:
        The modules of ours, with `FACADE` for a public name of the package; and the top-level
        names of others.
    """
    package = ["hf_dynprune", *module.split(".")[:-1]]
    ours, others = set(), set()
    for node in ast.walk(ast.parse(source)):
        for name in names_in(node, package):
            top, _, rest = name.partition(".")
            if top != "hf_dynprune":
                others.add(top)
            elif rest != "__version__":
                ours.add(rest if rest in MODULES else FACADE)
    return ours, others


def rooms_of(files: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same graph, with each folder as one room."""
    graph: dict[str, set[str]] = {}
    for file, imported in files.items():
        room = file.split(".")[0]
        graph.setdefault(room, set()).update({name.split(".")[0] for name in imported} - {room})
    return graph


FILES = {
    name.removesuffix(".__init__"): imports_of(source, name)[0]
    for name, source in sources().items()
}
GRAPH = rooms_of(FILES)


def upward(graph: dict[str, set[str]], order: list[str]) -> set[tuple[str, str]]:
    """The (importing, imported) pairs in which the imported room does not come before."""
    return {
        (room, other)
        for room, imported in graph.items()
        for other in imported
        if order.index(other) >= order.index(room)
    }


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """A path that leads back to where it began; empty if there is none."""

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
        "import torch.nn as nn, os\n"
        "from . import distributed, __version__\n"
        "from .policies import UCB\n"
        "def f():\n"
        "    from safetensors.torch import save_file\n"
        "    import hf_dynprune.trainer\n"
        "    from hf_dynprune import plots\n"
        "    from hf_dynprune.cli import main\n"
    )
    ours, others = imports_of(source, "pruner")
    assert ours == {"distributed", "policies", "trainer", "plots", "cli"}
    assert others == {"torch", "os", "safetensors"}
    for module in ("policies.random", "policies.__init__"):
        source = "from .base import X\nfrom ..table import Y"
        assert imports_of(source, module)[0] == {"policies.base", "table"}


@pytest.mark.parametrize(
    "source",
    ["import hf_dynprune", "from hf_dynprune import UCB", "from . import UCB", "from . import *"],
)
def test_imports_of_the_facade_are_found(source):
    assert imports_of(source, "pruner")[0] == {FACADE}
    assert imports_of("from . import __version__", "report")[0] == set()


def test_cycles_are_found():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_imports_that_point_up_are_found():
    graph = {"a": set(), "b": {"a"}, "c": {"a", "b"}}
    assert upward(graph, ["a", "b", "c"]) == set()
    assert upward(graph, ["b", "a", "c"]) == {("b", "a")}


def test_every_module_has_a_place():
    assert set(GRAPH) == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", CORE)
def test_core_imports_what_it_may(module):
    assert GRAPH[module] <= CORE[module]


def test_imports_point_down():
    assert FACADE not in set().union(*FILES.values())
    assert upward(GRAPH, ORDER) == UPWARD


def test_no_circles():
    assert cycle_in(GRAPH) == []
    assert cycle_in(FILES) == []
    assert {"policies", "policies.base", "policies.guards", "policies.static"} <= set(FILES)


def test_tools_are_imported_by_tools_alone():
    for module in set(ORDER) - set(TOOLS):
        imported = GRAPH[module] & set(TOOLS)
        assert {(module, tool) for tool in imported} <= UPWARD, module


def test_the_command_line_is_imported_by_nothing():
    assert not any("cli" in imported for imported in GRAPH.values())


def test_the_data_side_needs_no_losses():
    assert not GRAPH["data_side"] & {"losses", "scoring", "loss_side"}


def test_only_one_module_talks_to_other_ranks():
    for module, source in sources().items():
        if module == "distributed":
            continue
        imported = []
        for node in ast.walk(ast.parse(source)):
            imported += names_in(node, ["hf_dynprune"])
        assert not [name for name in imported if name.startswith("torch.distributed")], module


def test_core_imports_no_more_than_torch_numpy_and_file_formats():
    files = [
        (module, source) for module, source in sources().items() if module.split(".")[0] in CORE
    ]
    assert len(files) > len(CORE)  # a folder has several
    allowed = {"torch", "numpy", "safetensors", "pyarrow", *sys.stdlib_module_names}
    for module, source in files:
        _, others = imports_of(source, module)
        assert others <= allowed, module


def too_long(sources):
    """Names of classes and functions over LINES; a function without its docstring."""
    found = set()

    def look(node, name):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef):
                continue
            own, lines = f"{name}.{child.name}", child.end_lineno - child.lineno + 1
            if isinstance(child, ast.FunctionDef) and ast.get_docstring(child) is not None:
                text = child.body[0]
                lines -= text.end_lineno - text.lineno + 1
            if lines > LINES[type(child)]:
                found.add(own)
            look(child, own)

    for module, source in sources.items():
        look(ast.parse(source), module)
    return found


def test_what_is_long_has_a_reason():
    assert too_long(sources()) == set(LONG)


def test_what_is_long_is_found():
    body = "\n".join(["    x = 1"] * 51)
    assert too_long({"m": f"def f():\n{body}"}) == {"m.f"}
    text = "\n".join(["    text"] * 60)
    assert too_long({"m": f'def f():\n    """\n{text}\n    """\n    return 1'}) == set()
    methods = "\n".join(f"    def f{i}(self):\n        pass" for i in range(151))
    assert too_long({"m": f"class C:\n{methods}"}) == {"m.C"}


def test_schedule_and_checks_need_no_torch():
    for module in ("schedule", "checks"):
        _, others = imports_of(sources()[module], module)
        assert others <= set(sys.stdlib_module_names), module
