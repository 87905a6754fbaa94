"""Text of others, made safe for its place; and what is private, hidden."""

import ast

import pytest
from hostile import RAW, TEXTS

from hf_dynprune.escape import (
    Markdown,
    code,
    code_cell,
    fence_of,
    hide_folders,
    literal,
    markdown,
    printable,
    printable_lines,
    printable_values,
    target,
)


def rendered(text):
    """The inline text that a reader of Markdown sees."""
    reader = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("strikethrough")
    tokens = reader.parse(text)
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    return tokens[1].children


@pytest.mark.parametrize("text", [text for text in TEXTS if text.strip()], ids=repr)
def test_markdown_shows_a_text_as_it_is(text):
    children = rendered(markdown(text))
    assert {child.type for child in children} <= {"text", "text_special"}
    assert "".join(child.content for child in children) == printable(text)


@pytest.mark.parametrize("text", [text for text in TEXTS if text.strip()], ids=repr)
def test_code_shows_a_text_as_it_is(text):
    (child,) = rendered(code(text))
    assert (child.type, child.content) == ("code_inline", printable(text))


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_literals_are_python(text):
    assert ast.literal_eval(literal(text)) == text
    assert ast.literal_eval(literal({text: [text]})) == {text: [text]}
    assert not RAW.search(literal(text))


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_what_is_printable_can_be_printed(text):
    shown = printable(text)
    assert not RAW.search(shown)
    assert len(shown.splitlines()) <= 1
    shown.encode("utf-8")
    assert printable(shown) == shown
    lines = printable_lines(f"{text}\n\t{text}")
    assert lines.count("\n") == 1 + 2 * text.count("\n")
    assert not RAW.search(lines)
    assert printable_values({text: [text, (1, text)]}) == {shown: [shown, [1, shown]]}


@pytest.mark.parametrize(
    "text",
    [
        "top5_accuracy",
        "ResNet-8, 0.5",
        "4 × 1 = 4 (per device)",
        "-0.5",
        "1.5 x",
        "C++",
        "A & B",
        "né",
    ],
)
def test_ordinary_text_stays(text):
    assert printable(text) == markdown(text) == text


def test_what_is_markdown_already_stays():
    assert markdown(Markdown("**x**")) == "**x**"
    assert markdown(markdown("*")) == r"\*"
    assert code_cell("a") == "`a`"
    assert code_cell("a|b") == r"a\|b"
    assert fence_of("a```` b") == "`````"
    assert fence_of("a") == "```"
    assert target("a b/(c).png") == "a%20b/%28c%29.png"


@pytest.mark.parametrize(
    ("value", "hidden"),
    [
        ("/home/me/x.pt", "path/to/x.pt"),
        ("/home/me/my files/x y.pt", "path/to/x y.pt"),
        ("file:///home/me/x", "path/to/x"),
        ("~/x", "path/to/x"),
        ("~me/runs/x", "path/to/x"),
        ("../other/x", "path/to/x"),
        ("C:\\Users\\me\\x.pt", "path/to/x.pt"),
        ("C:/Users/me/x", "path/to/x"),
        ("\\\\server\\share\\x", "path/to/x"),
        ("/srv/", "path/to/srv"),
        ('{"scores": "/home/me/s.parquet", "c": 2}', '{"scores": "path/to/s.parquet", "c": 2}'),
        ("--model=../m/resnet", "--model=path/to/resnet"),
        ("see /home/me/a and /etc/b", "see path/to/a and path/to/b"),
        ("token hf_aBcDeFgHiJkL1", "token hf_..."),
        ({"hub_token": "x", "seed": 3}, {"hub_token": "...", "seed": 3}),
        (
            {"a": [{"api_key": "x", "WANDB_API_KEY": "y"}]},
            {"a": [{"api_key": "...", "WANDB_API_KEY": "..."}]},
        ),
        ({"token": "x", "eos_token": "</s>"}, {"token": "...", "eos_token": "</s>"}),
        ({"scores": ("/a/b", 1)}, {"scores": ["path/to/b", 1]}),
    ],
)
def test_what_is_private(value, hidden):
    assert hide_folders(value) == hidden


@pytest.mark.parametrize(
    "value",
    [
        "runs/x",
        "1/3",
        "https://example.org/a/b",
        "hf://datasets/a/b",
        "user/name",
        "and/or",
        "/",
        "..",
        3,
        None,
        True,
        "a\\nb",
        "</script>",
        "hf_hub",
        "km/h",
    ],
)
def test_what_is_not_private(value):
    assert hide_folders(value) == value
