"""PruningArguments, from a command line, a mapping or a file, as HfArgumentParser reads them."""

import json
import re

import pytest
from transformers import HfArgumentParser

from hf_dynprune.arguments import PruningArguments
from hf_dynprune.policies import POLICIES, UCB, EpsilonGreedy, FullData, RandomPruning


def parse(*words: str) -> PruningArguments:
    (arguments,) = HfArgumentParser(PruningArguments).parse_args_into_dataclasses(list(words))
    return arguments


@pytest.mark.parametrize(
    ("words", "policy"),
    [
        ([], None),
        (["--pruning", "none"], None),
        (["--pruning", "None"], None),
        (["--pruning", "full"], FullData()),
        (["--pruning", "ucb"], UCB()),
        (["--pruning", "UCB", "--keep_ratio", "0.3"], UCB(0.3)),
        (["--pruning=epsilon_greedy", "--keep_ratio=1"], EpsilonGreedy(1.0)),
        (
            [
                "--pruning",
                "random",
                "--keep_ratio",
                "0.1",
                "--pruning_kwargs",
                '{"replacement": false, "last": 0.125}',
            ],
            RandomPruning(0.1, replacement=False, last=0.125),
        ),
        (
            ["--pruning", "ucb", "--pruning_kwargs", '{"keep_ratio": 0.2, "max_age": null}'],
            UCB(0.2),
        ),
    ],
)
def test_command_line(words, policy):
    assert parse(*words).policy() == policy


def test_command_line_beside_training_arguments(tmp_path):
    from transformers import TrainingArguments

    parser = HfArgumentParser((PruningArguments, TrainingArguments))
    words = [
        "--pruning",
        "ucb",
        "--keep_ratio",
        "0.3",
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "--seed",
        "7",
    ]
    pruning, training = parser.parse_args_into_dataclasses(words)
    assert pruning.policy() == UCB(0.3)
    assert training.seed == 7


@pytest.mark.parametrize("kwargs", [{"period": 10}, '{"period": 10}'])
def test_mapping_and_file(tmp_path, kwargs):
    values = {"pruning": "ucb", "keep_ratio": 0.3, "pruning_kwargs": kwargs}
    parser = HfArgumentParser(PruningArguments)
    (arguments,) = parser.parse_dict(values)
    assert arguments.policy() == UCB(0.3, period=10)
    (tmp_path / "run.json").write_text(json.dumps(values))
    (arguments,) = parser.parse_json_file(str(tmp_path / "run.json"))
    assert arguments.policy() == UCB(0.3, period=10)


def test_yaml_file(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "pruning: ucb\nkeep_ratio: 0.3\npruning_kwargs:\n  period: 10\n  bonus: std\n"
    )
    (arguments,) = HfArgumentParser(PruningArguments).parse_yaml_file(str(tmp_path / "run.yaml"))
    assert arguments.policy() == UCB(0.3, period=10, bonus="std")


@pytest.mark.parametrize("word", ["no", "off", "false", "none", "null", "~", ""])
def test_yaml_that_says_no(tmp_path, word):
    (tmp_path / "run.yaml").write_text(f"pruning: {word}\n")
    (arguments,) = HfArgumentParser(PruningArguments).parse_yaml_file(str(tmp_path / "run.yaml"))
    assert arguments.pruning == "none"
    assert arguments.policy() is None


@pytest.mark.parametrize("value", [5, True, 0, [], ["ucb"], {"ucb": 1}, b"ucb", 0.5])
def test_what_is_no_name_of_a_policy(value, reliability):
    reliability("scores")
    with pytest.raises(TypeError, match=re.escape(f"pruning={value!r}")):
        PruningArguments(value)


@pytest.mark.parametrize("name", [1, None, "name"])
def test_kwargs_that_are_no_fields(name, reliability):
    reliability("scores")
    with pytest.raises(ValueError, match=repr(name)):
        PruningArguments("ucb", pruning_kwargs={name: 2})


def test_policy_leaves_the_arguments_as_they_are():
    arguments = PruningArguments("ucb", 0.3, {"period": 10})
    assert arguments.policy() == arguments.policy() == UCB(0.3, period=10)
    assert arguments.pruning_kwargs == {"period": 10}


@pytest.mark.parametrize("text", ["{period: 10}", "period=10", "{", "{'period': 10}", "[" * 9999])
def test_kwargs_that_are_no_json_are_named(text):
    with pytest.raises(ValueError, match="JSON") as caught:
        PruningArguments("ucb", pruning_kwargs=text)
    assert repr(text)[:100] in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", ["[1]", "10", '"x"', [1], 3])
def test_kwargs_that_are_no_mapping_are_named(value):
    with pytest.raises(ValueError, match="pruning_kwargs="):
        PruningArguments("ucb", pruning_kwargs=value)


def test_keep_ratio_given_twice():
    with pytest.raises(ValueError, match=r"keep_ratio.*0\.3.*0\.4"):
        PruningArguments("ucb", 0.3, {"keep_ratio": 0.4}).policy()


@pytest.mark.parametrize("settings", [{"keep_ratio": 0.3}, {"pruning_kwargs": {"period": 10}}])
def test_settings_without_a_policy(settings):
    with pytest.raises(ValueError, match=r"'none'.*full, random"):
        PruningArguments(**settings).policy()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ucbb",), "'ucbb'.*'ucb'"),
        (("ucb", 3.0), r"keep_ratio=3\.0"),
        (("full", 0.3), "'full'.*'keep_ratio'"),
        (
            ("ucb", None, {"periode": 3}),
            "'periode'.*'period'",
        ),
        (("ucb", None, {"period": 0}), "period=0 "),
    ],
)
def test_what_does_not_fit_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        PruningArguments(*arguments).policy()


def test_help_names_the_policies(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = "".join(capsys.readouterr().out.split())  # a line may end at a hyphen
    assert "--pruning_kwargs" in text
    assert all(name in text for name in POLICIES)
