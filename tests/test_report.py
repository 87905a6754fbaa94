"""PruningReport: cost and chance checked by hand, and a round trip through a file."""

import copy
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_dynprune import report as module
from hf_dynprune.report import (
    FORMAT_VERSION,
    PHASES,
    EpochRecord,
    PruningReport,
    Stopwatch,
    by_seed,
    chance_of,
    describe_environment,
    differences,
    in_percent,
    numbers_in,
    passes,
    selection_of,
    shown_metric,
    shown_policy,
)

RESULTS = Path(__file__).parents[1] / "recipes" / "results"


def report(**values) -> PruningReport:
    return PruningReport(
        {"name": "ucb", "keep_ratio": 0.5}, num_samples=100, seed=0, data_seed=1, **values
    )


def record(
    epoch, samples=50, forward=50, backward=50, scoring=0, seconds=(0.0, 0.0, 0.0, 0.0), **values
) -> EpochRecord:
    return EpochRecord(
        epoch,
        False,
        samples,
        forward_passes=forward,
        backward_passes=backward,
        scoring_passes=scoring,
        seconds=dict(zip(PHASES, seconds, strict=True)),
        **values,
    )


def full() -> PruningReport:
    """A report in which every field has a value of its own."""
    epochs = [
        record(
            0,
            optimizer_steps=5,
            learning_rate=0.1,
            scores={"mean": 1.5},
            nonfinite=2,
            seconds=(1.0, 0.5, 0.25, 2.0),
        ),
        record(
            1,
            optimizer_steps=4,
            metrics={"eval_loss": 0.5},
            scoring=30,
            seconds=(1.5, 0.25, 0.0, 1.0),
        ),
    ]
    return report(
        num_epochs=2.0,
        epochs=epochs,
        selection=selection_of(np.array([0, 1, 2, 2]), chance_of([2 / 4, 3 / 4])),
        nonfinite_samples=[3, 7],
        resumed=[{"epoch": 1, "step": 5}],
        environment={"device": "cpu", "versions": {"torch": "x"}},
        preparation={"method": "el2n", "passes": 30.0, "charged": False},
        provenance={
            "model": "owner/model",
            "model_class": "Net",
            "task": "image-classification",
            "dataset": {"id": "owner/data", "fingerprint": "4 samples, 1f2e", "labels": "9a"},
            "arguments": {"learning_rate": 0.1},
        },
    )


# ---- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((0, 0, 0), 0.0),
        ((100, 100, 0), 100.0),  # forward and backward: a whole pass
        ((0, 0, 30), 10.0),  # a scoring pass counts a third
        ((30, 0, 0), 10.0),  # forward alone, too
        ((90, 60, 30), 90 / 3 + 2 * 60 / 3 + 30 / 3),  # 80
    ],
)
def test_passes(counts, expected):
    forward, backward, scoring = counts
    made = report(
        num_epochs=2.0, epochs=[record(0, forward=forward, backward=backward, scoring=scoring)]
    )
    assert passes(*counts) == made.passes == pytest.approx(expected)
    assert made.cost_ratio == pytest.approx(expected / (100 * 2))
    assert made.cost_against(8) == pytest.approx(expected / (100 * 8))
    assert made.cost_against(0) == 0


def test_full_run_costs_1():
    made = report(
        num_epochs=3.0, epochs=[record(e, samples=100, forward=100, backward=100) for e in range(3)]
    )
    assert made.cost_ratio == 1.0


def test_cost_of_a_part_of_an_epoch():
    made = report(
        num_epochs=1.5,
        epochs=[record(0, forward=40, backward=40), record(1, forward=20, backward=20)],
    )
    assert made.cost_ratio == pytest.approx(60 / (100 * 1.5))


@pytest.mark.parametrize(("charged", "expected"), [(True, 180.0), (False, 100.0)])
def test_preparation_is_charged_or_not(charged, expected):
    preparation = {"method": "el2n", "passes": 80.0, "charged": charged}
    made = report(num_epochs=4.0, epochs=[record(0), record(1)], preparation=preparation)
    assert made.passes == expected
    assert made.cost_ratio == expected / (100 * 4)
    assert made.totals["forward_passes"] == 100  # of the epochs alone
    assert made.to_dict()["preparation"] == preparation
    assert PruningReport.from_dict(made.to_dict()).passes == expected


