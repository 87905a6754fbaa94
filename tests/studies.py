"""The tables that are made of several studies, from the files of recipes/results/studies.

    overview()   what the rules gave
    effective_shares()   what EffectiveShare gave
    claims()     what became of the claims of the central paper
    settings()   what each setting gave
    noise()      how the rules fared with wrong labels

fragments.py puts them into the pages. test_docs.py compares the summaries with the reports.
"""

import json
import sys
from statistics import mean

from reliability import ROOT

sys.path.insert(0, str(ROOT))
from recipes.studies.plan import FULL, SHORT
from recipes.studies.potential import saving_of
from recipes.studies.summarise import Metric, markdown

STUDIES = ROOT / "recipes" / "results" / "studies"
# In the order of the overview.
TITLES = {
    "cifar10_half": "CIFAR-10, ResNet-8, 20 epochs",
    "cifar10_resnet8": "CIFAR-10, ResNet-8, 20 epochs",
    "cifar10_batch": "CIFAR-10, ResNet-8, 20 epochs, the batch size tuned, too",
    "cifar10_16px": "CIFAR-10 at 16 pixels, ResNet-8, 20 epochs",
    "cifar10_long": "CIFAR-10 at 16 pixels, ResNet-8, 100 epochs",
    "cifar10_resnet20_16px": "CIFAR-10 at 16 pixels, ResNet-20, 20 epochs",
    "cifar100_16px": "CIFAR-100 at 16 pixels, ResNet-8, 20 epochs",
    "cifar10_long_tail": "CIFAR-10 at 16 pixels with a long tail (100:1), ResNet-8, 40 epochs: "
    "balanced accuracy",
    "cifar10_tail_10": "CIFAR-10 at 16 pixels with a tail of 10:1, ResNet-8, 16 epochs: balanced "
    "accuracy",
    "cifar100_long_tail": "CIFAR-100 at 16 pixels with a long tail (100:1), ResNet-8, 30 epochs: "
    "balanced accuracy",
    "cifar100_tail_10": "CIFAR-100 at 16 pixels with a tail of 10:1, ResNet-8, 16 epochs: balanced "
    "accuracy",
    "cifar10_tail_batch": "CIFAR-10 at 16 pixels with a long tail (100:1), ResNet-8, 40 epochs, "
    "the batch size tuned, too: balanced accuracy",
    "cifar10_copies": "10,000 images of CIFAR-10 at 16 pixels, each three times, ResNet-8, "
    "20 epochs",
    "cifar10_finetune": "10,000 images of CIFAR-10 at 16 pixels, ResNet-8 pretrained on CIFAR-100, "
    "10 epochs",
    "cifar10n_worse": "CIFAR-10N at 16 pixels (40 % of the labels wrong), ResNet-8, 20 epochs",
    "cifar10n_reference": "CIFAR-10N at 16 pixels (a tenth of the labels made right), ResNet-8, "
    "20 epochs",
    "cifar10n_memorised": "5,000 images of CIFAR-10N at 16 pixels (40 % of the labels wrong), "
    "ResNet-8, 60 epochs without augmentation",
    "tiny_imagenet_20": "20 classes of Tiny-ImageNet at 32 pixels, ResNet-8, 10 epochs",
    "banking77_bert": "Banking77, BERT of two layers from scratch, 10 epochs",
    "banking77_minilm": "Banking77, fine-tuning MiniLM-L6, 5 epochs",
    "differences_epochs": "Subtraction, fine-tuning a Llama of three layers that adds, 8 epochs: "
    "share of right answers",
    "shakespeare_llama": "Shakespeare, Llama of four layers from scratch, 5 epochs: perplexity, "
    "less is better",
    "gsm8k_target": "GSM8K among other text, Llama of two layers from scratch, 5 epochs: "
    "perplexity on GSM8K, less is better",
    "gsm8k_batch": "GSM8K among other text, Llama of two layers from scratch, 5 epochs, the batch "
    "size tuned, too: perplexity on GSM8K, less is better",
}
# Studies that tuned their own learning rates.
TUNED = (
    "cifar10_half",
    "cifar10_resnet8",
    "cifar10_batch",
    "cifar10_16px",
    "cifar10_long_tail",
    "cifar10_tail_10",
    "cifar100_long_tail",
    "cifar100_tail_10",
    "cifar10_tail_batch",
    "cifar10_copies",
    "cifar10_finetune",
    "cifar10n_reference",
    "cifar10n_memorised",
    "tiny_imagenet_20",
    "banking77_bert",
    "banking77_minilm",
    "differences_epochs",
    "shakespeare_llama",
    "gsm8k_target",
    "gsm8k_batch",
)
SETTINGS, NOISE = "cifar10_settings", "cifar10n_worse"
RULES = {"epsilon-greedy": "ε-greedy", "ucb": "UCB"}  # of the central paper
SHOWN = {"random": "random", **RULES, "loss-proportional": "loss-proportional"}


