"""The pictures show the numbers of reports and tables. No window opens, no global state changes."""

import io
import re
import subprocess
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_dynprune import UCB, FullData, PruningReport, RandomPruning
from hf_dynprune.escape import printable
from hf_dynprune.plots import (
    plot_classes,
    plot_potential,
    plot_runs,
    plot_samples,
    plot_scores,
    plot_selection,
    save_picture,
)
from hf_dynprune.report import EpochRecord, chance_of, selection_of

pytest.importorskip("matplotlib")

N = 100


def with_shares(run, *shares):
    for record, share in zip(run.epochs, shares, strict=True):
        record.effective_share = share
    return run


def test_potential_of_runs_and_their_seeds():
    full = with_shares(a_run(FullData(), N, [0.5, 0.8, 0.9]), None, 0.8, 0.4)
    seeds = [
        with_shares(a_run(UCB(keep_ratio=0.6), 60, [0.4, 0.5], seed=seed), 0.5, last)
        for seed, last in ((0, 0.2), (1, 0.4))
    ]
    (ax,) = drawn(plot_potential({"full run": full, "UCB": seeds})).axes
    lines = list(lines_of(ax).values())
    assert lines[0].get_xdata().tolist() == [2, 3]
    assert lines[0].get_ydata() == pytest.approx([80, 40])
    assert lines[1].get_ydata() == pytest.approx([50, 30])
    shown = [text.get_text() for text in ax.get_legend().get_texts()]
    assert shown == ["full run: 1.88", "UCB: 2.88"]  # (1.25 + 2.5) / 2; (2 + 5 + 2 + 2.5) / 4


def test_potential_needs_a_share():
    with pytest.raises(ValueError, match="'old run'"):
        plot_potential({"old run": a_run(FullData(), N, [0.5])})


def a_run(policy, kept, accuracies, metric="eval_accuracy", seed=0):
    """A run with one epoch per accuracy (None: no evaluation) and `kept` samples in each.

    An epoch takes 2 s, 0.5 s of them for choosing. Evaluation takes 100 s more.
    """
    seconds = {"training": 1.5, "choosing": 0.5, "scoring": 0.0, "evaluation": 100.0}
    epochs = [
        EpochRecord(
            i,
            False,
            kept,
            kept,
            kept,
            0,
            1,
            seconds=dict(seconds),
            metrics={} if value is None else {metric: value},
        )
        for i, value in enumerate(accuracies)
    ]
    choices = len(epochs)
    times = (
        np.full(N, choices)
        if kept == N
        else np.random.default_rng(seed).integers(0, choices + 1, N)
    )
    selection = selection_of(times, chance_of([kept / N] * choices))
    return PruningReport(policy.to_dict(), N, seed, seed, choices, epochs, selection)


@pytest.fixture
def runs():
    return {
        "full run": a_run(FullData(), N, [0.5, 0.8, 0.9, 0.95]),
        "short run": a_run(FullData(), N, [0.6, 0.9, 0.91]),
        "UCB": a_run(UCB(keep_ratio=0.6), 60, [0.4, None, 0.85, 0.9, 0.912]),
    }


def drawn(figure):
    """The figure, laid out as when it is saved."""
    figure.savefig(io.BytesIO(), format="png")
    return figure


def lines_of(ax):
    return {line.get_label(): line for line in ax.lines}