@pytest.mark.parametrize(
    ("preparation", "before"),
    [
        ({}, (0, 0)),
        ({"passes": 80.0, "seconds": 9.0, "charged": True}, (0.8, 9)),
        ({"passes": 80.0, "seconds": 9.0, "charged": False}, (0, 0)),
        ({"passes": 80.0, "charged": True}, (0.8, 0)),  # a user's scores may lack their seconds
    ],
)
def test_what_was_spent_until_the_end_of_each_epoch(preparation, before):
    epochs = [
        record(0, seconds=(3.0, 1.0, 0.5, 7.0)),
        record(1, scoring=30, seconds=(2.0, 0, 0, 7)),
    ]
    made = report(num_epochs=2.0, epochs=epochs, preparation=preparation)
    assert made.spent("passes") == pytest.approx([before[0] + 0.5, before[0] + 1.1])
    assert made.spent("seconds") == pytest.approx([before[1] + 4.5, before[1] + 6.5])
    assert made.spent("passes")[-1] == pytest.approx(made.passes / made.num_samples)
    assert made.spent("seconds")[-1] == made.spent_seconds


def test_nothing_trained_yet():
    made = report()
    assert made.passes == made.cost_ratio == made.spent_seconds == 0
    assert made.spent("passes") == made.spent("seconds") == []
    assert made.results == {}
    assert made.summary()["passes"].startswith("0, 0.00 over 100 samples")
    assert made.metrics == {}
    assert made.totals["seconds"] == dict.fromkeys(PHASES, 0.0)


def test_totals_are_sums():
    assert full().totals == {
        "forward_passes": 100,
        "backward_passes": 100,
        "scoring_passes": 30,
        "optimizer_steps": 9,
        "nonfinite": 2,
        "seconds": {"training": 2.5, "choosing": 0.75, "scoring": 0.25, "evaluation": 3.0},
    }


def test_metrics_are_those_of_the_last_evaluation():
    first, second, third = (
        record(0, metrics={"eval_loss": 0.1}),
        record(1, metrics={"eval_loss": 0.7}),
        record(2),
    )
    assert report(epochs=[first, second, third]).metrics == {"eval_loss": 0.7}
    assert report(epochs=[first, third]).metrics == {"eval_loss": 0.1}


def test_results_have_no_prefix_and_no_speed():
    metrics = {
        "eval_loss": 0.1,
        "eval_accuracy": 0.5,
        "eval_runtime": 3.0,
        "eval_samples_per_second": 9.0,
        "eval_model_preparation_time": 0.1,
        "test_f1": 0.2,
    }
    made = report(epochs=[record(0, metrics=metrics)])
    assert made.results == {"loss": 0.1, "accuracy": 0.5, "test_f1": 0.2}


# ---- the stopwatch -------------------------------------------------------------------------------


