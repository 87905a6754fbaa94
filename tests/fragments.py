"""The parts of README and docs that are rendered from files: tables, and numbers within sentences.

    python tests/fragments.py    # renders them into all pages

A table stands between `<!-- study NAME table_0.3 -->` and `<!-- /study NAME table_0.3 -->`, or
between `<!-- overview -->` and `<!-- /overview -->`; the other names are those of `TABLES`.

A number stands between `<!-- value STUDY; COST; METHOD; WHAT -->` and `<!-- /value -->`. WHAT is
one of

    mean                       what the method reached
    to short run               its difference to the short run, or to any other method
    lost to short run          the same with the other sign
    interval to short run      the difference with its 95 % interval
    keep_ratio                 with which it met the cost
    wrong labels               % of the labels that it trained on
    effective share            % of its samples, see docs/pays.md; a mean over the seeds
    kept seldom, kept often    % of the samples kept in at most a tenth, at least nine tenths

and `, 0` behind it rounds to whole numbers. Other values: see `value`.
Accuracies are in points. No number of these is written by hand; test_docs.py compares.
"""

import json
import re

import reliability
import speed
import studies
from reliability import ROOT, put_into

from hf_dynprune.potential import predicted_saving
from hf_dynprune.report import PruningReport
from recipes.benchmarks import gpu
from recipes.studies import rl_results
from recipes.studies.summarise import Metric, markdown, paired

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RESULTS = ROOT / "recipes" / "results"
_STUDY = re.compile(r"<!-- (study [\w. ]+) -->")
_VALUE = re.compile(r"<!-- value ([^>]+?) -->.*?<!-- /value -->", re.DOTALL)


# ---- numbers within sentences --------------------------------------------------------------------


def _of_study(study, cost, method, what):
    """One number of a study, as text; see the docstring of the file."""
    what, _, digits = what.partition(", ")
    row = studies.rows_at(study, float(cost))[method]
    scale = Metric.of(studies.summary(study)).scale
    digits = int(digits or 1)
    if what == "mean":
        return f"{scale * row['mean']:.{digits}f}"
    if what == "keep_ratio":
        return f"{row['keep_ratio']:.2f}"
    if what == "wrong labels":
        return f"{100 * studies.relabelled(study, method, float(cost)):.0f}"
    if what == "effective share":
        return f"{100 * studies.effective_share(study, method, float(cost)):.{digits}f}"
    if what in ("kept seldom", "kept often"):
        found, _ = studies.kept(study, method, float(cost))
        return f"{100 * found[what == 'kept often']:.0f}"
    kind, _, other = what.rpartition("to ")
    others = studies.rows_at(study, float(cost))[other]
    difference = paired(row["values"], others["values"])
    if kind == "interval ":
        low, high = (f"{scale * end:+.{digits}f}" for end in difference["interval"])
        return f"{scale * difference['mean']:+.{digits}f} ({low} to {high})"
    value = scale * difference["mean"]
    return f"{-value:.{digits}f}" if kind == "lost " else f"{value:+.{digits}f}"


def _spread(study, cost, which):
    """How far the seeds of a method are apart, in points: the least or the most of all methods."""
    rows = studies.rows_at(study, float(cost))
    values = [row["values"].values() for name, row in rows.items() if name != "full run"]
    spreads = [100 * (max(each) - min(each)) for each in values]
    return f"{(min if which == 'least' else max)(spreads):.0f}"


def _tuned(study, method, words):
    """By how many points one learning rate was better than another on held-out data."""
    better, worse = map(float, words.split(" over "))
    rows = studies.summary(study)["tuning"]
    means = next(dict(row["means"]) for row in rows if row["name"] == method)
    return f"{100 * (means[better] - means[worse]):.1f}"


def _advice(what):
    """How far off the predictions of `advise` were."""
    runs = json.loads((RESULTS / "benchmarks" / "advice.json").read_text())["runs"]
    if what == "runs":
        return str(len(runs))
    if what == "rounds":
        return str(len(runs[0]["rounds"]))
    if what == "worst":
        return f"{100 * max(abs(run['error']) for run in runs):.1f}"
    return f"{100 * max(abs(run['unrest']) for run in runs):.0f}"