def summary(name):
    return json.loads((STUDIES / name / "summary.json").read_text())


def runs(name):
    """Yield run.json and report.json of each run of a study."""
    for path in (STUDIES / name).glob("*/report.json"):
        yield json.loads((path.parent / "run.json").read_text()), json.loads(path.read_text())


def reports(name, method, cost):
    """The reports of a method's runs that are compared: one for each seed, none of the tuning."""
    wanted = (method, cost, None)
    return [
        report for run, report in runs(name) if (run["name"], run["cost"], run["rate"]) == wanted
    ]


def costs(name):
    return sorted({row["wanted"] for row in summary(name)["rows"]} - {1.0}, reverse=True)


def rows_at(name, cost):
    """The rows of a study at a cost and the row of its full run, by name."""
    rows = summary(name)["rows"]
    return {row["name"]: row for row in rows if row["wanted"] == cost or row["name"] == FULL}


def is_clear(difference):
    """Whether the 95 % interval of a difference leaves out zero."""
    interval = difference["interval"]
    return interval is not None and interval[0] * interval[1] > 0


# ---- all studies ---------------------------------------------------------------------------------


def overview():
    """What full and short run reached, and the differences of the rules to the short run.

    A row for each study and cost. Clear differences are bold. Accuracies are in per cent.
    """
    rows = []
    for name, title in TITLES.items():
        scale = Metric.of(summary(name)).scale
        for cost in costs(name):
            at = rows_at(name, cost)
            cells = [title, f"{cost:g}", *(f"{scale * at[r]['mean']:.2f}" for r in (FULL, SHORT))]
            for rule in SHOWN:
                found = at[rule]["to_short_run"] if rule in at else None
                words = f"{scale * found['mean']:+.2f}" if found else ""
                cells.append(f"**{words}**" if found and is_clear(found) else words)
            rows.append([*cells, str(at[SHORT]["seeds"])])
    head = ["data, model, full run", "cost", FULL, SHORT, *SHOWN.values(), "seeds"]
    return markdown(head, rows)


def effective_shares():
    """EffectiveShare in each study that has it, and what a run on all data costs for its result."""
    rows = []
    for name in TITLES:
        for cost in costs(name):
            at = rows_at(name, cost)
            if own := at.get("effective-share"):
                plain = {cost: at[SHORT]["mean"], 1.0: at[FULL]["mean"]}
                same = cost * saving_of(cost, own["mean"], plain)
                reached = [f"{100 * value:.1f}" for value in (own["mean"], plain[1.0])]
                costly = [f"{each:.2f}" for each in (own["cost"], same)]
                rows.append([name, *reached, *costly, str(own["seeds"])])
    head = [
        "study",
        "EffectiveShare",
        FULL,
        "its cost",
        "cost of a run on all data with its result",
    ]
    return markdown([*head, "seeds"], rows)


IMBALANCE = {
    "cifar10_long_tail": "CIFAR-10, 100:1",
    "cifar10_tail_batch": "CIFAR-10, 100:1, best batch size",
    "cifar10_tail_10": "CIFAR-10, 10:1",
    "cifar100_long_tail": "CIFAR-100, 100:1",
    "cifar100_tail_10": "CIFAR-100, 10:1",
}


def imbalance():
    """ClassBudget beside its opponents in the studies of unequal classes: means in per cent.

    The last column is the difference of ClassBudget to the short run.
    """
    rows = []
    for name, words in IMBALANCE.items():
        for cost in costs(name):
            at = rows_at(name, cost)
            even = next(row for key, row in at.items() if key.startswith("full (balanced True"))
            floor = next(row for key, row in at.items() if "min_per_class" in key)
            own = at["class-budget"]
            cells = [at[FULL], at[SHORT], at["random"], floor, own, even]
            means = [f"{100 * row['mean']:.1f}" for row in cells]
            rows.append([words, f"{cost:g}", *means, points(own["to_short_run"])])
    head = ["data, tail", "cost", FULL, SHORT, "random", "loss-proportional with a floor"]
    return markdown([*head, "ClassBudget", "even classes", "ClassBudget to the short run"], rows)


# ---- the claims of the central paper -------------------------------------------------------------

CLAIMED = {"cifar10_resnet8": "32 pixels", "cifar10_16px": "16 pixels"}  # three seeds and more
SCORES = {"el2n": "EL2N", "grand": "GraNd", "forgetting": "forgetting"}