def test_laps_are_added_to_their_phases(monkeypatch):
    clock = iter([10.0, 13.0, 14.0, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    seconds, watch = dict.fromkeys(PHASES, 1.0), Stopwatch()
    watch.lap("training")  # not running: nothing is added
    assert not watch.running
    watch.start(seconds)
    watch.lap("choosing")
    watch.lap("training")
    watch.lap("choosing")
    assert watch.running
    watch.stop()
    watch.lap("training")
    assert not watch.running
    assert seconds == {"training": 2.0, "choosing": 10.0, "scoring": 1.0, "evaluation": 1.0}


# ---- in words ------------------------------------------------------------------------------------


def test_summary_has_the_numbers():
    made = full()
    lines = made.summary()
    assert lines["policy"] == "ucb(keep_ratio=0.5)"
    assert (lines["seed"][0], lines["seed"][-1]) == ("0", "1")  # of choices and of the order
    assert lines["cost"].split()[0] == f"{made.cost_ratio:.4f}"
    assert lines["passes"].startswith("110, 1.10 over 100 samples")
    assert lines["optimizer steps"] == "9"
    assert lines["seconds"] == "training 2.5, choosing 0.8, scoring 0.2, evaluation 3.0"
    assert lines["last metrics"] == "eval_loss 0.5"
    assert "50.00 %" in lines["kept"]  # of the samples always
    assert f"{100 * made.selection['chance_shares']['always']:.2f} %" in lines["kept by chance"]
    assert lines["preparation"].startswith("el2n: 30 passes, 0.0 seconds")
    assert "3, 7" in lines["non-finite"]
    assert "step 5" in lines["resumed"]
    assert lines["hardware"] == made.hardware == "1 × cpu"
    assert lines["versions"] == "hf_dynprune unknown, torch x"


def test_summary_leaves_out_what_the_run_does_not_have():
    lines = report(epochs=[record(0, metrics={"eval_loss": 0.5, "eval_f1": 0.25})]).summary()
    assert not {"kept", "preparation", "non-finite", "resumed"} & set(lines)
    assert report(epochs=[record(0)]).summary()["last metrics"] == "none"
    made = report(epochs=[record(0, metrics={"eval_loss": 0.5, "eval_f1": 0.25})])
    assert made.summary("eval_f1")["last metrics"] == "eval_f1 0.25"


def test_summary_of_many_nonfinite_samples_is_short():
    made = report(epochs=[record(0, nonfinite=50)], nonfinite_samples=list(range(50)))
    assert len(made.summary()["non-finite"]) < 100


def test_policy_and_metric_as_text():
    values = {"name": "ucb", "keep_ratio": 0.5, "decay": 0.8, "digest": "x", "first": 2}
    assert shown_policy(values) == "ucb(keep_ratio=0.5, first=2)"  # 0.5 and 0.8 are the defaults
    assert shown_policy({"name": "full"}) == "full"
    assert shown_policy({"name": "theirs", "a": 1, "b": None}) == "theirs(a=1)"
    assert shown_metric("eval_accuracy", 0.5) == "50.00 %"
    assert shown_metric("eval_accuracy", 50.0) == "50"
    assert shown_metric("eval_loss", 0.123456) == "0.1235"
    assert in_percent("accuracy", [0, 0.5, 1])
    assert not in_percent("accuracy", [0.5, 1.1])
    assert not in_percent("f1", [0.5])


# ---- how often samples were kept -----------------------------------------------------------------


def test_selection_by_hand():
    # Three choices of 2 of 4: kept 0, 1, 2 and 3 times.
    selection = selection_of(np.array([0, 1, 2, 3]), chance_of([0.5] * 3))
    assert selection["choices"] == 3
    assert selection["histogram"] == [1, 1, 1, 1]
    assert selection["chance"] == pytest.approx([4 * 1 / 8, 4 * 3 / 8, 4 * 3 / 8, 4 * 1 / 8])
    assert (selection["always"], selection["sometimes"], selection["never"]) == (0.25, 0.5, 0.25)
    assert selection["chance_shares"] == pytest.approx(
        {"always": 1 / 8, "sometimes": 6 / 8, "never": 1 / 8}
    )


@pytest.mark.parametrize(
    ("n", "kept", "choices"), [(10, 3, 5), (100, 70, 12), (7, 7, 3), (1000, 1, 40)]
)
def test_chance_is_the_binomial_where_choices_are_alike(n, kept, choices):
    p = kept / n
    expected = [
        n * math.comb(choices, k) * p**k * (1 - p) ** (choices - k) for k in range(choices + 1)
    ]
    selection = selection_of(np.zeros(n, dtype=np.int32), chance_of([kept / n] * choices))
    assert selection["chance"] == pytest.approx(expected)
    assert selection["chance_shares"]["always"] == pytest.approx(p**choices)
    assert selection["chance_shares"]["never"] == pytest.approx((1 - p) ** choices)


@given(n=st.integers(1, 9), data=st.data())
def test_chance_is_poisson_binomial_where_they_differ(n, data):
    sizes = data.draw(st.lists(st.integers(1, n), max_size=6))
    expected = [0.0] * (len(sizes) + 1)
    for outcome in itertools.product(
        (0, 1), repeat=len(sizes)
    ):  # every way in which a sample may be kept and not
        expected[sum(outcome)] += n * math.prod(
            k / n if hit else 1 - k / n for hit, k in zip(outcome, sizes, strict=True)
        )
    selection = selection_of(np.zeros(n, dtype=np.int32), chance_of(size / n for size in sizes))
    assert selection["chance"] == pytest.approx(expected)
    assert sum(selection["chance"]) == pytest.approx(n)
    assert sum(selection["chance_shares"].values()) == pytest.approx(1)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_histogram_and_shares_are_counts(times):
    selection = selection_of(np.array(times), chance_of([1 / len(times)] * 5))
    assert selection["histogram"] == [times.count(k) for k in range(6)]
    assert selection["never"] == times.count(0) / len(times)
    assert selection["always"] == times.count(5) / len(times)
    assert selection["always"] + selection["sometimes"] + selection["never"] == pytest.approx(1)


def test_no_choice_at_all():
    selection = selection_of(np.zeros(4, dtype=np.int32), chance_of([]))
    assert selection["choices"] == 0
    assert selection["histogram"] == [4]
    assert selection["chance"] == [4.0]
    assert (selection["always"], selection["sometimes"], selection["never"]) == (
        1.0,
        0.0,
        0.0,
    )  # nothing was left out


def test_selection_is_of_json_values():
    selection = selection_of(np.array([0, 1, 1], dtype=np.int32), chance_of([2 / 3]))
    assert json.loads(json.dumps(selection)) == selection


# ---- JSON ----------------------------------------------------------------------------------------


def test_round_trip_by_dict():
    made = full()
    values = json.loads(json.dumps(made.to_dict()))
    assert values == made.to_dict()
    again = PruningReport.from_dict(values)
    assert again == made
    assert isinstance(again.epochs[0], EpochRecord)
    assert again.to_dict() == made.to_dict()


def test_reports_from_before_static_pruning_are_read():
    values = full().to_dict()
    del values["preparation"]
    assert PruningReport.from_dict(values).preparation == {}


def test_round_trip_by_file(tmp_path):
    made = full()
    made.save(tmp_path / "runs" / "one" / "report.json")
    text = (tmp_path / "runs" / "one" / "report.json").read_text()
    assert text.endswith("}\n")
    assert PruningReport.load(str(tmp_path / "runs" / "one" / "report.json")) == made


def test_dict_has_what_readers_look_for():
    values = full().to_dict()
    assert next(iter(values)) == "format_version"
    assert values["format_version"] == FORMAT_VERSION == 1
    assert values["cost_ratio"] == pytest.approx((100 / 3 + 2 * 100 / 3 + 30 / 3) / 200)
    assert values["passes"] == pytest.approx(110)
    assert values["metrics"] == {"eval_loss": 0.5}
    assert values["policy"] == {"name": "ucb", "keep_ratio": 0.5}
    assert values["totals"]["optimizer_steps"] == 9
    assert (values["num_samples"], values["seed"], values["data_seed"], values["num_epochs"]) == (
        100,
        0,
        1,
        2.0,
    )


def test_dict_is_a_copy():
    made = full()
    made.to_dict()["epochs"][0]["scores"]["mean"] = -1
    made.to_dict()["policy"]["name"] = "x"
    assert made == full()


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_formats_are_refused(version):
    with pytest.raises(ValueError, match=f"format_version {version!r}; expected 1"):
        PruningReport.from_dict({**full().to_dict(), "format_version": version})


def test_file_without_a_format_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="format_version None"):
        PruningReport.load(tmp_path / "x.json")


def test_committed_reports_are_read_and_written_as_they_are():
    files = sorted(RESULTS.rglob("report.json"))
    assert len(files) > 100
    for file in files[::10]:
        written = {"preparation": {}, **json.loads(file.read_text())}
        assert PruningReport.load(file).to_dict() == written, file


def no_constant(name):
    raise ValueError(f"{name} is not JSON")


def not_finite() -> PruningReport:
    metrics = {"eval_auc": math.nan, "eval_inf": math.inf, "eval_minus": -math.inf, "eval_f1": 0.5}
    scores = {"mean": math.inf, "q50": 1.0}
    epochs = [record(0, metrics=metrics, scores=scores, learning_rate=math.nan)]
    return report(num_epochs=1.0, epochs=epochs)


def test_numbers_that_json_does_not_have(tmp_path):
    made = not_finite()
    made.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    values = json.loads(text, parse_constant=no_constant)
    assert json.loads(json.dumps(made.to_dict()), parse_constant=no_constant) == values
    shown = {"eval_auc": "NaN", "eval_inf": "Infinity", "eval_minus": "-Infinity", "eval_f1": 0.5}
    assert values["metrics"] == values["epochs"][0]["metrics"] == shown
    again = PruningReport.load(tmp_path / "report.json")
    assert repr(again) == repr(made)
    assert again.to_dict() == made.to_dict()
    # Reports of earlier versions have them bare.
    (tmp_path / "report.json").write_text(re.sub(r'"(NaN|-?Infinity)"', r"\1", text))
    assert repr(PruningReport.load(tmp_path / "report.json")) == repr(made)


def test_metrics_that_are_numbers():
    metrics = {
        "int": 3,
        "flag": True,
        "numpy": np.float32(0.5),
        "numpy flag": np.bool_(False),
        "array": np.array(2),
        "tensor": torch.tensor(1.5),
        "bfloat16": torch.tensor(1.5, dtype=torch.bfloat16),
        7: 7,
        "nan": math.nan,
        "complex": 1j,
        "numpy complex": np.complex64(1),
        "text": "0.5",
        "list": [1],
        "tensors": torch.ones(1),
        "none": None,
        "digits": 10**400,
    }
    found = numbers_in(metrics)
    assert repr(found) == repr(
        {
            "int": 3.0,
            "flag": 1.0,
            "numpy": 0.5,
            "numpy flag": 0.0,
            "array": 2.0,
            "tensor": 1.5,
            "bfloat16": 1.5,
            "7": 7.0,
            "nan": math.nan,
        }
    )


def test_the_best_model_is_reported_apart(tmp_path):
    made = full()
    assert "best_model" not in made.to_dict()
    assert "best weights" not in made.summary()
    made.best_model = {"step": 1234, "metrics": {"test_accuracy": 0.75, "test_runtime": 1.0}}
    made.save(tmp_path / "report.json")
    assert PruningReport.load(tmp_path / "report.json") == made
    assert made.metrics == {"eval_loss": 0.5}
    assert made.summary()["best weights"] == "step 1,234: test_accuracy 75.00 %"


# ---- reports of others ---------------------------------------------------------------------------

WRONG = (None, True, "x", -1, 1.5, 10**30, 10**400, [], {}, [1], {"a": 1}, math.nan, math.inf)
MISSING = object()


def every_place(value, place=()):
    """The places of all fields, of lists the first item."""
    if place:
        yield place
    keys = (
        value
        if isinstance(value, dict)
        else range(len(value[:1]))
        if isinstance(value, list)
        else ()
    )
    for key in keys:
        yield from every_place(value[key], (*place, key))


def changed(values, place, value):
    values = copy.deepcopy(values)
    inside = values
    for key in place[:-1]:
        inside = inside[key]
    if value is MISSING:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    return values


def named(place):
    """How an error names a place, in one of two ways."""
    first, *others = map(str, place)
    dotted = first + "".join(f"[{o}]" if o.isdigit() else f".{o}" for o in others)
    return re.escape(dotted), re.escape(re.sub(r"\.([^.]*)$", r"['\1']", dotted))


def error_of(values):
    """Why the report is refused; None if it is read. Then nothing that reads it fails."""
    try:
        read = PruningReport.from_dict(values)
    except ValueError as error:
        return str(error)
    read.to_dict(), read.summary(), read.results, read.spent("passes"), read.spent("seconds")
    read.cost_ratio, differences([read, read])
    return None


def test_every_wrong_field_is_named(reliability):
    made = full()
    made.best_model = {"step": 1, "metrics": {"eval_loss": 0.5}}
    made.environment.update(hf_dynprune="1", ranks=1)
    values = made.to_dict()
    derived = ("cost_ratio", "passes", "totals", "metrics", "format_version")
    refused = accepted = 0
    for place in every_place(values):
        if place[0] in derived or place == ("policy", "keep_ratio"):
            continue
        for value in (*WRONG, MISSING):
            error = error_of(changed(values, place, value))
            if error is None:
                accepted += 1
                continue
            refused += 1
            # Lists whose length does not fit the number of choices are named as a whole.
            names = [*named(place), r"selection\.(histogram|chance) has"]
            assert any(re.search(name, error) for name in names), (place, value, error)
    assert refused > 700
    assert accepted < refused / 3
    reliability("foreign reports", refused + accepted)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("num_samples",), 0),
        (("epochs", 0, "seconds", "training"), math.nan),
        (("epochs", 0, "forward_passes"), 1.0),
        (("selection", "histogram"), [1, 2, 3, 4]),
        (("selection", "never"), 1.1),
        (("policy",), {}),
        (("policy", "name"), ""),
        (("resumed", 0, "stock_checkpoint"), "yes"),
        (("preparation", "passes"), "30"),
        (("environment", "versions", "torch"), 2),
    ],
)
def test_wrong_fields_are_refused(place, value, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(changed(full().to_dict(), place, value)))
    with pytest.raises(ValueError, match=place[-1]) as caught:
        PruningReport.load(path)
    assert str(path) in str(caught.value)


