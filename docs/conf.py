"""The site: `make docs` builds it into docs/_build. Warnings are errors, and so is

- a reference that leads nowhere,
- a public name of `hf_dynprune` without an entry in the API reference,
- a page that loads anything from another host.
"""

import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from sphinx.util.inspect import stringify_signature

sys.path.insert(0, str(Path(__file__).parents[1]))
import hf_dynprune
from hf_dynprune.policies import PruningPolicy

project = "hf_dynprune"
author = copyright = "The hf_dynprune authors"
release = version = hf_dynprune.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = True

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "hf_dynprune"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
highlight_language = "none"  # formulas are literal blocks
pygments_style = "friendly"
pygments_dark_style = "native"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Other people's types. Their pages are on other hosts, and the build asks no network.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|transformers|datasets|numpy|np|nn|matplotlib|huggingface_hub|trl|pathlib|os|abc"
        r"|collections|typing|dataclasses)\..*",
    ),
    (r"py:.*", r"(Tensor|DataLoader|Trainer|SFTTrainer|Figure|ModelCard|Path|Self|T)"),
    (r"py:.*", r"(TimmWrapperForImageClassification|dict\[str)"),
    (r"py:.*", r"hf_dynprune\.schedule\.Scheduled"),  # what a schedule asks of a policy
]

# ---- docstrings: Markdown -> reStructuredText ----------------------------------------------------

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")
_LINK = re.compile(r"\[`([\w.]+)`\]")


def _inline(lines: list[str]) -> list[str]:
    """The lines of a paragraph: [`name`] becomes a reference, `code` becomes ``code``.

    Code may span lines. | and a trailing _ mean nothing.
    """
    parts = re.split(r"(\[`[\w.]+`\]|`[^`]+`)", "\n".join(lines))
    for i, part in enumerate(parts):
        if found := _LINK.fullmatch(part):
            parts[i] = f":py:obj:`{found[1]}`"
        elif part.startswith("`"):
            code = re.sub(r"\s*\n\s*", " ", part[1:-1])
            parts[i] = f"``{code}``"
        else:
            parts[i] = re.sub(r"(\w_)(?!\w)", r"\1\\", part.replace("|", r"\|"))
    return "".join(parts).split("\n")


_SEVERAL = re.compile(r"    (\w+(?:, \w+)+): (.*)")


def _one_name_each(lines: list[str]) -> list[str]:
    """`a, b: text` under `Attributes:` as `a: text` and `b: text`. Napoleon would see a type."""
    made: list[str] = []
    within, names, text = False, [], []
    for line in [*lines, "end"]:
        if names and line.startswith("     "):
            text.append(line)
            continue
        for name in names:
            made += [f"    {name}: {text[0]}", *text[1:]]
        names = []
        if line.strip() and not line.startswith(" "):
            within = line == "Attributes:"
        if within and (found := _SEVERAL.match(line)):
            names, text = found[1].split(", "), [found[2]]
        else:
            made.append(line)
    return made[:-1]


def to_rst(lines: list[str]) -> list[str]:
    """A docstring of this project as reStructuredText.

    Fenced code becomes a code block. A block that is indented and stands after a blank line,
    outside of the sections that Napoleon reads, is a formula: it becomes a literal block.
    """
    made: list[str] = []
    paragraph: list[str] = []
    fenced = literal = section = listed = False

    def flush() -> None:
        made.extend(_inline(paragraph))
        paragraph.clear()

    for line in _one_name_each(lines):
        blank, indent = not line.strip(), len(line) - len(line.lstrip())
        after_blank = not paragraph and bool(made)
        if found := re.match(r"( *)```(\w*)$", line):
            flush()
            fenced = not fenced
            made += ["", f"{found[1]}.. code-block:: {found[2]}", ""] if fenced else [""]
            continue
        if fenced:
            made.append(f"    {line}")
            continue
        if not blank and indent == 0:
            literal, section = False, bool(_SECTION.match(line))
        if indent >= 4 and after_blank and not blank and not section and not literal:
            literal = True
            made += ["::", ""]
        if literal:
            made.append(line)
            continue
        if blank:
            flush()
            made.append("")
            listed = False
            continue
        if line.startswith("- ") and paragraph and not listed:
            flush()
            made.append("")
        listed = listed or line.startswith("- ")
        paragraph.append(line)
    flush()
    return made


# Napoleon reads `Whether it acts: ...` of a property as a type. Its colon waits in another letter.
_COLON = "\ua789"


def _before_napoleon(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
    lines[:] = to_rst(lines)
    if what in ("property", "attribute", "data"):
        lines[:] = [line.replace(":", _COLON) for line in lines]


def _after_napoleon(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]


# ---- signatures ----------------------------------------------------------------------------------


def _short_signature(app: Sphinx, what: str, name: str, obj, options, signature, returns):
    """A policy's own fields. Those of every policy, at their defaults, become `**settings`."""
    if what != "class" or not issubclass(obj, PruningPolicy) or "plan" in obj.__abstractmethods__:
        return None
    common = {entry.name: entry.default for entry in fields(PruningPolicy)}
    whole = inspect.signature(obj)
    own = [each for each in whole.parameters.values() if common.get(each.name, ()) != each.default]
    settings = inspect.Parameter("settings", inspect.Parameter.VAR_KEYWORD)
    shown = whole.replace(parameters=[*own, settings], return_annotation=inspect.Signature.empty)
    return stringify_signature(shown, unqualified_typehints=True), None


# ---- references ----------------------------------------------------------------------------------


def _resolve(app: Sphinx, env, node, contnode):
    """A name of ours by its last part: `hf_dynprune.policies.base.Choice` is documented once."""
    if node.get("refdomain") != "py":
        return None
    objects = env.get_domain("py").objects
    last = node["reftarget"].rpartition(".")[2]
    found = sorted({name for name in objects if name.rpartition(".")[2] == last}, key=len)
    if not found:
        return None
    entry = objects[found[0]]
    target = app.builder.get_relative_uri(node["refdoc"], entry.docname) + f"#{entry.node_id}"
    link = nodes.reference("", "", internal=True, refuri=target, reftitle=found[0])
    link += contnode
    return link


def _check_names(app: Sphinx, env) -> None:
    known = env.get_domain("py").objects
    missing = [name for name in hf_dynprune.__all__ if f"hf_dynprune.{name}" not in known]
    if missing:
        raise SphinxError(f"docs/api.md does not document {', '.join(missing)}.")


def _check_hosts(app: Sphinx, failure: Exception | None) -> None:
    if failure is not None or app.builder.format != "html":
        return
    outside = r"(?:https?:)?//"
    searches = {
        "*.html": [
            rf"<(?:script|img|iframe|source)[^>]*\ssrc=\"{outside}[^\"]*",
            rf"<link[^>]*rel=\"(?:stylesheet|preload|icon)\"[^>]*href=\"{outside}",
        ],
        "*.css": [rf"(?:url\(|@import)\s*[\"']?{outside}[^)\"']*"],
    }
    for pattern, kinds in searches.items():
        for file in Path(app.outdir).rglob(pattern):
            text = file.read_text()
            for kind in kinds:
                if found := re.search(kind, text):
                    raise SphinxError(f"{file.name} loads from another host: {found[0]}")


def setup(app: Sphinx) -> None:
    # Napoleon, which reads reStructuredText, has the priority 500.
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=600)
    app.connect("autodoc-process-signature", _short_signature)
    app.connect("missing-reference", _resolve)
    app.connect("env-check-consistency", _check_names)
    app.connect("build-finished", _check_hosts)
