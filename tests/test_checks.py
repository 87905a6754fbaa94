"""Checks of arguments: what passes, and the error with the name, the value and what is expected."""

import math
import re

import numpy as np
import pytest

from hf_dynprune.checks import (
    check_choice,
    check_count,
    check_decay,
    check_flag,
    check_number,
    check_share,
    did_you_mean,
)

NAN, INF = math.nan, math.inf


def positive(value):
    check_number("rate", value, "a positive number", lambda rate: rate > 0)


def from_2(value):
    check_count("rate", value, 2)


def share(value):
    check_share("rate", value)


def one_of(value):
    check_choice("rate", value, ("slow", "fast"))


def flag(value):
    check_flag("rate", value)


@pytest.mark.parametrize(
    ("check", "values"),
    [
        (positive, [1, 0.1, 1e300, np.float32(0.5), np.int64(2)]),
        (from_2, [2, 3, np.int64(2)]),
        (share, [0, 1, 0.5, 1.0, np.float64(0.5)]),
        (check_decay, [1, 1.0, 1e-9]),
        (one_of, ["slow", "fast"]),
        (flag, [True, False]),
    ],
)
def test_what_passes(check, values):
    for value in values:
        assert check(value) is None


@pytest.mark.parametrize(
    ("check", "error", "values"),
    [
        (positive, ValueError, [0, -1, NAN, INF, -INF]),
        (positive, TypeError, ["1", None, True, [1], 1j]),
        (from_2, ValueError, [1, 0, -5]),
        (from_2, TypeError, [2.0, 2.5, "2", None, True]),
        (share, ValueError, [-0.1, 1.1, NAN, INF]),
        (share, TypeError, ["0.5", None, False]),
        (one_of, ValueError, ["Slow", "", None, 1]),
        (flag, TypeError, [1, 0, "yes", None]),
    ],
)
def test_what_is_refused_is_named(check, error, values):
    for value in values:
        with pytest.raises(error, match=re.escape(f"rate={value!r}")):
            check(value)


def test_a_decay_is_named():
    for value in (0, -0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=re.escape(f"decay={value!r}")):
            check_decay(value)


def test_the_error_has_what_is_expected():
    with pytest.raises(ValueError, match="a positive number"):
        positive(0)
    with pytest.raises(TypeError, match="2"):
        from_2("x")
    with pytest.raises(ValueError, match="'slow', 'fast'"):
        one_of("medium")


@pytest.mark.parametrize(
    ("name", "near"),
    [("ucbb", ["ucb"]), ("randm", ["random"]), ("xyz", []), (3, [])],
)
def test_near_names_are_suggested(name, near):
    known = ["ucb", "random", "full"]
    said = did_you_mean(name, known)
    assert [one for one in known if repr(one) in said] == near
    assert said == "" or said.endswith("? ")


def test_at_most_two_names_are_suggested():
    assert did_you_mean("abc", ["abd", "abe", "abf"]).count("'") == 4
