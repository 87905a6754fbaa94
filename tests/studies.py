"""The tables of the studies in the README and on the page of the results, from what recipes/compare.py wrote.

    python tests/studies.py    # renders recipes/results/studies/*/ into README.md and recipes/results/README.md

Between the markers `<!-- study NAME table_0.3 -->` stands table_0.3.md of a study, and so on; between `<!-- overview -->`
what the rules gave in all of them. No figure is written by hand; test_docs.py compares, and makes each summary anew from the
reports.
"""

import json
import re

from reliability import README, ROOT, put_into

RESULTS = ROOT / "recipes" / "results" / "README.md"
STUDIES = ROOT / "recipes" / "results" / "studies"
PAGES = (README, RESULTS)
# In the order of the overview.
TITLES = {"cifar10_resnet8": "CIFAR-10, ResNet-8, 20 epochs"}
SHOWN = {"random": "random", "epsilon-greedy": "ε-greedy", "ucb": "UCB", "loss-proportional": "loss-proportional"}


def summary(name):
    return json.loads((STUDIES / name / "summary.json").read_text())


def rows_at(name, cost):
    """The rows of a study at a cost, and that of its full run, by their names."""
    return {row["name"]: row for row in summary(name)["rows"] if row["wanted"] == cost or row["name"] == "full run"}


def overview():
    """A row for each study and cost: what the full and the short run reached, and how far the rules were from the latter, in
    bold where the interval of 95 % leaves zero out."""

    def difference(row):
        if row is None:
            return ""
        found = row["to_short_run"]
        clear = found["interval"] is not None and found["interval"][0] * found["interval"][1] > 0
        return f"**{100 * found['mean']:+.2f}**" if clear else f"{100 * found['mean']:+.2f}"

    lines = [
        f"| data, model, full run | cost | full run (%) | short run (%) | {' | '.join(SHOWN.values())} | seeds |",
        f"| --- | ---: | ---: | ---: | {' | '.join(['---:'] * len(SHOWN))} | ---: |",
    ]
    for name, title in TITLES.items():
        for cost in sorted({row["wanted"] for row in summary(name)["rows"]} - {1.0}, reverse=True):
            rows = rows_at(name, cost)
            reached = [f"{100 * rows[run]['mean']:.2f}" for run in ("full run", "short run")]
            cells = [*reached, *(difference(rows.get(rule)) for rule in SHOWN), str(rows["short run"]["seeds"])]
            lines.append(f"| {title} | {cost:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rendered(text):
    for words in re.findall(r"<!-- (study [\w. ]+) -->", text):
        _, name, table = words.split()
        text = put_into(text, (STUDIES / name / f"{table}.md").read_text().strip(), words)
    return put_into(text, overview(), "overview") if "<!-- overview -->" in text else text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
