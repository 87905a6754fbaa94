"""The picture shows the report's numbers, keeps its labels apart, and draws without a window or global state."""

import io
import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_dynprune import UCB, FullData, PruningReport, RandomPruning
from hf_dynprune.plots import _spread, plot_runs
from hf_dynprune.report import EpochRecord, chance_of, selection_of

pytest.importorskip("matplotlib")

N = 100


def a_run(policy, kept, accuracies, metric="eval_accuracy"):
    """A run of as many epochs as accuracies (None: no evaluation), `kept` samples each."""
    epochs = [
        EpochRecord(i, False, kept, kept, kept, 0, 1, metrics={} if value is None else {metric: value})
        for i, value in enumerate(accuracies)
    ]
    choices = len(epochs)
    times = np.full(N, choices) if kept == N else np.random.default_rng(0).integers(0, choices + 1, N)
    return PruningReport(policy.to_dict(), N, 0, 0, choices, epochs, selection_of(times, chance_of([kept / N] * choices)))


@pytest.fixture
def runs():
    return {
        "full run": a_run(FullData(), N, [0.5, 0.8, 0.9, 0.95]),
        "short run": a_run(FullData(), N, [0.6, 0.9, 0.91]),
        "UCB": a_run(UCB(keep_ratio=0.6), 60, [0.4, None, 0.85, 0.9, 0.912]),
    }


def test_metric_stands_against_cumulative_passes(runs):
    left, _ = plot_runs(runs).axes
    lines = {line.get_label(): line for line in left.lines}
    assert list(lines) == list(runs)
    np.testing.assert_allclose(lines["full run"].get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(lines["UCB"].get_xdata(), [0.6, 1.8, 2.4, 3.0])  # the epoch without evaluation cost passes
    np.testing.assert_allclose(lines["UCB"].get_ydata(), [40, 85, 90, 91.2])
    assert (left.get_xlabel(), left.get_ylabel()) == ("passes over the data (passes / N)", "eval accuracy (%)")
    assert len({(line.get_color(), line.get_marker()) for line in left.lines}) == 3
    assert [text.get_text() for text in left.get_legend().get_texts()] == list(runs)


def test_scoring_passes_are_a_third(runs):
    for record in runs["UCB"].epochs:
        record.scoring_passes = 30
    line = plot_runs({"UCB": runs["UCB"]}).axes[0].lines[0]
    np.testing.assert_allclose(line.get_xdata()[-1], runs["UCB"].passes / N)


def test_last_values_are_written_and_do_not_cover_each_other(runs):
    runs["random"] = a_run(RandomPruning(keep_ratio=0.6), 60, [0.4, 0.5, 0.85, 0.9, 0.911])
    figure = plot_runs(runs)
    figure.savefig(io.BytesIO(), format="png")  # only now the layout is made
    texts = figure.axes[0].texts
    assert sorted(text.get_text() for text in texts) == ["91.0 %", "91.1 %", "91.2 %", "95.0 %"]
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_selection_beside_chance(runs):
    figure = plot_runs(runs)
    right = figure.axes[1]
    selection = runs["UCB"].selection
    labelled = {patch.get_label(): patch.get_data().values for patch in right.patches}
    np.testing.assert_allclose(labelled["UCB"], selection["histogram"])
    np.testing.assert_allclose(labelled["by chance"], selection["chance"])
    assert "full run" not in labelled
    # Runs of equal budget share one line of chance, others have their own.
    right = plot_runs({**runs, "random": a_run(RandomPruning(keep_ratio=0.3), 30, [0.5] * 5)}).axes[1]
    assert {"UCB, by chance", "random, by chance"} <= {patch.get_label() for patch in right.patches}


def test_without_choices_there_is_one_panel(runs):
    assert len(plot_runs({"full run": runs["full run"]}).axes) == 1


@pytest.mark.parametrize("values", [[2.0, 1.0, 0.5], [0.0], [1.0, 1.0], [-3.0, -2.0], [float("nan"), 3.0]])
def test_other_metrics_are_drawn_as_they_are(values):
    figure = plot_runs({"run": a_run(FullData(), N, values, "eval_loss")}, "eval_loss")
    assert figure.axes[0].get_ylabel() == "eval loss"
    assert figure.axes[0].texts[0].get_text() == f"{values[-1]:.4g}"
    bottom, top = figure.axes[0].get_ylim()
    assert bottom <= values[-1] < top


def test_png(runs, tmp_path):
    plot_runs(runs).savefig(tmp_path / "runs.png")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_errors_say_what_is_wanted(runs, monkeypatch):
    with pytest.raises(ValueError, match=r"'eval_f1'.*eval_accuracy"):
        plot_runs(runs, "eval_f1")
    with pytest.raises(ValueError, match="empty"):
        plot_runs({})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install hf-dynprune\[recipes\]"):
        plot_runs(runs)


def test_no_matplotlib_until_used_and_no_pyplot_at_all():
    code = """
import sys
import hf_dynprune.plots
assert "matplotlib" not in sys.modules
from hf_dynprune import FullData, PruningReport
from hf_dynprune.report import EpochRecord
report = PruningReport(FullData().to_dict(), 1, 0, 0, 1, [EpochRecord(0, False, 1, 1, 1, metrics={"eval_accuracy": 0.5})])
hf_dynprune.plots.plot_runs({"run": report})
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@given(st.lists(st.floats(-1e3, 1e3), max_size=8), st.floats(0.1, 100))
def test_spread_keeps_order_gap_and_centre(places, gap):
    places = sorted(places)
    spread = _spread(places, gap)
    assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(spread))
    assert sum(spread) == pytest.approx(sum(places), abs=1e-6)
    if all(b - a >= gap for a, b in itertools.pairwise(places)):
        assert spread == pytest.approx(places)
