"""The command line of recipes/compare.py."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from hf_dynprune.scoring_runs import METHODS

from .plan import FULL, SHORT, Plan
from .run import Sitting, Study
from .summarise import STUDY_FILE, best_settings, chosen_settings, summarise, tables


def main(description: str) -> None:
    """Carry out the study that sys.argv describes, and print its tables."""
    parser = make_parser(description)
    arguments = sys.argv[1:]
    own = arguments.index("--") if "--" in arguments else len(arguments)
    options, recipe = parser.parse_args(arguments[:own]), arguments[own + 1 :]
    try:
        plan = Plan(**{field.name: getattr(options, field.name) for field in fields(Plan)})
        study = Study(options.output_dir, recipe, options.jobs)
        if recipe or not (study.folder / STUDY_FILE).exists():
            check(plan, recipe)
            settings = {"metric": options.metric, "lower_is_better": options.lower_is_better}
            study.note(settings, options.targets, ["python", *sys.argv])
            Sitting(plan, study).carry_out()
        summary = summarise(study.folder)
    except (ValueError, TypeError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(*tables(summary).values(), sep="\n\n")
    for row in summary["tuning"]:
        if row["edge"]:
            at = f", batch {row['batch_size']}" if "batch_size" in row else ""
            print(
                f"{row['name']}, cost {row['cost']:g}{at}: the best learning rate, "
                f"{row['chosen']:g}, is the lowest or highest of those tried. Try more."
            )
    sizes = sorted({row["batch_size"] for row in summary["tuning"] if "batch_size" in row})
    for (name, cost), setting in best_settings(
        summary["tuning"], summary["lower_is_better"]
    ).items():
        if setting.batch is not None:
            ends = setting.batch in (sizes[0], sizes[-1])
            beyond = ", the lowest or highest of those tried: try more" if ends else ""
            print(f"{name}, cost {cost:g}: the best batch size is {setting.batch}{beyond}.")
    print(f"Written to {study.folder}: summary.json, tables, pictures, and a folder for each run.")


def check(plan: Plan, recipe: Sequence[str]) -> None:
    """Raise ValueError if a file that the study needs is missing, before anything runs."""
    if not recipe or not Path(recipe[0]).is_file():
        raise ValueError(
            f"{recipe[0] if recipe else 'nothing'} is not a recipe: expected two dashes, the path "
            "of a recipe and its options, such as -- recipes/cifar.py --model resnet8_cifar."
        )
    if plan.rates_of is None:
        return
    names = filter(None, (SHORT, plan.first_rule))
    needed = [(FULL, 1.0), *((name, cost) for name in names for cost in plan.costs)]
    known = chosen_settings(plan.rates_of)
    missing = [f"{name} at cost {cost:g}" for name, cost in needed if (name, cost) not in known]
    if missing:
        raise ValueError(
            f"{plan.rates_of} has no learning rates of {', '.join(missing)}: tune them there."
        )


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options. Defaults are those of [`Plan`]."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, text: str, **settings) -> None:
        if hasattr(Plan, name):
            settings["default"] = getattr(Plan, name)
        parser.add_argument(f"--{name}", help=text, **settings)

    floats = {"type": float, "nargs": "*"}
    add("output_dir", "folder of the study", type=Path, required=True)
    add("rules", "policies, see above", nargs="*")
    text = f"for static pruning, and reference for reference-loss: {', '.join(METHODS)}"
    add("scores", text, nargs="*")
    add("costs", "planned costs in (0, 1), in full runs", type=float, nargs="+")
    add("seeds", "seeds of the runs that are compared", type=int, nargs="+")
    add("learning_rates", "rates to choose from; default: the recipe's rate, no tuning", **floats)
    add("batch_sizes", "batch sizes to choose from, each with its best rate", type=int, nargs="*")
    add("rates_of", "folder of a study whose learning rates are used, instead of tuning", type=Path)
    add("tune", "tune each rule, or only the first one for all rules", choices=("each", "first"))
    add("tuning_seeds", "seeds of the tuning runs", type=int, nargs="+")
    add("validation_share", "share of the training data held out for tuning", type=float)
    add("metric", "metric of the last evaluation", default="eval_accuracy")
    add("lower_is_better", "a low value of the metric is good", action="store_true")
    add("targets", "values of the metric that methods should reach", default=[], **floats)
    text = "runs at a time, on shared cores or one GPU each; their seconds are of a shared machine"
    add("jobs", text, type=int, default=1)
    return parser
