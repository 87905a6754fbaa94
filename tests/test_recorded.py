"""Choices, weights and clocks are those that were recorded before the core was rearranged."""

import json

import pytest
from recorded import FILE, cases, run_of

RECORDED = json.loads(FILE.read_text())


def test_every_case_was_recorded():
    assert set(RECORDED) == {name for name, *_ in cases()}


@pytest.mark.parametrize(("name", "policy", "seed", "arguments"), list(cases()))
def test_run_is_as_recorded(name, policy, seed, arguments):
    found = run_of(policy, seed, arguments)
    assert found["planned"] == RECORDED[name]["planned"]
    assert found["epochs"] == RECORDED[name]["epochs"]
    assert found["columns"] == pytest.approx(RECORDED[name]["columns"], rel=1e-5)
