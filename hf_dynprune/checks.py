"""Checks of arguments. Each error names the argument, its value and what is expected."""

import difflib
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any


def check_number(name: str, value: Any, expected: str, ok: Callable[[Any], bool]) -> None:
    """Raise TypeError unless `value` is a real number, ValueError unless it is finite and `ok`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} is not a number: expected {expected}.")
    if not (math.isfinite(value) and ok(value)):
        raise ValueError(f"{name}={value!r} is out of range: expected {expected}.")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise TypeError unless `value` is a whole number, ValueError if it is below `least`."""
    expected = f"a whole number of at least {least}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r} is not a whole number: expected {expected}.")
    if value < least:
        raise ValueError(f"{name}={value!r} is out of range: expected {expected}.")


def check_share(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless `value` is a number in [0, 1]."""
    check_number(name, value, "a share in [0, 1]", lambda share: 0 <= share <= 1)


def check_decay(value: Any) -> None:
    """Raise TypeError or ValueError unless `decay` is a number in (0, 1]."""
    expected = "the weight of a new observation, in (0, 1]"
    check_number("decay", value, expected, lambda decay: 0 < decay <= 1)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"{name}={value!r} is unknown: expected one of {known}.")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False.")


def missing(module: str, package: str, extra: str, error: ImportError) -> ImportError:
    """The error of a module whose optional package cannot be imported, with the way out."""
    return ImportError(
        f"{module} needs {package} ({error}): in the folder of hf_dynprune's repository, call "
        f"pip install '.[{extra}]'."
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"did you mean 'ucb'? "` for the names in `known` that are close to `name`, else `""`."""
    near = difflib.get_close_matches(str(name), list(known), n=2, cutoff=0.4)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""
