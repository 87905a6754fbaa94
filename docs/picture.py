"""Draws docs/_static/how_it_works.svg: three runs as a scheme, and what they reached on CIFAR-10.

    python docs/picture.py

The scheme is drawn by a fixed seed. The accuracies are those of recipes/results/studies.
"""

import json
import pathlib

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import PathPatch
from matplotlib.path import Path

FOLDER = pathlib.Path(__file__).parent
ROOT = FOLDER.parent
SUMMARY = ROOT / "recipes" / "results" / "studies" / "cifar10_resnet8" / "summary.json"
BLUE, GREY, BLACK, LIGHT = "#0072B2", "#767676", "#222222", "#e4e7eb"
EPOCHS, SAMPLES, KEPT = 20, 10, 3
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "hf_dynprune",  # the same file each time
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans", "sans-serif"],
    "font.size": 10,
}


def kept_by_a_rule():
    """(SAMPLES, EPOCHS) bool: KEPT samples an epoch, the first ones (the hard ones) more often."""
    generator = np.random.default_rng(4)
    weights = np.linspace(3.0, 0.5, SAMPLES)
    kept = np.zeros((SAMPLES, EPOCHS), dtype=bool)
    for epoch in range(EPOCHS):
        chosen = generator.choice(SAMPLES, KEPT, replace=False, p=weights / weights.sum())
        kept[chosen, epoch] = True
    return kept


def scheme(ax, kept, color, title, words):
    """One run: a square for each sample in each epoch, filled if it is trained."""
    for mask, shade in ((kept, color), (~kept, LIGHT)):
        corners = np.array([[0, 0], [0.78, 0], [0.78, 0.78], [0, 0.78]])
        places = np.argwhere(mask)[:, ::-1] * (1, -1)
        squares = Path.make_compound_path_from_polys(places[:, None] + corners)
        ax.add_patch(PathPatch(squares, color=shade, lw=0))
    ax.set_xlim(-0.3, EPOCHS + 0.1)
    ax.set_ylim(-SAMPLES + 0.6, 1.2)
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=color, pad=16)
    ax.text(0, 1.25, words, fontsize=9, color="#444444", va="bottom")
    ax.axis("off")


def main():
    rows = json.loads(SUMMARY.read_text())["rows"]
    found = {row["name"]: row for row in rows if row["wanted"] in (0.3, 1.0)}
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(9.2, 4.5), facecolor="white")
        grid = figure.add_gridspec(
            2, 3, height_ratios=(1.25, 1), hspace=0.5, wspace=0.12, left=0.02, right=0.98,
            top=0.87, bottom=0.12,
        )  # fmt: skip
        everything = np.ones((SAMPLES, EPOCHS), dtype=bool)
        short = everything & (np.arange(EPOCHS) < round(0.3 * EPOCHS))
        for column, (kept, *words) in enumerate(
            (
                (everything, GREY, "full run: cost 1", "all samples, 20 epochs"),
                (short, BLACK, "short run: cost 0.3", "all samples, 6 epochs"),
                (kept_by_a_rule(), BLUE, "pruned run: cost 0.3", "30 % of the samples, 20 epochs"),
            )
        ):
            scheme(figure.add_subplot(grid[0, column]), kept, *words)
        ax = figure.add_axes((0.27, 0.12, 0.68, 0.27))
        shown = (
            ("full run", "full run", GREY),
            ("loss-proportional", "pruned by loss-proportional", BLUE),
            ("random", "pruned at random", "#6ba8cf"),
            ("short run", "short run", BLACK),
        )
        for place, (name, words, color) in enumerate(shown):
            values = [100 * value for value in found[name]["values"].values()]
            ax.plot(values, [-place] * len(values), "o", color=color, alpha=0.45, ms=6, mew=0)
            ax.plot([np.mean(values)] * 2, [-place - 0.3, -place + 0.3], color=color, lw=3)
            ax.text(79.55, -place, words, ha="right", va="center", color=color, clip_on=False)
            ax.text(
                max(values) + 0.15, -place, f"{np.mean(values):.1f}", va="center", fontsize=9,
                color=color,
            )  # fmt: skip
        ax.set_xlim(79.7, 86.6)
        ax.set_ylim(-3.6, 0.6)
        ax.set_yticks([])
        ax.spines[["top", "left", "right"]].set_visible(False)
        ax.grid(axis="x", color=LIGHT)
        ax.set_xlabel("CIFAR-10, ResNet-8: test accuracy (%) of five seeds, and their mean")
        words = "columns: epochs; rows: samples; a filled square is trained"
        figure.text(0.025, 0.475, words, fontsize=9, color="#444444")
        figure.savefig(FOLDER / "_static" / "how_it_works.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
