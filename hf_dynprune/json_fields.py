"""Checks of what a JSON file holds. Each error names the field, its value and what is expected.

A check takes the place of a value, such as `epochs[3].seconds`, and the value. It returns the value
as it is used, or raises ValueError.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from .files import number

Check = Callable[[str, Any], Any]

_MAX_DEPTH = 20  # of values that may be any JSON


def wrong(place: str, value: Any, expected: str) -> ValueError:
    """The error of a wrong value."""
    return ValueError(f"{place}={reprlib.repr(value)}: expected {expected}")


# ---- single values -------------------------------------------------------------------------------


def real(place: str, value: Any) -> float:
    """A number, also NaN or infinite."""
    value = number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(place, value, "a number")
    if isinstance(value, int) and abs(value) >= 2**1023:
        raise wrong(place, value, "a number that a float can hold")
    return value


def finite(place: str, value: Any) -> float:
    """A finite number."""
    if not math.isfinite(real(place, value)):
        raise wrong(place, value, "a finite number")
    return value


def share(place: str, value: Any) -> float:
    """A number in [0, 1], to rounding."""
    if not -1e-9 <= finite(place, value) <= 1 + 1e-9:
        raise wrong(place, value, "a share in [0, 1]")
    return value


def spent(place: str, value: Any) -> float:
    """A finite number of at least 0."""
    if finite(place, value) < 0:
        raise wrong(place, value, "a number of at least 0")
    return value


def whole(place: str, value: Any) -> int:
    """A whole number of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        raise wrong(place, value, "a whole number")
    return value


def count(place: str, value: Any, least: int = 0) -> int:
    """A whole number of at least 0."""
    if whole(place, value) < least:
        raise wrong(place, value, f"a whole number of at least {least}")
    return value


def size(place: str, value: Any) -> int:
    """A whole number of at least 1."""
    return count(place, value, 1)


def flag(place: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise wrong(place, value, "true or false")
    return value


def text(place: str, value: Any) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise wrong(place, value, "a text")
    return value


def any_json(place: str, value: Any, depth: int = 0) -> Any:
    """Any JSON value that is not nested too deeply to be copied and shown."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{place} is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            any_json(place, item, depth + 1)
    return value


def _mapping(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(place, value, "a mapping")
    return value


# ---- checks of checks ----------------------------------------------------------------------------


def or_none(check: Check) -> Check:
    """None, or what `check` accepts."""
    return lambda place, value: None if value is None else check(place, value)


def or_empty(check: Check) -> Check:
    """An empty mapping, or what `check` accepts."""
    return lambda place, value: {} if value == {} else check(place, value)


def list_of(check: Check) -> Check:
    """A list, each item of which `check` accepts."""

    def checked(place: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise wrong(place, value, "a list")
        return [check(f"{place}[{i}]", item) for i, item in enumerate(value)]

    return checked


def mapping_of(check: Check) -> Check:
    """A mapping, each value of which `check` accepts."""

    def checked(place: str, value: Any) -> dict[str, Any]:
        items = _mapping(place, value).items()
        return {name: check(f"{place}[{name!r}]", item) for name, item in items}

    return checked


def fields(required: Mapping[str, Check]) -> Check:
    """A mapping with these fields. Others are left out."""

    def checked(place: str, value: Any) -> dict[str, Any]:
        found = {}
        for name, check in required.items():
            inner = f"{place}.{name}" if place else name
            if name not in _mapping(place, value):
                raise ValueError(f"it has no field {inner!r}")
            found[name] = check(inner, value[name])
        return found

    return checked


def open_fields(
    required: Mapping[str, Check], optional: Mapping[str, Check] | None = None
) -> Check:
    """A mapping with the required fields. It may also have the optional ones, and any other."""

    def checked(place: str, value: Any) -> dict[str, Any]:
        given = any_json(place, _mapping(place, value))
        known = {name: check for name, check in (optional or {}).items() if name in given}
        return {**given, **fields({**required, **known})(place, given)}

    return checked