def _potential(what):
    """What the studies say of the effective share; see recipes/studies/potential.py."""
    stored = json.loads((RESULTS / "potential.json").read_text())
    line = stored["before"] if what.endswith(" before") else stored
    what = what.removesuffix(" before")
    if what == "correlation":
        return f"{line['correlation']:.2f}"
    if what == "within":
        return f"{stored['predicted']['within']} of {len(stored['predicted']['settings'])}"
    if what == "rank correlation":
        return f"{stored['predicted']['rank_correlation']:.2f}"
    if what == "studies":
        return str(line["fit"]["studies"])
    if what == "left out gain":
        (point,) = (point for point in stored["points"] if not point["fitted"])
        return f"{point['gain']:.2f}"
    saving = predicted_saving(float(what.removeprefix("cost at G ")))
    middle, most, least = (f"{100 / factor:.0f}" for factor in saving)
    return f"{middle} % ({least} to {most} %)"


def potential():
    """G and the measured saving of each study."""
    stored = json.loads((RESULTS / "potential.json").read_text())
    rows = [
        [
            point["study"] if point["fitted"] else f"({point['study']})",
            f"{point['cost']:g}",
            f"{point['gain']:.2f}",
            f"{point['saving']:.2f}",
            f"{100 / point['saving']:.0f} %",
            str(point["seeds"]),
            "yes" if point["predicted_first"] else "",
        ]
        for point in stored["points"]
    ]
    heads = ["study", "cost", "mean G", "saving factor", "cost of a short run", "seeds"]
    heads += ["predicted first"]
    return markdown(heads, rows)


def predicted():
    """What was predicted of each setting before it was run, and what was measured."""
    measured = {
        (setting["study"], setting["cost"]): setting["measured"]
        for setting in json.loads((RESULTS / "potential.json").read_text())["predicted"]["settings"]
    }
    rows = []
    for setting in json.loads((RESULTS / "predicted.json").read_text())["settings"]:
        study, cost, said = setting["study"], setting["cost"], setting["saving"]
        point = measured.get((study, cost))
        seen, inside, seeds = "not run yet", "", ""
        if point is not None:
            seen, seeds = _factor(point["saving"], point["interval"]), str(point["seeds"])
            low, high = said["interval"]
            inside = "yes" if low <= point["saving"] <= high else "no"
        gain = f"{setting['gain']:.2f}"
        words = _factor(said["factor"], said["interval"])
        rows.append([study, f"{cost:g}", gain, words, seen, inside, seeds])
    heads = ["study", "cost", "G of the short run", "predicted saving factor", "measured"]
    return markdown([*heads, "within the prediction", "seeds"], rows)


def _factor(middle, ends):
    """Such as '1.20 (0.95 to 1.50)'."""
    return f"{middle:.2f}" + (f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else "")


def _rows(rule, ahead):
    """In how many rows of accuracy a rule was compared, or was ahead of the short run."""
    found = [
        row["to_short_run"]["mean"] > 0
        for name in studies.TITLES
        if studies.summary(name)["metric"].endswith("accuracy")
        for row in studies.summary(name)["rows"]
        if row["name"] == rule
    ]
    return str(sum(found) if ahead else len(found))


def _prompts(share, method, what):
    """A number of the study of prompts, see recipes/studies/rl_results.py."""
    rows = rl_results.summarise(rl_results.stored())
    (row,) = (row for row in rows if (row["share"], row["method"]) == (float(share), method))
    if what == "effective share":
        return f"{100 * row['effective_share']:.0f} %"
    if what == "bound":
        return f"{1 / row['effective_share']:.1f}"
    if what.startswith("saving at "):
        return rl_results.factor_in_words(row, float(what.removeprefix("saving at ")))
    return rl_results.difference_in_words(row["to_uniform"])


def _bill(model, policy):
    """The seconds of a whole run on a GPU, to those of the stock Trainer's full run."""
    return f"{gpu.read()['bill']['figures'][model][policy]['ratio']:.2f}"


def value(words):
    """The text between the markers of a value."""
    match [part.strip() for part in " ".join(words.split()).split(";")]:
        case ["advice", what]:
            return _advice(what)
        case ["gpu seconds", model, policy]:
            return _bill(model, policy)
        case ["potential", what]:
            return _potential(what)
        case ["prompts", share, method, what]:
            return _prompts(share, method, what)
        case [rule, "rows" | "rows ahead" as what]:
            return _rows(rule, what == "rows ahead")
        case [study, "tuning", method, which]:
            return _tuned(study, method, which)
        case [study, cost, "spread of seeds", which]:
            return _spread(study, cost, which)
        case [study, cost, method, what]:
            return _of_study(study, cost, method, what)
    raise ValueError(f"There is no value {words!r}.")