def entries(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


# ---- runs ----------------------------------------------------------------------------------------


def test_metric_stands_against_passes_and_seconds(runs):
    figure = drawn(plot_runs(runs))
    passes, seconds = figure.axes
    assert list(lines_of(passes)) == list(lines_of(seconds)) == list(runs)
    # The epoch without evaluation cost passes, and seconds; evaluation is not among the seconds.
    np.testing.assert_allclose(lines_of(passes)["UCB"].get_xdata(), [0.6, 1.8, 2.4, 3.0])
    np.testing.assert_allclose(lines_of(seconds)["UCB"].get_xdata(), [2, 6, 8, 10])
    for ax in figure.axes:
        np.testing.assert_allclose(lines_of(ax)["UCB"].get_ydata(), [40, 85, 90, 91.2])
        assert len({(line.get_color(), line.get_marker()) for line in ax.lines}) == 3
    np.testing.assert_allclose(lines_of(passes)["full run"].get_xdata(), [1, 2, 3, 4])
    assert passes.get_ylabel() == "eval accuracy (%)"
    assert passes.get_xlabel().startswith("passes")
    assert seconds.get_xlabel().startswith("seconds")


def test_one_axis(runs):
    figure = plot_runs(runs, against="seconds")
    assert [ax.get_xlabel()[:7] for ax in figure.axes] == ["seconds"]
    for wrong in ("steps", [], ["passes", "steps"]):
        with pytest.raises(ValueError, match=f"against={re.escape(repr(wrong))}"):
            plot_runs(runs, against=wrong)


def test_scoring_passes_are_a_third(runs):
    for record in runs["UCB"].epochs:
        record.scoring_passes = 30
    line = plot_runs({"UCB": runs["UCB"]}).axes[0].lines[0]
    np.testing.assert_allclose(line.get_xdata()[-1], 5 * (60 + 10) / N)


@pytest.mark.parametrize("charged", [True, False])
def test_preparation_counts_where_it_is_charged(runs, charged):
    run = runs["UCB"]
    run.preparation = {"passes": 150.0, "seconds": 7.0, "charged": charged}
    passes, seconds = plot_runs({"UCB": run}).axes
    np.testing.assert_allclose(passes.lines[0].get_xdata()[0], 1.5 * charged + 0.6)
    np.testing.assert_allclose(seconds.lines[0].get_xdata()[0], 7 * charged + 2)


def test_the_legend_has_the_last_values_in_their_order(runs):
    found = entries(plot_runs(runs))
    assert found[:3] == ["full run: 95.00 %", "UCB: 91.20 %", "short run: 91.00 %"]


def test_values_beyond_the_axis_have_a_mark_at_its_end(runs):
    to_rgba = pytest.importorskip("matplotlib.colors").to_rgba
    figure = drawn(plot_runs(runs))
    for ax in figure.axes:
        low, high = ax.get_ylim()
        hidden = set()
        for line in lines_of(ax).values():
            for x, y in zip(*line.get_data(), strict=True):
                if not low <= y <= high:
                    hidden.add((round(x, 9), low, to_rgba(line.get_color())))
        assert len(hidden) == 5  # 50, 80, 60, 40 and 85 %
        marks = {
            (round(x, 9), y, tuple(mark.get_edgecolors()[0]))
            for mark in ax.collections
            for x, y in mark.get_offsets().tolist()
        }
        assert marks == hidden
        assert not any(mark.get_clip_on() for mark in ax.collections)
    assert len(entries(figure)) == 4
    falling = a_run(FullData(), N, [2.0, 0.5, 0.4, 0.3], "eval_loss")
    (ax,) = drawn(plot_runs({"run": falling}, "eval_loss", against="passes")).axes
    top = ax.get_ylim()[1]
    assert [mark.get_offsets().tolist() for mark in ax.collections] == [[[1, top], [2, top]]]
    within = plot_runs({"run": a_run(FullData(), N, [0.8, 0.8])})
    assert len(entries(within)) == 1


def test_twenty_runs_are_told_apart():
    runs = {f"run {i}": a_run(FullData(), N, [0.5 + i / 100]) for i in range(20)}
    figure = drawn(plot_runs(runs))
    assert len({(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}) == 20
    box = figure.legends[0].get_window_extent()
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.x0 > figure.axes[-1].get_window_extent().x1


def test_seeds_are_a_mean_and_a_band():
    seeds = [
        a_run(UCB(keep_ratio=0.5), 50, values, seed=s)
        for s, values in enumerate([[0.2, 0.5], [0.4, 0.9]])
    ]
    seeds[1].epochs[0].seconds["training"] += 1
    figure = plot_runs({"UCB": seeds})
    for ax, x in zip(figure.axes, ([0.5, 1.0], [2.5, 4.5]), strict=True):
        np.testing.assert_allclose(ax.lines[0].get_xdata(), x)
        np.testing.assert_allclose(ax.lines[0].get_ydata(), [30, 70])
        (band,) = (made for made in ax.collections if "Poly" in type(made).__name__)
        corners = {(round(a, 6), round(b, 6)) for a, b in band.get_paths()[0].vertices.tolist()}
        assert corners == {(x[0], 20.0), (x[0], 40.0), (x[1], 50.0), (x[1], 90.0)}
    assert entries(figure)[0] == "UCB: 70.00 % (50.00 to 90.00)"
    alone = plot_runs({"UCB": seeds[0]})
    titles = [made.legends[0].get_title().get_text() for made in (figure, alone)]
    assert titles[0] != titles[1]  # with seeds it says what the three numbers are


def test_only_seeds_share_a_name(runs):
    for other in (
        a_run(UCB(keep_ratio=0.5), 60, [0.5] * 5),
        a_run(UCB(keep_ratio=0.6), 60, [0.5] * 4),
        a_run(RandomPruning(keep_ratio=0.6), 60, [0.5] * 5),
    ):
        for plot in (plot_runs, plot_selection):
            with pytest.raises(ValueError, match="'UCB'"):
                plot({"UCB": [runs["UCB"], other]})
    with pytest.raises(ValueError, match="'none'"):
        plot_runs({"none": []})


@pytest.mark.parametrize(
    "values", [[2.0, 1.0, 0.5], [0.0], [1.0, 1.0], [-3.0, -2.0], [float("nan"), 3.0]]
)
def test_other_metrics_are_drawn_as_they_are(values):
    figure = plot_runs({"run": a_run(FullData(), N, values, "eval_loss")}, "eval_loss")
    assert figure.axes[0].get_ylabel() == "eval loss"
    assert entries(figure)[0] == f"run: {values[-1]:.4g}"
    bottom, top = figure.axes[0].get_ylim()
    assert bottom <= values[-1] < top


def test_errors_have_the_wrong_value(runs, monkeypatch):
    with pytest.raises(ValueError, match=r"'eval_f1'.*eval_accuracy"):
        plot_runs(runs, "eval_f1")
    with pytest.raises(ValueError, match="reports is empty"):
        plot_runs({})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[recipes\]'"):
        plot_runs(runs)


NAMES = [
    "_name",
    "__",
    "$\\foo$",
    "$x$ and $",
    "\ud800",
    "\x1b[31m",
    "a\nb",
    "<b>&",
    "x" * 3000,
    "",
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_are_shown_as_they_are(name, reliability, tmp_path):
    reliability("foreign texts")
    run = a_run(UCB(keep_ratio=0.6), 60, [0.4, 0.5], metric=f"eval_{name}")
    scores = dict.fromkeys(("q05", "q25", "q50", "q75", "q95", "mean"), 1.0)
    run.epochs[1].scores = scores
    run.policy["name"] = name
    shown = printable(name)[:50]
    runs = plot_runs({name: run}, f"eval_{name}")
    assert shown in entries(runs)[0].replace(r"\$", "$")
    figures = {
        "runs": runs,
        "selection": plot_selection({name: run}),
        "scores": plot_scores(run),
        "classes": plot_classes(np.array([1, 2]), 2, np.array([0, 1]), [name, "b"]),
    }
    for kind, figure in figures.items():
        for suffix in ("png", "svg", "pdf"):
            save_picture(figure, tmp_path / f"{kind}.{suffix}")
        if name.startswith("<"):
            assert "<b>" not in (tmp_path / f"{kind}.svg").read_text()
    assert len(list(tmp_path.iterdir())) == 12


def test_scores_of_a_report_that_lacks_some(runs):
    runs["UCB"].epochs[1].scores = {"mean": 1.5, "q50": 1.0}
    with pytest.raises(ValueError, match="'q05'"):
        plot_scores(runs["UCB"])


def test_no_matplotlib_until_used_and_no_pyplot_at_all():
    code = """
import sys
import hf_dynprune.plots
assert "matplotlib" not in sys.modules
from hf_dynprune import FullData, PruningReport
from hf_dynprune.report import EpochRecord
record = EpochRecord(0, False, 1, 1, 1, metrics={"eval_accuracy": 0.5})
report = PruningReport(FullData().to_dict(), 1, 0, 0, 1, [record])
hf_dynprune.plots.plot_runs({"run": report})
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- selection and scores ------------------------------------------------------------------------


def test_selection_beside_chance(runs):
    runs["random"] = a_run(RandomPruning(keep_ratio=0.3), 30, [0.5] * 3)
    figure = drawn(plot_selection(runs))
    assert [ax.get_title() for ax in figure.axes] == ["UCB", "random"]  # the others keep everything
    for ax in figure.axes:
        shown = {patch.get_label(): patch.get_data().values for patch in ax.patches}
        selection = runs[ax.get_title()].selection
        np.testing.assert_allclose(shown["this run"], 100 * np.array(selection["histogram"]) / N)
        np.testing.assert_allclose(shown["by chance"], 100 * np.array(selection["chance"]) / N)
    assert entries(figure) == ["this run", "by chance"]


def test_selection_of_seeds_is_their_mean():
    seeds = [a_run(UCB(keep_ratio=0.5), 50, [0.5] * 4, seed=s) for s in range(3)]
    (ax,) = plot_selection({"UCB": seeds}).axes
    expected = sum(np.array(seed.selection["histogram"]) for seed in seeds) / 3
    assert len({tuple(seed.selection["histogram"]) for seed in seeds}) == 3
    np.testing.assert_allclose(ax.patches[0].get_data().values, 100 * expected / N)


def test_without_choices_there_is_no_selection(runs):
    with pytest.raises(ValueError, match="full run, short run"):
        plot_selection({name: runs[name] for name in ("full run", "short run")})


def test_scores_over_epochs(runs):
    run = runs["UCB"]
    names = ("q05", "q25", "q50", "q75", "q95", "mean")
    for epoch in (1, 3):  # none at the first choice, nor in a full-data epoch
        run.epochs[epoch].scores = {name: epoch + i for i, name in enumerate(names)}
    (ax,) = drawn(plot_scores(run)).axes
    lines = lines_of(ax)
    np.testing.assert_allclose(lines["median"].get_xdata(), [1, 3])
    np.testing.assert_allclose(lines["median"].get_ydata(), [3, 5])
    np.testing.assert_allclose(lines["mean"].get_ydata(), [6, 8])
    wide, narrow = (band.get_paths()[0].get_extents() for band in ax.collections)
    assert (wide.y0, wide.y1, narrow.y0, narrow.y1) == (1, 7, 2, 6)
    assert ax.get_ylabel().endswith("ucb")
    with pytest.raises(ValueError, match="'full'"):
        plot_scores(runs["full run"])


# ---- samples -------------------------------------------------------------------------------------


def test_classes_in_order_of_their_kept_share():
    times, labels = (
        np.array([4, 2, 1, 1, 0, 3]),
        np.array([2, 2, 0, 0, 0, 5]),
    )  # of classes 1, 3, 4 there is no sample
    (ax,) = drawn(
        plot_classes(times, 4, labels, ["cat", "b", "dog", "d", "e", "owl, the bird"])
    ).axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["cat", "dog", "owl"]
    shown = sorted(
        point
        for line in ax.lines[:2]
        for point in zip(line.get_ydata(), line.get_xdata(), strict=True)
    )
    np.testing.assert_allclose(shown, [(0, 100 * 2 / 12), (1, 75), (2, 75)])
    assert ax.lines[2].get_label() == "all samples: 45.8 %"  # 11 / (6 * 4)
    assert ax.lines[2].get_xdata()[0] == pytest.approx(100 * 11 / 24)


def test_classes_beside_what_chance_would_give():
    times = np.array([4, 2, 1, 1, 0, 3])
    (ax,) = drawn(plot_classes(times, 4, np.array([0, 0, 1, 1, 1, 2]))).axes
    assert ax.get_xlim()[0] == 0
    p = 11 / 24
    half = [1.96 * (p * (1 - p) * (6 - n) / (5 * n * 4)) ** 0.5 for n in (3, 2, 1)]
    bars = sorted(ax.patches, key=lambda bar: bar.get_y())  # classes 1, 0, 2
    assert [bar.get_x() for bar in bars] == pytest.approx([100 * (p - h) for h in half])
    assert [bar.get_width() for bar in bars] == pytest.approx([200 * h for h in half])


def test_the_band_of_chance_holds_for_random_choices():
    generator, labels = np.random.default_rng(0), np.arange(2000) % 40
    times = np.zeros(2000, dtype=int)
    for _ in range(5):
        times[generator.choice(2000, 600, replace=False)] += 1
    (ax,) = plot_classes(times, 5, labels).axes
    half = ax.patches[0].get_width() / 2
    beyond = [abs(np.mean(times[labels == c]) / 5 - 0.3) * 100 > half for c in range(40)]
    assert 0 < sum(beyond) <= 5  # 2 are expected


@pytest.mark.parametrize("classes", [100, 1000])
def test_of_many_classes_the_ends_are_named(classes):
    labels = np.repeat(np.arange(classes), 5)
    times = np.repeat(np.random.default_rng(0).permutation(classes), 5)
    figure = drawn(plot_classes(times, classes, labels))
    (ax,) = figure.axes
    named = ax.texts[0].get_text().splitlines()
    most = int(labels[times.argmax()])
    assert named[1] == f"{most}  {100 * (classes - 1) / classes:.1f} %"
    assert len(named) == 27
    box = ax.texts[0].get_window_extent()
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    ("times", "choices", "labels", "names", "message"),
    [
        ([1, 2], 2, [0], None, r"\b2 samples.*\b1 labels"),
        ([1, 3], 2, [0, 1], None, "1 to 3, with 2 choices"),
        ([0, 0], 0, [0, 1], None, "with 0 choices"),
        ([0.5, 1], 1, [0, 1], None, "float64"),
        ([0, 1], 1, [0, -1], None, "such as .0, -1"),
        ([0, 1], 1, [0, None], None, "such as .0, None"),
        ([0, 1], 1, [0, 2], ["a", "b"], "2 names.*label 2"),
    ],
)
def test_what_is_no_share_of_a_class(times, choices, labels, names, message):
    with pytest.raises(ValueError, match=message):
        plot_classes(np.array(times), choices, np.array(labels), names)


def pictures(n):
    """A data set of n images, of which image i is grey with value i, in classes i % 3."""
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "owl"])}
    )
    images = [Image.new("RGB", (6, 4), (i, i, i)) for i in range(n)]
    return datasets.Dataset.from_dict({"img": images, "label": [i % 3 for i in range(n)]}, features)


def sheet(figure):
    """The rows of a contact sheet: title, and (caption, value of the image) of each."""
    rows = {}
    for ax in figure.axes:
        if ax.get_ylabel():
            shown = rows[ax.get_ylabel()] = []
        if ax.images:
            shown.append((ax.get_title(), int(np.asarray(ax.images[0].get_array()).flat[0])))
    return rows


def test_contact_sheet():
    times = np.array([5] * 4 + [0] * 10 + [1, 2, 3, 4] * 4)  # 30 samples
    rows = sheet(drawn(plot_samples(times, 5, pictures(30), columns=6)))
    assert list(rows) == [
        "always kept\n(13.3 %)",
        "sometimes kept\n(53.3 %)",
        "never kept\n(33.3 %)",
    ]
    assert [len(shown) for shown in rows.values()] == [4, 6, 6]
    for shown, counts in zip(rows.values(), ({5}, {1, 2, 3, 4}, {0}), strict=True):
        for caption, value in shown:  # an image is that of its index
            assert caption == f"{['cat', 'dog', 'owl'][value % 3]}\n#{value}: {times[value]} of 5"
            assert times[value] in counts
    between = [times[value] for _, value in rows["sometimes kept\n(53.3 %)"]]
    assert between == sorted(between, reverse=True)
    assert set(between) == {1, 2, 3, 4}


def test_where_none_is_always_or_never_kept():
    times = np.array([1, 2, 3, 2, 1, 2])
    rows = sheet(plot_samples(times, 5, pictures(6), columns=2))
    assert list(rows) == [
        "most often kept\n(none always)",
        "sometimes kept\n(100.0 %)",
        "least often kept\n(none never)",
    ]
    most, _, least = rows.values()
    assert most[0][1] == 2
    assert {value for _, value in least} == {0, 4}
    static = sheet(plot_samples(np.array([1, 0, 0, 0, 0, 0]), 1, pictures(6), columns=2))
    assert [len(shown) for shown in static.values()] == [1, 2]  # no sample between always and never


def test_contact_sheet_of_an_image_cache():
    pytest.importorskip("timm")
    from hf_dynprune.vision import ImageCache

    data = pictures(12).map(lambda row: row)
    for channels in (3, 1):
        cache = ImageCache.from_dataset(
            data, mean=[0.5] * channels, std=[0.5] * channels, channels=channels
        )
        times = np.arange(12) % 4
        assert sheet(drawn(plot_samples(times, 3, cache))) == sheet(plot_samples(times, 3, data))


def test_a_transform_of_the_dataset_is_ignored_and_large_images_are_scaled_down():
    image = Image.new("L", (800, 400), 7)
    features = datasets.Features({"photo": datasets.Image(), "grade": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"photo": [image] * 2, "grade": [0, 1]}, features)
    data = data.with_transform(lambda batch: {"nothing": [0] * len(batch["grade"])})
    figure = plot_samples(np.array([0, 1]), 1, data, label_column="grade")
    assert [ax.images[0].get_array().shape for ax in figure.axes if ax.images] == [(80, 160, 3)] * 2


def test_what_is_no_data_for_a_contact_sheet():
    times = np.array([0, 1, 1])
    with pytest.raises(ValueError, match=r"\b3 samples.*\b4 in the dataset"):
        plot_samples(times, 1, pictures(4))
    with pytest.raises(ValueError, match="0 image columns"):
        plot_samples(times, 1, pictures(3).remove_columns("img"))
    with pytest.raises(ValueError, match="'class'"):
        plot_samples(times, 1, pictures(3), label_column="class")
    with pytest.raises(TypeError, match="list"):
        plot_samples(times, 1, [0, 1, 2])