def points(found):
    """A paired difference in points, with its interval if there are several seeds."""
    words = f"{100 * found['mean']:+.1f}"
    if found["interval"] is None:
        return words
    low, high = found["interval"]
    return f"{words} ({100 * low:+.1f} to {100 * high:+.1f})"


def by_scores(rows, words):
    """Static pruning with its scores charged or given: (name of the method, row)."""
    end = f", scores {words}"
    return [(SCORES[name.split()[0]], row) for name, row in rows.items() if name.endswith(end)]


def kept(name, rule, cost):
    """How often a rule kept the samples, and how often it would have by chance.

    Each is three shares of the samples: kept in at most a tenth of the choices, in at least nine
    tenths, and neither always nor never. They are means over the seeds.
    """
    shares = {"histogram": [], "chance": []}
    for report in reports(name, rule, cost):
        tenth = report["selection"]["choices"] // 10
        for kind, rows in shares.items():
            times = [count / report["num_samples"] for count in report["selection"][kind]]
            ends = sum(times[: tenth + 1]), sum(times[-tenth - 1 :])
            rows.append((*ends, sum(times[1:-1])))
    return tuple([mean(column) for column in zip(*rows, strict=True)] for rows in shares.values())


def effective_share(name, method, cost):
    """The mean over the seeds of the effective share 1 / G of a method's runs."""
    return mean(1 / report["gain"] for report in reports(name, method, cost))


# Each of these judges a claim by a study at one cost. It returns what was measured, in words, and
# whether the claim held, for each measurement; "" and [] if nothing was measured.


def static_scores_cost_more(name, cost):
    found = by_scores(rows_at(name, cost), "charged")
    differences = [(method, row["to_short_run"], row["cost"]) for method, row in found]
    words = [f"{method} {points(each)} at a cost of {c:.2f}" for method, each, c in differences]
    head = f"difference to the short run of cost {cost:g}, with the scores counted: "
    held = [each["interval"][1] < 0 for _, each, _ in differences]
    return head + ", ".join(words) if found else "", held


def random_beats_static_scores(name, cost):
    found = by_scores(rows_at(name, cost), "given")
    words = [f"{method} {points(row['to_random'])}" for method, row in found]
    head = f"difference to dynamic random at {cost:g} of the samples, scores given: "
    held = [row["to_random"]["interval"][1] < 0 for _, row in found]
    return head + ", ".join(words) if found else "", held


def most_are_sometimes(name, cost):
    if cost != 0.3:
        return "", []
    words, held = [], []
    for rule, shown in RULES.items():
        found, chance = ([100 * share for share in shares] for shares in kept(name, rule, cost))
        seldom, often, neither = zip(found, chance, strict=True)
        words.append(
            f"{shown} at 0.3 kept {seldom[0]:.1f} % of the samples in at most a tenth of its "
            f"choices (by chance {seldom[1]:.1f} %), {often[0]:.1f} % in at least nine tenths "
            f"({often[1]:.1f} %), and {neither[0]:.1f} % neither always nor never "
            f"({neither[1]:.1f} %)"
        )
        # Most samples are, and clearly more than if chance had chosen.
        held += [found[2] > 50, found[2] > chance[2] + 1]
    return "; ".join(words), held


def rules_beat_random(name, cost):
    rows = rows_at(name, cost)
    found = {shown: rows[rule]["to_random"] for rule, shown in RULES.items() if rule in rows}
    words = ", ".join(f"{shown} {points(difference)}" for shown, difference in found.items())
    held = [difference["interval"][0] > 0 for difference in found.values()]
    return f"at {cost:g} {words}", held


def as_good_as_the_full_run(name, cost):
    rows = rows_at(name, cost)
    best = max((rows[rule] for rule in RULES if rule in rows), key=lambda row: row["mean"])
    words = f"at {cost:g} {RULES[best['name']]} {points(best['to_full_run'])}"
    return words, [best["to_full_run"]["interval"][1] > 0]


CLAIMS = {
    "Static scores cost more than they save": static_scores_cost_more,
    "At aggressive rates dynamic random pruning beats static scores": random_beats_static_scores,
    'Many samples matter for a part of the training only ("sometimes" samples)': most_are_sometimes,
    "ε-greedy and UCB beat dynamic random pruning": rules_beat_random,
    "Up to twice (first version), ten times (second) less training without significant loss": (
        as_good_as_the_full_run
    ),
}
# What the measurements at all costs share.
HEADS = {
    rules_beat_random: "difference to dynamic random ",
    as_good_as_the_full_run: "the better of the two rules against the full run: ",
}


