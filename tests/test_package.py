"""What is published: the wheel, the texts about it, and the programs that build and check it."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import hf_dynprune

ROOT = Path(__file__).parents[1]
PACKAGE = Path(hf_dynprune.__file__).parent
VERSION = hf_dynprune.__version__
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python(*words, folder):
    """What a new interpreter prints, outside of the repository."""
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with wheel and sdist, built from a copy of the sources, without a network."""
    copy, folder = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    # Not a part of the package, and a wheel must not have it.
    for name in ("hf_dynprune", "recipes", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "results", "_build")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    program = "from setuptools import build_meta as made; "
    program += f"made.build_sdist({str(folder)!r}); made.build_wheel({str(folder)!r})"
    python("-W", "ignore", "-c", program, folder=copy)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {
        f"hf_dynprune/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix in (".py", ".md", ".typed")
    }
    assert names == sources
    assert "hf_dynprune/py.typed" in names
    assert {"model_card_template.md", "dataset_card_template.md"} <= {
        Path(name).name for name in names
    }


def test_the_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (place,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(f"{place}/METADATA").decode())
        assert (
            "hf-dynprune = hf_dynprune.cli:main"
            in archive.read(f"{place}/entry_points.txt").decode()
        )
        assert f"{place}/licenses/LICENSE" in names
    assert metadata["Name"] == "hf-dynprune"
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == PROJECT["license"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    required = [each for each in metadata.get_all("Requires-Dist") if "extra ==" not in each]
    assert len(required) == len(PROJECT["dependencies"])


def test_the_wheel_can_be_imported_from_where_it_is_unpacked(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'unpacked')!r}); import hf_dynprune; "
    )
    program += "print(hf_dynprune.__file__, hf_dynprune.__version__); "
    program += "from hf_dynprune.cli import main; main(['--help'])"
    out = python("-c", program, folder=tmp_path)
    assert out.startswith(f"{tmp_path / 'unpacked' / 'hf_dynprune' / '__init__.py'} {VERSION}\n")
    assert "usage: hf-dynprune" in out


def test_the_sdist_has_all_that_a_build_needs(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "hf_dynprune/py.typed"} <= names


# ---- texts ---------------------------------------------------------------------------------------


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## \[(.*?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    (unreleased, _), (version, date), *_ = headings
    assert unreleased == "Unreleased"
    assert version == VERSION
    assert re.fullmatch(r" - \d{4}-\d\d-\d\d", date)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == VERSION
    assert citation["license"] == PROJECT["license"]
    assert citation["keywords"] == PROJECT["keywords"]
    assert [each["name"] for each in citation["authors"]] == [
        each["name"] for each in PROJECT["authors"]
    ]
    assert f"## [{VERSION}] - {citation['date-released']}" in (ROOT / "CHANGELOG.md").read_text()


FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_ones_that_github_takes(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form.keys() == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= form.keys()
    assert all({"id", "attributes"} <= part.keys() for part in form["body"])
    assert {part["type"] for part in form["body"]} <= {"input", "textarea", "dropdown"}
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids))
    for part in form["body"]:
        assert part["attributes"]["label"]
        assert part["type"] != "dropdown" or part["attributes"]["options"]


def requirements():
    """What pyproject.toml asks for, in the dependencies and in the extras."""
    extras = PROJECT["optional-dependencies"].values()
    named = [*PROJECT["dependencies"], *(each for extra in extras for each in extra)]
    asked = [Requirement(each) for each in named]
    return [each for each in asked if each.name != PROJECT["name"]]


def pins(path):
    """(package, version) of each line of a file of constraints; a package may have several."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    pinned = [Requirement(line) for line in lines]
    assert all(str(each.specifier).startswith("==") for each in pinned)
    return [(canonicalize_name(each.name), str(each.specifier)[2:]) for each in pinned]


CONSTRAINTS = [ROOT / "constraints.txt", *sorted((ROOT / ".ci/constraints").glob("*.txt"))]


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_every_dependency_is_pinned_to_a_version_that_is_allowed(path):
    pinned = pins(path)
    assert {canonicalize_name(each.name) for each in requirements()} <= {name for name, _ in pinned}
    for each in requirements():
        for name, version in pinned:
            if name == canonicalize_name(each.name):
                assert version in each.specifier, (each, version)


def test_the_lowest_versions_are_those_that_pyproject_allows():
    """Of each package for users that has one: the lowest version is the highest of its floors."""
    pinned = dict(pins(ROOT / ".ci/constraints/lowest.txt"))
    floors = {}
    for each in requirements():
        for part in each.specifier:
            if part.operator == ">=" and each.name not in ("torch", *TOOLS):
                floors.setdefault(each.name, []).append(Version(part.version))
    assert {"accelerate", "datasets", "numpy", "timm", "transformers", "trl"} <= floors.keys()
    for name, versions in floors.items():
        assert Version(pinned[name]) == max(versions), name


# Not for users, so their versions are those of constraints.txt.
TOOLS = {
    Requirement(each).name
    for extra in ("docs", "dev")
    for each in PROJECT["optional-dependencies"][extra]
}


def test_ci_installs_constraints_that_exist():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    jobs = workflow["jobs"]["versions"]["strategy"]["matrix"]["include"]
    for job in jobs:
        assert ROOT / job["constraints"] in CONSTRAINTS
    assert {ROOT / job["constraints"] for job in jobs} == set(CONSTRAINTS)
    assert "$(CONSTRAINTS)" in (ROOT / "Makefile").read_text()


# ---- the release ---------------------------------------------------------------------------------


def test_the_release_workflow_calls_the_program():
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    commands = [step.get("run", "") for step in workflow["jobs"]["build"]["steps"]]
    assert any(command.startswith(".ci/release") for command in commands)
    assert workflow["permissions"] == {"contents": "read"}  # it does not publish
    program = ROOT / ".ci/release"
    assert program.stat().st_mode & 0o111
    for step in ("-m build", "twine check --strict", ".ci/installed.py", "hf-dynprune"):
        assert step in program.read_text()


def test_a_tag_of_another_version_is_refused():
    done = subprocess.run([ROOT / ".ci/release", "v99.0.0"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "v99.0.0" in done.stderr
    assert f"v{VERSION}" in done.stderr
