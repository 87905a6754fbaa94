"""Names and texts that a report, a table or scores of somebody else may hold."""

import re

TEXTS = [
    "<script>alert(1)</script>",
    "</td></tr></table><img src=x onerror=alert(1)>",
    "<!-- open",
    "-->",
    "a|b|c",
    "\\|",
    "ends with \\",
    "# heading",
    "x\n\n# heading",
    "x\r\n| a | b |\n|---|---|",
    "x\n---\nlicense: mit\n---",
    "---",
    "===",
    "- item",
    "1. item",
    "`code`",
    "``",
    "```\nout",
    "~~~\nout",
    "[here](javascript:alert(1))",
    "![here](https://example.org/x.png)",
    "[here]: https://example.org",
    "<https://example.org>",
    "**bold** *it* _it_ __bold__ ~~gone~~",
    "$x$ $$y$$",
    "&lt;b&gt; &#60;b&#62;",
    "{{ 7 * 7 }} {% raw %}",
    "'\"",
    '"); import os; os.system("x',
    "yes",
    "no: [",
    "null",
    "*anchor",
    "!!python/object:os.system",
    "%s %(name)s {0} {name}",
    "\ud800 half of a pair",
    "\x1b[31mred\x1b[0m\x07\x08",
    "\x9b31m",
    "\u202eright to left",
    "\u2028\u2029\x85",
    "\x00",
    "\ufeff",
    "e" * 2000,
    " ",
    "",
]
# What a terminal obeys, or what cannot be written.
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def parsed(markdown):
    """The tokens of a card, without its metadata and the comment at its start."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    body = re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL)
    body = re.sub(r"<!-- hf_dynprune wrote this card.*?-->", "", body, count=1, flags=re.DOTALL)
    return reader.parse(body)


def shape(markdown):
    """What a reader of Markdown sees, without the texts: tags in their order; no HTML at all."""
    found = []
    for token in parsed(markdown):
        found.append((token.type, token.tag))
        for child in token.children or ():
            if child.type not in ("text", "text_special", "softbreak"):
                found.append((child.type, child.tag))
    assert not [kind for kind, _ in found if kind.startswith("html")]
    return found


def programs(markdown):
    """The blocks of Python."""
    return [token.content for token in parsed(markdown) if token.info == "python"]