def verdict(held):
    if not held:
        return "not measured"
    return "reproduced" if all(held) else "in part" if any(held) else "not reproduced"


def claims():
    """The claims in the abstracts of the central paper, what was measured, what became of them."""
    rows = []
    for claim, judge in CLAIMS.items():
        lines, held = [], []
        for name, size in CLAIMED.items():
            judged = [judge(name, cost) for cost in costs(name)]
            if words := [words for words, _ in judged if words]:
                lines.append(f"{size}: {HEADS.get(judge, '')}{'; '.join(words)}")
            held += [each for _, several in judged for each in several]
        rows.append([claim, "<br>".join(lines), verdict(held)])
    rows.append(["The same on ImageNet", "not on two CPU cores", "not testable here"])
    head = ["claim", "measured here (points of accuracy; 95 %)", "verdict"]
    return markdown(head, rows, others="---")


# ---- settings, one at a time; wrong labels -------------------------------------------------------


def varied(what, rule, option, values):
    """What is varied, the rule as it is, the pattern of the names of the others, the values.

    The value of the rule as it is stands between stars.
    """
    base = {SHORT: "full (num_train_epochs 6)"}.get(rule, rule)
    head = f"{base[:-1]}, " if base.endswith(")") else f"{base} ("
    return what, rule, f"{head}{option} {{}})", values


GREEDY, BY_LOSS, EPOCHS = "epsilon-greedy", "loss-proportional", "epochs, at the same cost"
FIFTH = f"{GREEDY} (period 5)"
DROPPED, ALL = (f"{GREEDY} (period 5, scoring {which})" for which in ("dropped", "all"))
VARIED = (
    varied("learning rate", SHORT, "learning_rate", "0.8 *1.6*"),
    varied("learning rate", GREEDY, "learning_rate", "*0.8* 1.6"),
    varied("learning rate", BY_LOSS, "learning_rate", "0.8 *1.6*"),
    varied(EPOCHS, GREEDY, "num_train_epochs", "12 *20* 60"),
    varied(EPOCHS, BY_LOSS, "num_train_epochs", "12 *20* 60"),
    varied("`alpha`", BY_LOSS, "alpha", "0.5 *1.0* 2.0"),
    varied("`epsilon`", GREEDY, "epsilon", "0.0 *0.1* 0.3"),
    varied("full-data epochs first", BY_LOSS, "first", "*0* 2"),
    varied("share of full-data epochs last", BY_LOSS, "last", "*0.0* 0.1"),
    varied("`c`", "ucb", "c", "*1.0* 5.0"),
    varied("`decay`", "ucb", "decay", "0.3 *0.8* 1.0"),
    varied("`period`", GREEDY, "period", "*1* 5"),
    varied("`scoring`, `period` 5", FIFTH, "scoring", "*trained* dropped all"),
    varied("`scoring_mode`, of the dropped", DROPPED, "scoring_mode", "*train* eval"),
    varied("`scoring_mode`, of all", ALL, "scoring_mode", "*eval* train"),
)


def settings():
    """What each setting gave: the value of the rule as it is in italics, the best in bold."""
    at, rows = rows_at(SETTINGS, 0.3), []
    for what, rule, pattern, values in VARIED:
        names = {value: rule if "*" in value else pattern.format(value) for value in values.split()}
        best = max(at[name]["mean"] for name in names.values())
        cells = []
        for value, name in names.items():
            words = f"{100 * at[name]['mean']:.1f}"
            cells.append(f"{value}: {f'**{words}**' if at[name]['mean'] == best else words}")
        rows.append([what, SHOWN.get(rule.partition(" (")[0], rule), ", ".join(cells)])
    return markdown(["what is varied", "rule", "accuracy (%) at each value"], rows, others="---")


def relabelled(name, method, cost):
    """The share of wrong labels among all samples that a method's choices kept."""
    found = reports(name, method, cost)
    return mean(report["metrics"]["train_relabelled_share"] for report in found)


def noise():
    """What each method reached that trained on labels some of which are wrong.

    The accuracy is by the right labels.
    """
    rows = []
    for name, row in rows_at(NOISE, 0.3).items():
        difference = points(row["to_short_run"]) if row["to_short_run"] else ""
        wrong = relabelled(NOISE, name, row["wanted"])
        numbers = (f"{100 * row['mean']:.2f}", difference, f"{100 * wrong:.1f}")
        rows.append([name, *numbers, str(row["seeds"])])
    share = "wrong labels among what it trained on (%)"
    return markdown(["method", "accuracy (%)", "to the short run", share, "seeds"], rows)
