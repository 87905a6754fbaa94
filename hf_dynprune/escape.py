"""Text of others, made safe for the place where it is shown or published.

A report, a table or scores may come from anyone. A name in them may hold terminal escapes, Markdown
or HTML. And what is published must not tell the folders and tokens of this machine.
"""

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote_from_bytes

# ---- terminals -----------------------------------------------------------------------------------

# Not printable for Python, and harmless: the no-break space, and joiners in emoji and scripts.
_HARMLESS = "\u00a0\u200c\u200d"


def printable(text: object) -> str:
    """The text with backslash escapes for what a terminal would obey or not show.

    These are control characters, line ends, marks that change the direction of writing, and
    surrogates, which cannot be written to a file.
    """
    return "".join(
        c if c.isprintable() or c in _HARMLESS else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def printable_values(value: Any) -> Any:
    """A copy of a JSON value in which all texts are [`printable`]."""
    if isinstance(value, dict):
        return {printable_values(name): printable_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable_values(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def printable_lines(text: object) -> str:
    """The same, but line ends and tabs stay."""
    return re.sub(r"[^\n\t]+", lambda match: printable(match[0]), str(text))


# ---- Markdown ------------------------------------------------------------------------------------

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKS = re.compile(
    r"[\\`*\[\]|~$<>]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # between letters or digits it is no mark
    r"|&(?=#?\w+;)"  # would be an entity
    r"|^(?:[-+](?=\s|-|$)|#(?=[#\s]|$)|=)"  # a list, a heading, an underline
    r"|^\d{1,9}[.)](?=\s|$)"  # a numbered list
)


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def markdown(text: object) -> Markdown:
    """The text as Markdown that shows it as it is, also in a heading or in a cell of a table."""
    if isinstance(text, Markdown):
        return text

    def escaped(match: re.Match[str]) -> str:
        mark = match[0]
        return _ENTITIES.get(mark, f"{mark[:-1]}\\{mark[-1]}")

    return Markdown(_MARKS.sub(escaped, printable(text)))


def code(text: object) -> Markdown:
    """The text as code in a line."""
    shown = printable(text)
    fence = fence_of(shown, "`")
    space = " " if shown.startswith("`") or shown.endswith("`") or not shown.strip() else ""
    return Markdown(f"{fence}{space}{shown}{space}{fence}")


def code_cell(text: object) -> Markdown:
    """The text as code in a cell of a table, or as it is if it has a `|`.

    Also in code a `|` ends the cell, and readers differ in how it is escaped there.
    """
    return markdown(text) if "|" in str(text) else code(text)


def fence_of(text: str, shortest: str = "```") -> str:
    """Backticks that the text does not have in a row."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    return shortest if longest < len(shortest) else "`" * (longest + 1)


def target(path: str) -> Markdown:
    """A relative path as the target of a link."""
    return Markdown(quote_from_bytes(path.encode("utf-8", "surrogatepass")))


def literal(value: Any) -> Markdown:
    """The value as Python, for a block of code. Strings are in double quotes."""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    return Markdown(printable(text))


# ---- what is private -----------------------------------------------------------------------------

# A path that leads out of the working directory, also inside JSON.
_ROOT = r"""(?:(?:file://)?(?:~[\w.-]*|\.\.|[A-Za-z]:)?/|(?:~|\.\.|[A-Za-z]:)\\|\\\\)"""
_OUTSIDE = re.compile(rf"""(?<![\w.:/\\<-]){_ROOT}(?:[^\s"',]*[/\\])?([^\s"',/\\]+)[/\\]?""")
_WHOLE = re.compile(rf"""{_ROOT}(?:[^"'\n]*[/\\])?([^"'\n/\\]+)[/\\]?""")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
# Not `eos_token` and the like.
_SECRET = re.compile(
    r"(?:(?:.*_)?(?:hf|hub|auth|access|bearer|api)_)?token|.*(?:password|secret|api_?key)",
    re.IGNORECASE,
)


def hide_folders(value: Any) -> Any:
    """Leave out what is private: folders of this machine, and tokens.

    Of a path that leads out of the working directory the last part stays. Mappings and lists are
    searched. Other values are returned as they are.
    """
    if isinstance(value, Mapping):
        return {
            name: "..." if isinstance(item, str) and is_secret(name) else hide_folders(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [hide_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    if " -" not in value and (whole := _WHOLE.fullmatch(value)):  # may have spaces
        return f"path/to/{whole[1]}"
    return _TOKEN.sub("hf_...", _OUTSIDE.sub(r"path/to/\1", value))


def is_secret(name: object) -> bool:
    """Whether a field of this name holds a token or a password."""
    return _SECRET.fullmatch(str(name)) is not None
