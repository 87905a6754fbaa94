"""The tables of the studies in the README and on the page of the results, from what recipes/compare.py wrote.

    python tests/studies.py    # renders recipes/results/studies/*/ into README.md and recipes/results/README.md

Between the markers `<!-- study NAME table_0.3 -->` stands table_0.3.md of a study, and so on; between `<!-- overview -->`
what the rules gave in all of them, between `<!-- claims -->` what became of the claims of the central paper. No figure is
written by hand; test_docs.py compares, and makes each summary anew from the reports.
"""

import json
import re
import statistics

from reliability import README, ROOT, put_into

RESULTS = ROOT / "recipes" / "results" / "README.md"
STUDIES = ROOT / "recipes" / "results" / "studies"
PAGES = (README, RESULTS)
# In the order of the overview.
TITLES = {"cifar10_resnet8": "CIFAR-10, ResNet-8, 20 epochs"}
SHOWN = {"random": "random", "epsilon-greedy": "ε-greedy", "ucb": "UCB", "loss-proportional": "loss-proportional"}


def summary(name):
    return json.loads((STUDIES / name / "summary.json").read_text())


def costs(name):
    return sorted({row["wanted"] for row in summary(name)["rows"]} - {1.0}, reverse=True)


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
        for cost in costs(name):
            rows = rows_at(name, cost)
            reached = [f"{100 * rows[run]['mean']:.2f}" for run in ("full run", "short run")]
            cells = [*reached, *(difference(rows.get(rule)) for rule in SHOWN), str(rows["short run"]["seeds"])]
            lines.append(f"| {title} | {cost:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- the claims of the central paper --------------------------------------------------------------------------------

REPRODUCED, IN_PART, NOT = "reproduced", "in part", "not reproduced"
RULES = {"epsilon-greedy": "ε-greedy", "ucb": "UCB"}  # of the paper
SCORES = {"el2n": "EL2N", "grand": "GraNd", "forgetting": "forgetting"}


def points(found):
    """A paired difference with its interval, in points."""
    low, high = found["interval"]
    return f"{100 * found['mean']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def by_scores(rows, words):
    """Static pruning with its scores charged, or given: (name of the method, row)."""
    return [(SCORES[name.split()[0]], row) for name, row in rows.items() if name.endswith(f", scores {words}")]


def verdict(*held):
    if not held:
        return "not measured"
    return REPRODUCED if all(held) else IN_PART if any(held) else NOT


def static_scores_cost_more(name):
    words, held = [], []
    for cost in costs(name):
        rows = rows_at(name, cost)
        if found := by_scores(rows, "charged"):
            shown = [f"{method} {points(row['to_short_run'])} at a cost of {row['cost']:.2f}" for method, row in found]
            words.append(f"difference to the short run of cost {cost:g}, with the scores counted: {', '.join(shown)}")
            held += [row["to_short_run"]["interval"][1] < 0 for _, row in found]
    return "; ".join(words), verdict(*held)


def random_beats_static_scores(name):
    words, held = [], []
    for cost in costs(name):
        if found := by_scores(rows_at(name, cost), "given"):
            shown = [f"{method} {points(row['to_random'])}" for method, row in found]
            words.append(f"difference to dynamic random at {cost:g} of the samples, scores given: {', '.join(shown)}")
            held += [row["to_random"]["interval"][1] < 0 for _, row in found]
    return "; ".join(words), verdict(*held)


def kept(name, rule, cost):
    """Shares of the samples that a rule kept in at most a tenth of the choices, in at least nine tenths, and neither always
    nor never: as it was, and by chance. Means over the seeds."""
    shares = []
    for path in (STUDIES / name).glob("*/run.json"):
        run = json.loads(path.read_text())
        if (run["name"], run["cost"], run["rate"]) == (rule, cost, None):
            report = json.loads((path.parent / "report.json").read_text())
            tenth, row = report["selection"]["choices"] // 10, []
            for kind in ("histogram", "chance"):
                times = [count / report["num_samples"] for count in report["selection"][kind]]
                row += [sum(times[: tenth + 1]), sum(times[-tenth - 1 :]), sum(times[1:-1])]
            shares.append(row)
    means = [statistics.mean(column) for column in zip(*shares, strict=True)]
    return means[:3], means[3:]


def most_are_sometimes(name):
    words, held = [], []
    for rule, shown in RULES.items():
        found, chance = (tuple(100 * share for share in shares) for shares in kept(name, rule, 0.3))
        kinds = ("in at most a tenth of its choices", "in at least nine tenths", "neither always nor never")
        of = [f"{a:.1f} % {kind} (by chance {b:.1f} %)" for kind, a, b in zip(kinds, found, chance, strict=True)]
        words.append(f"{shown} at 0.3 kept of the samples {', '.join(of)}")
        held += [found[2] > 50, found[2] > chance[2] + 1]  # most are; more than a coin would have it
    return "; ".join(words), verdict(*held)


def rules_beat_random(name):
    words, held = [], []
    for cost in costs(name):
        rows = rows_at(name, cost)
        found = [(shown, rows[rule]["to_random"]) for rule, shown in RULES.items() if rule in rows]
        words.append(f"at {cost:g} {', '.join(f'{shown} {points(difference)}' for shown, difference in found)}")
        held += [difference["interval"][0] > 0 for _, difference in found]
    return "difference to dynamic random " + "; ".join(words), verdict(*held)


def as_good_as_the_full_run(name):
    words, held = [], []
    for cost in costs(name):
        rows = rows_at(name, cost)
        best = max((rows[rule] for rule in RULES if rule in rows), key=lambda row: row["mean"])
        words.append(f"at {cost:g} {RULES[best['name']]} {points(best['to_full_run'])}")
        held.append(best["to_full_run"]["interval"][1] > 0)
    return "the better of the two rules against the full run: " + "; ".join(words), verdict(*held)


CLAIMS = {
    "Static scores cost more than they save": static_scores_cost_more,
    "At aggressive rates dynamic random pruning beats static scores": random_beats_static_scores,
    'Many samples matter for a part of the training only ("sometimes" samples)': most_are_sometimes,
    "ε-greedy and UCB beat dynamic random pruning": rules_beat_random,
    "Up to twice (first version), ten times (second) less training without significant loss": as_good_as_the_full_run,
}


def claims():
    """The claims in the abstracts of the central paper, what was measured, what became of them."""
    lines = ["| claim | measured here (points of accuracy; 95 %) | verdict |", "| --- | --- | --- |"]
    for words, judge in CLAIMS.items():
        found, judgement = judge("cifar10_resnet8")
        lines.append(f"| {words} | {found} | {judgement} |")
    lines.append("| The same on ImageNet | not on two CPU cores | not testable here |")
    return "\n".join(lines)


# ---- pages ----------------------------------------------------------------------------------------------------------


def rendered(text):
    for words in re.findall(r"<!-- (study [\w. ]+) -->", text):
        _, name, table = words.split()
        text = put_into(text, (STUDIES / name / f"{table}.md").read_text().strip(), words)
    for name, render in (("overview", overview), ("claims", claims)):
        text = put_into(text, render(), name) if f"<!-- {name} -->" in text else text
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
