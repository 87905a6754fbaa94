"""The tables of the studies in the README and on the page of the results, from what recipes/compare.py wrote.

    python tests/studies.py    # renders recipes/results/studies/*/ into README.md and recipes/results/README.md

Between the markers `<!-- study NAME table_0.3 -->` stands table_0.3.md of a study, and so on; between `<!-- overview -->`
what the rules gave in all of them, between `<!-- claims -->` what became of the claims of the central paper, between
`<!-- settings -->` what each setting gave, between `<!-- noise -->` how the rules fared with wrong labels. No figure is
written by hand; test_docs.py compares, and makes each summary anew from the reports.
"""

import json
import re
import statistics

from reliability import README, ROOT, put_into

from hf_dynprune.report import in_percent

RESULTS = ROOT / "recipes" / "results" / "README.md"
STUDIES = ROOT / "recipes" / "results" / "studies"
PAGES = (README, RESULTS)
# In the order of the overview; those whose learning rates were tuned in the study itself.
TITLES = {
    "cifar10_resnet8": "CIFAR-10, ResNet-8, 20 epochs",
    "cifar10_16px": "CIFAR-10 at 16 pixels, ResNet-8, 20 epochs",
    "cifar10_long": "CIFAR-10 at 16 pixels, ResNet-8, 100 epochs",
    "cifar10_resnet20_16px": "CIFAR-10 at 16 pixels, ResNet-20, 20 epochs",
    "cifar100_16px": "CIFAR-100 at 16 pixels, ResNet-8, 20 epochs",
    "cifar10n_worse": "CIFAR-10N at 16 pixels (40 % of the labels wrong), ResNet-8, 20 epochs",
    "banking77_bert": "Banking77, BERT of two layers from scratch, 10 epochs",
    "shakespeare_llama": "Shakespeare, Llama of four layers from scratch, 5 epochs: perplexity, less is better",
}
TUNED = ("cifar10_resnet8", "cifar10_16px", "banking77_bert", "shakespeare_llama")
SETTINGS, NOISE = "cifar10_settings", "cifar10n_worse"
SHOWN = {
    "random": "random",
    "epsilon-greedy": "ε-greedy",
    "ucb": "UCB",
    "loss-proportional": "loss-proportional",
}


def summary(name):
    return json.loads((STUDIES / name / "summary.json").read_text())


def runs(name):
    """What run.json and report.json tell of each run of a study."""
    for path in (STUDIES / name).glob("*/report.json"):
        yield json.loads((path.parent / "run.json").read_text()), json.loads(path.read_text())


def costs(name):
    return sorted({row["wanted"] for row in summary(name)["rows"]} - {1.0}, reverse=True)


def rows_at(name, cost):
    """The rows of a study at a cost, and that of its full run, by their names."""
    return {
        row["name"]: row
        for row in summary(name)["rows"]
        if row["wanted"] == cost or row["name"] == "full run"
    }