# ---- tables --------------------------------------------------------------------------------------


def tiny_imagenet():
    """The three runs on Tiny-ImageNet."""
    rows = []
    for name, words in (
        ("full", "full run: all data, 6 epochs"),
        ("short", "short run: all data, 3 epochs"),
        ("ucb", "`UCB(0.5)`"),
    ):
        report = PruningReport.load(RESULTS / "tiny_imagenet" / f"{name}.json")
        metrics = report.metrics
        file = f"[{name}.json](../recipes/results/tiny_imagenet/{name}.json)"
        numbers = (
            f"{100 * metrics['eval_top5_accuracy']:.1f} %",
            f"{100 * metrics['eval_accuracy']:.2f} %",
            f"{report.cost_against(6):.3f}",
            f"{report.totals['optimizer_steps']:,}",
        )
        rows.append([words, *numbers, file])
    return markdown(["run", "top-5", "accuracy", "cost", "optimizer steps", "report"], rows)


def packing():
    """Batches of SFT in four layouts, on all data and on half of it."""
    rows = []
    for row in json.loads((RESULTS / "benchmarks" / "packing.json").read_text())["rows"]:
        full = row["token_ratio"] == 1
        low, high = row["epoch_ratio_95"]
        seconds = f"{row['epoch_ratio']:.2f} (95 %: {low:.2f} to {high:.2f})"
        rows.append(
            [
                row["layout"],
                row["data"],
                f"{100 * row['padding_all']:.0f} %",
                f"{row['ratio']:.2f}",
                "" if full else f"{row['token_ratio']:.2f}",
                "" if full else seconds,
            ]
        )
    heads = ["layout", "data", "padding", "tokens a second, to padded", "tokens an epoch, to all"]
    return markdown([*heads, "seconds an epoch, to all"], rows)


READINGS = (
    ("reading", "plain", "in memory", "64 tokens a row, in memory"),
    ("reading", "plain", "on disk", "64 tokens a row, on disk"),
    ("reading", "indices", "on disk", "the same after `Dataset.shuffle`"),
    ("reading_large", "plain", "on disk", "1,024 tokens a row, more than the memory"),
)


def reading():
    """Rows a second of an Arrow dataset by order, and the seconds of an epoch."""
    rows = []
    for file, layout, where, words in READINGS:
        known = speed.rows(file, layout=layout, where=where)
        for row in (row for row in known if row["workers"] == 0):
            beside = next(
                other for other in known if other["order"] == row["order"] and other["workers"]
            )
            rows.append(
                [
                    words,
                    row["order"],
                    speed.two_digits(row["rows_a_second"]),
                    speed.two_digits(beside["rows_a_second"]),
                    f"{row['epoch']:.2f}",
                    f"{beside['epoch']:.2f}",
                ]
            )
    heads = ["10 million rows", "order", "rows a second", "4 workers", "seconds an epoch, to stock"]
    return markdown([*heads, "4 workers"], rows)


TABLES = {
    "overview": studies.overview,
    "effective_share": studies.effective_shares,
    "imbalance": studies.imbalance,
    "claims": studies.claims,
    "settings": studies.settings,
    "noise": studies.noise,
    "tiny_imagenet": tiny_imagenet,
    "potential": potential,
    "predicted": predicted,
    "packing": packing,
    "reading": reading,
    "prompts 0.2": lambda: rl_results.table(rl_results.stored(), 0.2),
    "prompts 0.4": lambda: rl_results.table(rl_results.stored(), 0.4),
    "prompts 0.1": lambda: rl_results.table(rl_results.stored(), 0.1),
    "prompts tuning": lambda: rl_results.tuning_table(rl_results.stored()),
    "speed": speed.render,
    "reliability": lambda: reliability.render(reliability.read()),
    "gpu": lambda: gpu.render(gpu.read()),
}


# ---- pages ---------------------------------------------------------------------------------------


def rendered(text, tables=TABLES):
    """A page with its tables and numbers as the files have them."""
    for words in _STUDY.findall(text):
        _, name, table = words.split()
        text = put_into(text, (studies.STUDIES / name / f"{table}.md").read_text().strip(), words)
    for name, render in tables.items():
        text = put_into(text, render(), name) if f"<!-- {name} -->" in text else text
    return _VALUE.sub(
        lambda found: f"<!-- value {found[1]} -->{value(found[1])}<!-- /value -->", text
    )


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