def test_each_field_of_a_report_is_checked():
    assert module._REPORT.keys() == PruningReport.__dataclass_fields__.keys()
    assert module._RECORD.keys() == EpochRecord.__dataclass_fields__.keys()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "\ufeff{}", "nan"])
def test_files_that_json_readers_fail_on(text, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        PruningReport.load(path)


def test_a_value_nested_too_deeply_to_be_copied(tmp_path):
    deep = []
    for _ in range(300):
        deep = [deep]
    for name in ("policy", "environment", "preparation"):
        values = full().to_dict()
        values[name]["more"] = deep
        with pytest.raises(ValueError, match=rf"{name}.* deep"):
            PruningReport.from_dict(values)


def test_fields_of_later_versions_are_left_out():
    values = full().to_dict()
    values["later"] = values["epochs"][0]["later"] = 1
    assert PruningReport.from_dict(values) == full()


def test_records_do_not_share_their_values():
    one, two = EpochRecord(0, False, 5), EpochRecord(1, False, 5)
    one.seconds["training"] += 1
    one.metrics["a"] = 1
    one.scores["a"] = 1
    assert two.seconds == dict.fromkeys(PHASES, 0.0)
    assert two.metrics == two.scores == {}
    a, b = report(), report()
    a.epochs.append(one)
    a.resumed.append({})
    assert b.epochs == b.resumed == []


def test_differences_beyond_the_seed():
    def report(seed, **policy):
        return PruningReport({"name": "ucb", "keep_ratio": 0.3, **policy}, 10, seed, seed)

    assert differences([report(0), report(1), report(2)]) == ""
    assert differences([report(0, scores="a.safetensors"), report(1, scores="b.safetensors")]) == ""
    assert differences([report(0), report(1, keep_ratio=0.5)]) == "keep_ratio: 0.3 and 0.5"
    assert differences([report(0), report(1, c=2.0)]) == "c: None and 2.0"


def test_runs_by_seed():
    def report(seed, **policy):
        return PruningReport({"name": "ucb", **policy}, 10, seed, seed)

    assert [run.seed for run in by_seed("x", [report(2), report(0), report(1)])] == [0, 1, 2]
    assert by_seed("x", report(3)) == [report(3)]
    assert by_seed("x", ()) == []
    with pytest.raises(ValueError, match=r"the run.*c: None and 2\.0"):
        by_seed("the run", [report(0), report(1, c=2.0)])


def test_environment():
    import platform

    import torch

    import hf_dynprune

    environment = describe_environment(ranks=2)
    assert environment["hf_dynprune"] == hf_dynprune.__version__
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["versions"]["python"] == platform.python_version()
    assert environment["versions"]["numpy"] == np.__version__
    assert environment["ranks"] == 2
    assert environment["device"]
    assert json.loads(json.dumps(environment)) == environment