def overview():
    """A row for each study and cost: what the full and the short run reached, and how far the rules were from the latter, in
    bold where the interval of 95 % leaves zero out. Accuracies are in per cent."""

    def difference(row, scale):
        if row is None:
            return ""
        found = row["to_short_run"]
        clear = found["interval"] is not None and found["interval"][0] * found["interval"][1] > 0
        return f"**{scale * found['mean']:+.2f}**" if clear else f"{scale * found['mean']:+.2f}"

    lines = [
        f"| data, model, full run | cost | full run | short run | {' | '.join(SHOWN.values())} | seeds |",
        f"| --- | ---: | ---: | ---: | {' | '.join(['---:'] * len(SHOWN))} | ---: |",
    ]
    for name, title in TITLES.items():
        found = summary(name)
        scale = 100 if in_percent(found["metric"], [row["mean"] for row in found["rows"]]) else 1
        for cost in costs(name):
            rows = rows_at(name, cost)
            reached = [f"{scale * rows[run]['mean']:.2f}" for run in ("full run", "short run")]
            cells = [
                *reached,
                *(difference(rows.get(rule), scale) for rule in SHOWN),
                str(rows["short run"]["seeds"]),
            ]
            lines.append(f"| {title} | {cost:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- the claims of the central paper -------------------------------------------------------------

REPRODUCED, IN_PART, NOT = "reproduced", "in part", "not reproduced"
CLAIMED = {
    "cifar10_resnet8": "32 pixels",
    "cifar10_16px": "16 pixels",
}  # the studies of three seeds and more
RULES = {"epsilon-greedy": "ε-greedy", "ucb": "UCB"}  # of the paper
SCORES = {"el2n": "EL2N", "grand": "GraNd", "forgetting": "forgetting"}


def points(found):
    """A paired difference with its interval, in points; of one seed there is none."""
    mean = f"{100 * found['mean']:+.1f}"
    if found["interval"] is None:
        return mean
    low, high = found["interval"]
    return f"{mean} ({100 * low:+.1f} to {100 * high:+.1f})"


def by_scores(rows, words):
    """Static pruning with its scores charged, or given: (name of the method, row)."""
    return [
        (SCORES[name.split()[0]], row)
        for name, row in rows.items()
        if name.endswith(f", scores {words}")
    ]


def verdict(held):
    if not held:
        return "not measured"
    return REPRODUCED if all(held) else IN_PART if any(held) else NOT


def static_scores_cost_more(name):
    words, held = [], []
    for cost in costs(name):
        rows = rows_at(name, cost)
        if found := by_scores(rows, "charged"):
            shown = [
                f"{method} {points(row['to_short_run'])} at a cost of {row['cost']:.2f}"
                for method, row in found
            ]
            words.append(
                f"difference to the short run of cost {cost:g}, with the scores counted: {', '.join(shown)}"
            )
            held += [row["to_short_run"]["interval"][1] < 0 for _, row in found]
    return "; ".join(words), held


def random_beats_static_scores(name):
    words, held = [], []
    for cost in costs(name):
        if found := by_scores(rows_at(name, cost), "given"):
            shown = [f"{method} {points(row['to_random'])}" for method, row in found]
            words.append(
                f"difference to dynamic random at {cost:g} of the samples, scores given: {', '.join(shown)}"
            )
            held += [row["to_random"]["interval"][1] < 0 for _, row in found]
    return "; ".join(words), held


def kept(name, rule, cost):
    """Shares of the samples that a rule kept in at most a tenth of the choices, in at least nine tenths, and neither always
    nor never: as it was, and by chance. Means over the seeds."""
    shares = []
    for run, report in runs(name):
        if (run["name"], run["cost"], run["rate"]) == (rule, cost, None):
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
        kinds = (
            "in at most a tenth of its choices",
            "in at least nine tenths",
            "neither always nor never",
        )
        of = [
            f"{a:.1f} % {kind} (by chance {b:.1f} %)"
            for kind, a, b in zip(kinds, found, chance, strict=True)
        ]
        words.append(f"{shown} at 0.3 kept of the samples {', '.join(of)}")
        held += [
            found[2] > 50,
            found[2] > chance[2] + 1,
        ]  # most are; more than a coin would have it
    return "; ".join(words), held


def rules_beat_random(name):
    words, held = [], []
    for cost in costs(name):
        rows = rows_at(name, cost)
        found = [(shown, rows[rule]["to_random"]) for rule, shown in RULES.items() if rule in rows]
        words.append(
            f"at {cost:g} {', '.join(f'{shown} {points(difference)}' for shown, difference in found)}"
        )
        held += [difference["interval"][0] > 0 for _, difference in found]
    return "difference to dynamic random " + "; ".join(words), held


def as_good_as_the_full_run(name):
    words, held = [], []
    for cost in costs(name):
        rows = rows_at(name, cost)
        best = max((rows[rule] for rule in RULES if rule in rows), key=lambda row: row["mean"])
        words.append(f"at {cost:g} {RULES[best['name']]} {points(best['to_full_run'])}")
        held.append(best["to_full_run"]["interval"][1] > 0)
    return "the better of the two rules against the full run: " + "; ".join(words), held


CLAIMS = {
    "Static scores cost more than they save": static_scores_cost_more,
    "At aggressive rates dynamic random pruning beats static scores": random_beats_static_scores,
    'Many samples matter for a part of the training only ("sometimes" samples)': most_are_sometimes,
    "ε-greedy and UCB beat dynamic random pruning": rules_beat_random,
    "Up to twice (first version), ten times (second) less training without significant loss": as_good_as_the_full_run,
}


def claims():
    """The claims in the abstracts of the central paper, what was measured, what became of them."""
    lines = [
        "| claim | measured here (points of accuracy; 95 %) | verdict |",
        "| --- | --- | --- |",
    ]
    for words, judge in CLAIMS.items():
        judged = [(size, *judge(name)) for name, size in CLAIMED.items()]
        found = "<br>".join(f"{size}: {measured}" for size, measured, held in judged if held)
        lines.append(
            f"| {words} | {found} | {verdict([each for *_, held in judged for each in held])} |"
        )
    lines.append("| The same on ImageNet | not on two CPU cores | not testable here |")
    return "\n".join(lines)


# ---- settings, one at a time; wrong labels -------------------------------------------------------

# What is varied, the rule as it is, the rows with other values; the values, that of the rule as it is between stars.
VARIED = (
    ("learning rate", "short run", "full (num_train_epochs 6, learning_rate {})", "0.8 *1.6*"),
    ("learning rate", "epsilon-greedy", "epsilon-greedy (learning_rate {})", "*0.8* 1.6"),
    ("learning rate", "loss-proportional", "loss-proportional (learning_rate {})", "0.8 *1.6*"),
    (
        "epochs, at the same cost",
        "epsilon-greedy",
        "epsilon-greedy (num_train_epochs {})",
        "12 *20* 60",
    ),
    (
        "epochs, at the same cost",
        "loss-proportional",
        "loss-proportional (num_train_epochs {})",
        "12 *20* 60",
    ),
    ("`alpha`", "loss-proportional", "loss-proportional (alpha {})", "0.5 *1.0* 2.0"),
    ("`epsilon`", "epsilon-greedy", "epsilon-greedy (epsilon {})", "0.0 *0.1* 0.3"),
    ("full-data epochs first", "loss-proportional", "loss-proportional (first {})", "*0* 2"),
    (
        "share of full-data epochs last",
        "loss-proportional",
        "loss-proportional (last {})",
        "*0.0* 0.1",
    ),
    ("`c`", "ucb", "ucb (c {})", "*1.0* 5.0"),
    ("`decay`", "ucb", "ucb (decay {})", "0.3 *0.8* 1.0"),
    ("`period`", "epsilon-greedy", "epsilon-greedy (period {})", "*1* 5"),
    (
        "`scoring`, `period` 5",
        "epsilon-greedy (period 5)",
        "epsilon-greedy (period 5, scoring {})",
        "*trained* dropped all",
    ),
    (
        "`scoring_mode`, of the dropped",
        "epsilon-greedy (period 5, scoring dropped)",
        "epsilon-greedy (period 5, scoring dropped, scoring_mode {})",
        "*train* eval",
    ),
    (
        "`scoring_mode`, of all",
        "epsilon-greedy (period 5, scoring all)",
        "epsilon-greedy (period 5, scoring all, scoring_mode {})",
        "*eval* train",
    ),
)


def settings():
    """What each setting gave: the value of the rule as it is in italics, the best in bold."""
    rows = rows_at(SETTINGS, 0.3)
    lines = ["| what is varied | rule | accuracy (%) at each value |", "| --- | --- | --- |"]
    for what, rule, pattern, values in VARIED:
        names = {value: rule if "*" in value else pattern.format(value) for value in values.split()}
        reached = {value: 100 * rows[name]["mean"] for value, name in names.items()}
        best = max(reached.values())
        cells = [
            f"{value}: **{mean:.1f}**" if mean == best else f"{value}: {mean:.1f}"
            for value, mean in reached.items()
        ]
        lines.append(
            f"| {what} | {SHOWN.get(rule.partition(' (')[0], rule)} | {', '.join(cells)} |"
        )
    return "\n".join(lines)


def relabelled():
    """Of each method that trained on labels some of which are wrong the share of these among all that its choices kept."""
    found = {}
    for run, report in runs(NOISE):
        found.setdefault(run["name"], []).append(report["metrics"]["train_relabelled_share"])
    return {name: statistics.mean(shares) for name, shares in found.items()}


def noise():
    """Of each method that trained on labels some of which are wrong: what it reached by the right ones, and how many of the
    wrong ones its choices kept."""
    trained = relabelled()
    lines = [
        "| method | accuracy (%) | to the short run | wrong labels among what it trained on (%) | seeds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows_at(NOISE, 0.3).items():
        difference = points(row["to_short_run"]) if row["to_short_run"] else ""
        cells = (
            name,
            f"{100 * row['mean']:.2f}",
            difference,
            f"{100 * trained[name]:.1f}",
            str(row["seeds"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- pages ---------------------------------------------------------------------------------------


def rendered(text):
    for words in re.findall(r"<!-- (study [\w. ]+) -->", text):
        _, name, table = words.split()
        text = put_into(text, (STUDIES / name / f"{table}.md").read_text().strip(), words)
    for name, render in (
        ("overview", overview),
        ("claims", claims),
        ("settings", settings),
        ("noise", noise),
    ):
        text = put_into(text, render(), name) if f"<!-- {name} -->" in text else text
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
