"""The README: its programs run, and each of its commands is run here, in test_recipes.py or by CI."""

import json
import os
import re
import tempfile
from pathlib import Path

import pytest
import reliability
import speed
import studies
import torch
from tiny import arguments, images, trainer, vit
from transformers import TrainingArguments

import hf_dynprune
from hf_dynprune import DynamicPruningTrainer, PruningArguments, PruningPolicy
from hf_dynprune.policies import POLICIES
from hf_dynprune.report import PruningReport
from recipes.studies.summarise import chosen_rates, summarise

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = studies.RESULTS.read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def program(word):
    (found,) = [text for text in PROGRAMS if word in text]
    return found


def commands():
    """The commands of the README, as (program, what follows it): ("hf-dynprune plot", "runs runs/full runs/ucb")."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [
        line.split("#")[0].strip()
        for block in blocks
        for line in block.replace("\\\n", " ").split("\n")
    ]
    programs = r"make \w+|hf-dynprune \w+|(?:python|accelerate launch|torchrun --nproc_per_node 2) recipes/\w+\.py"
    for line in filter(None, lines):
        found = re.match(rf"({programs})\b ?(.*)", line)
        assert found, f"{line}: say in this test what runs it"
        yield found.groups()


def test_every_command_is_run_by_a_test_or_by_ci():
    # Where the command is run, and by which words it is known there.
    run_by = {
        "make quickstart": (".ci/run", "make quickstart"),
        "make test": (".ci/run", "make test"),
        "python recipes/compare.py": ("tests/test_recipes_compare.py", "recipes/compare.py"),
        "python recipes/cifar.py": ("tests/test_recipes.py", 'run("recipes/cifar.py"'),
        "accelerate launch recipes/imagenet.py": (
            "tests/test_recipes_imagenet.py",
            "accelerate.commands.launch",
        ),
        "torchrun --nproc_per_node 2 recipes/text_classification.py": (
            "tests/test_recipes_text.py",
            "torchrun",
        ),
        "hf-dynprune score": ("tests/test_cli.py", '"score"'),
        "hf-dynprune advise": ("tests/test_cli_advise.py", '"advise"'),
        "hf-dynprune report": ("tests/test_cli_report.py", '"report"'),
        "hf-dynprune plot": ("tests/test_cli_report.py", '"plot"'),
        "hf-dynprune card": ("tests/test_cli_card.py", '"card"'),
    }
    assert {program for program, _ in commands()} == set(run_by)
    for command, (file, words) in run_by.items():
        assert words in (ROOT / file).read_text(), f"{file} does not run {command}"


def test_the_options_of_every_command_exist():
    for program, rest in commands():
        options = set(re.findall(r"--(\w+)", rest))
        if options and not program.startswith("make"):
            command = program.split()[-1]
            module = "hf_dynprune/cli.py" if program.startswith("hf-dynprune") else command
            source = (ROOT / module).read_text() + (ROOT / "recipes/common.py").read_text()
            known = {
                *TrainingArguments.__dataclass_fields__,
                *PruningArguments.__dataclass_fields__,
            }
            for option in options - known:
                assert re.search(rf"\b{option}\b", source), f"{program} has no --{option}"


def test_the_configurations_that_the_readme_names_exist():
    for path in re.findall(r"(?<![/\w.])((?:recipes|model_cards|tests)/[\w/.]+\.\w+)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([\w/.]+)\)", RESULTS):
        assert (studies.RESULTS.parent / path).exists(), path


def test_the_smallest_program_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"model": vit(), "args": arguments(tmp_path), "train": images(), "test": images(8)}
    exec(program("trainer.train()  # progress bar"), scope)
    assert isinstance(scope["trainer"], DynamicPruningTrainer)
    assert PruningReport.load("report.json").cost_ratio == pytest.approx(0.3)


def test_write_your_own_policy_runs_and_is_short(tmp_path):
    assert len(program("LeastProgress").strip().splitlines()) <= 20
    scope = {"__name__": "readme"}
    exec(program("LeastProgress"), scope)
    policy = scope["LeastProgress"](keep_ratio=0.5, first=2)
    assert isinstance(policy, PruningPolicy)
    run = trainer(tmp_path, pruning=policy, num_train_epochs=5)
    run.train()
    assert run.pruning_report.cost_ratio == pytest.approx((2 + 3 * 0.5) / 5)
    assert torch.isfinite(run.pruner.table["progress"]).all()


def test_the_loop_for_those_who_come_from_infobatch_runs():
    torch.manual_seed(0)
    train = [{"image": torch.randn(4), "label": i % 2} for i in range(256)]
    model = torch.nn.Linear(4, 2)
    scope = {
        "train": train,
        "model": model,
        "num_epochs": 8,
        "criterion": torch.nn.CrossEntropyLoss(reduction="none"),
    }
    scope["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    exec(program("pruner.dataloader(train)"), scope)
    epochs = scope["pruner"].report.epochs
    assert [epoch.full_data for epoch in epochs] == [False] * 7 + [True]  # the last eighth
    assert [epoch.samples for epoch in epochs][::7] == [256, 256]
    assert all(128 < epoch.samples < 256 for epoch in epochs[1:7])


def test_the_diff_for_those_who_come_from_the_trainer_is_what_the_program_has():
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    scope = {"model": vit(), "train": images(), "test": images(8)}
    with tempfile.TemporaryDirectory() as folder:
        for sign in "-+":  # the program before, the program after
            lines = [line[1:] for line in diff.splitlines() if line[:1] in (sign, " ")]
            exec("\n".join(lines), {**scope, "args": arguments(folder)})


def test_every_method_has_its_paper():
    section = README.split("## Papers")[1].split("\n## ")[0]
    for name, cls in POLICIES.items():
        if name not in ("full", "loss-proportional"):  # no method; ours
            assert f"`{cls.__name__}" in section, name
    cited = " ".join((cls.__doc__ or "").partition("    Paper")[2] for cls in POLICIES.values())
    for identifier in re.findall(r"\d{4}\.\d{5}", cited):
        assert identifier in section, identifier
    for name, cls in re.findall(r"`((\w+)\.paper_like\(.*?\))`", section):
        assert eval(name, vars(hf_dynprune) | {cls: getattr(hf_dynprune, cls)})


def test_every_policy_has_its_row():
    rows = re.findall(r"^\| `(\w+)\(.*?\)` \| `([\w-]+)` \|", README, re.MULTILINE)
    assert {name: cls for cls, name in rows} == {
        name: cls.__name__ for name, cls in POLICIES.items()
    }


def test_every_field_of_the_report_is_explained():
    section = README.split("## Reading the report")[1].split("\n## ")[0]
    report = PruningReport({"name": "full"}, 1, 0, 0).to_dict()
    for field in report:
        assert f"`{field}`" in section, field


def test_the_names_that_the_readme_uses_exist():
    for name in re.findall(r"from hf_dynprune import ([\w, ]+)", README):
        for part in name.split(","):
            assert hasattr(hf_dynprune, part.strip())


def test_published_figures_are_those_of_the_reports():
    rows = re.findall(
        r"^\| .* \| ([\d.]+) % \| ([\d.]+) \| ([\d,]+) \| \[.*\]\((.*/.*\.json)\) \|$",
        RESULTS,
        re.MULTILINE,
    )
    results = studies.RESULTS.parent
    assert {path for *_, path in rows} == {
        f"tiny_imagenet/{path.name}" for path in (results / "tiny_imagenet").iterdir()
    }
    for accuracy, cost, steps, path in rows:
        report = PruningReport.load(results / path)
        assert accuracy == f"{100 * report.metrics['eval_accuracy']:.2f}"
        assert (
            cost == f"{report.passes / (6 * report.num_samples):.3f}"
        )  # the full run has 6 epochs
        assert steps == f"{report.totals['optimizer_steps']:,}"


def test_the_table_of_speed_is_that_of_the_files():
    assert reliability.put_into(README, speed.render(), "speed") == README, (
        "run `python tests/speed.py`"
    )


def test_the_tables_of_the_studies_are_those_of_their_files():
    for page in studies.PAGES:
        assert studies.rendered(page.read_text()) == page.read_text(), (
            "run `python tests/studies.py`"
        )
    assert {*studies.TITLES, studies.SETTINGS} == {
        folder.name for folder in studies.STUDIES.iterdir()
    }
    for file in studies.STUDIES.glob("*/*.md"):
        assert f"<!-- study {file.parent.name} {file.stem} -->" in RESULTS, (
            f"{file} is not on the page of the results"
        )


@pytest.mark.parametrize("name", sorted(folder.name for folder in studies.STUDIES.iterdir()))
def test_the_summary_of_a_study_is_that_of_its_reports(name, tmp_path):
    folder = studies.STUDIES / name
    for path in (folder / "study.json", *folder.glob("*/run.json"), *folder.glob("*/report.json")):
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    summarise(tmp_path)
    for made in filter(Path.is_file, tmp_path.iterdir()):
        there = folder / made.name
        assert there.exists()
        if made.suffix != ".png":
            assert made.read_text() == there.read_text(), (
                f"run `python recipes/compare.py --output_dir {folder}`"
            )


@pytest.mark.parametrize("name", studies.TUNED)
def test_a_study_is_at_equal_cost_and_its_learning_rates_were_tuned(name):
    summary = studies.summary(name)
    tuned = {(row["name"], row["cost"]): row for row in summary["tuning"]}
    tune_first = any("--tune first" in command for command in summary["commands"])
    rates = {}
    for run, _ in studies.runs(name):
        if run["rate"] is None:
            (rate,) = [
                float(word.partition("=")[2])
                for word in run["command"]
                if word.startswith("--learning_rate=")
            ]
            rates.setdefault((run["name"], run["cost"]), set()).add(rate)
    for row in summary["rows"]:
        key = row["name"], row["wanted"]
        # Static pruning by scores takes the rate of the first rule; so do rules that --tune first did not tune.
        by_scores = row["name"].endswith((", scores charged", ", scores given"))
        not_tuned = tune_first and key not in tuned and row["name"] not in ("full run", "short run")
        tuning = tuned["random", row["wanted"]] if by_scores or not_tuned else tuned[key]
        assert rates[key] == {tuning["chosen"]}
        assert len(tuning["means"]) >= 3
        assert not tuning["edge"], f"{row['name']}: the best of {tuning['means']} is at their end"
        if row["ranked"]:
            assert row["cost"] == pytest.approx(row["wanted"], rel=0.02)
            assert row["seeds"] >= 3


@pytest.mark.parametrize(
    "name", [studies.SETTINGS, studies.NOISE, "cifar100_16px", "cifar10_resnet20_16px"]
)
def test_a_study_of_details_is_at_equal_cost_and_at_learning_rates_that_were_tuned(name):
    rates = chosen_rates(studies.STUDIES / "cifar10_resnet8")
    for run, _ in studies.runs(name):
        options = dict(word[2:].split("=", 1) for word in run["command"] if "=" in word)
        if "learning_rate" not in run["name"]:
            rate = rates.get((run["name"].partition(" (")[0], run["cost"]), rates["random", 0.3])
            assert float(options["learning_rate"]) == rate
        assert ("--validation_share" in run["command"]) == (
            name == studies.SETTINGS
        )  # choices are made on held-out data
    for row in studies.summary(name)["rows"]:
        assert row["cost"] == pytest.approx(row["wanted"], rel=0.02)
        assert row["seeds"] == (3 if name in (studies.NOISE, "cifar100_16px") else 1)  # "one seed"


def test_what_the_readme_says_of_the_study_is_what_it_found():
    rows = studies.rows_at("cifar10_resnet8", 0.3)
    three = ("loss-proportional", "epsilon-greedy", "ucb")
    assert all(
        rows[name]["to_short_run"]["mean"] > 0.01 for name in three
    )  # "more than a point over the short run"
    clear = [
        name
        for name, row in rows.items()
        if row["to_short_run"] and row["to_short_run"]["interval"][0] > 0
    ]
    assert sorted(clear) == sorted(three)
    means = [rows[name]["mean"] for name in three]
    assert max(means) - min(means) < min(rows[name]["deviation"] for name in three)  # "no telling"
    low, high = rows["random"]["to_short_run"]["interval"]
    assert low < 0 < high
    best = max(row["mean"] for row in rows.values() if row["cost"] < 1)
    assert 0.03 < rows["full run"]["mean"] - best < 0.04  # "more than three points"
    for name, row in rows.items():  # "whatever they cost"
        if name.endswith(", scores given"):
            assert row["to_short_run"]["interval"][1] < 0
    rows = studies.rows_at("cifar10_resnet8", 0.1)
    assert rows["ucb"]["to_short_run"]["interval"][1] < 0  # "loses"
    assert rows["epsilon-greedy"]["to_short_run"]["mean"] < 0
    low, high = rows["loss-proportional"]["to_short_run"]["interval"]
    assert low < 0 < high  # "with less certainty"
    assert low + high > 0.02  # "ahead"
    for seed in range(3):  # "most samples are seen once"
        selection = PruningReport.load(
            studies.STUDIES / f"cifar10_resnet8/ucb_0.1_seed{seed}/report.json"
        ).selection
        assert selection["histogram"][1] > 50_000 / 2


def test_what_the_pages_say_of_smaller_images_is_what_was_found():
    half, third = (studies.rows_at("cifar10_16px", cost) for cost in (0.5, 0.3))
    assert round(100 * half["short run"]["to_full_run"]["mean"], 1) == -2.3
    short = half["short run"]["values"].values()
    assert max(short) - min(short) > 0.01  # "more than a point apart"
    ahead = [
        name
        for name, row in half.items()
        if row["to_random"] and row["to_random"]["interval"][0] > 0
    ]
    assert ahead == ["loss-proportional"]
    assert list(half)[-1] == "infobatch"  # "the last": the rows are sorted
    assert round(half["infobatch"]["keep_ratio"], 2) == 0.44
    assert half["infobatch"]["to_random"]["interval"][1] < 0
    for seed in map(str, range(3)):  # "with each seed"
        assert half["loss-proportional"]["values"][seed] > half["random"]["values"][seed]
    for rows in (half, third):  # "ahead of the short run by an interval clear of zero"
        for row in rows.values():
            assert not (row["to_short_run"] and row["to_short_run"]["interval"][0] > 0)
        assert (
            0.5 < 100 * rows["loss-proportional"]["to_short_run"]["mean"] < 0.9
        )  # "less than a point"
    assert not any(
        row["to_random"] and row["to_random"]["interval"][0] > 0 for row in third.values()
    )
    assert third["loss-proportional"]["to_short_run"]["mean"] > 0.008  # "nearly a point"
    assert third["epsilon-greedy"]["to_random"]["interval"][1] < 0  # "by an interval clear of zero"
    assert round(100 * third["ucb"]["to_random"]["mean"], 1) == -1.0  # "by a point"
    for name in ("epsilon-greedy", "ucb"):  # "more than a point ahead"
        assert 100 * studies.rows_at("cifar10_resnet8", 0.3)[name]["to_random"]["mean"] > 1
    assert [name for name in third if third[name]["wanted"] < 1][:2] == [
        "loss-proportional",
        "kakurenbo (num_train_epochs 6.5)",
    ]
    assert round(third["infobatch (num_train_epochs 8)"]["keep_ratio"], 2) == 0.71
    rates, first = (
        chosen_rates(studies.STUDIES / name) for name in ("cifar10_16px", "cifar10_resnet8")
    )
    for name in (
        "random",
        "epsilon-greedy",
        "ucb",
        "loss-proportional",
    ):  # "each rule has its own, here as there"
        assert (name, 0.3) in rates.keys() & first.keys()
    tried = next(
        dict(row["means"])
        for row in studies.summary("cifar10_16px")["tuning"]
        if row["name"] == "epsilon-greedy"
    )
    assert (rates["random", 0.3], rates["epsilon-greedy", 0.3]) == (1.6, 0.4)
    assert round(100 * (tried[0.4] - tried[1.6]), 1) == 0.7


def test_what_the_pages_say_of_resnet_20_is_what_was_found():
    rows = studies.rows_at("cifar10_resnet20_16px", 0.3)
    assert (
        0.75 < 100 * rows["loss-proportional"]["to_short_run"]["mean"] < 1
    )  # "nearly a point ahead"
    assert -1.25 < 100 * rows["ucb"]["to_short_run"]["mean"] < -0.75  # "a point behind"
    assert rows["ucb"]["to_random"]["mean"] < 0  # "the same": behind random pruning


def test_what_the_readme_says_of_all_studies_is_what_they_found():
    ahead, behind = [], []  # of accuracy, in points: the draw in proportion to the loss, top K
    for name in studies.TITLES:
        found = studies.summary(name)
        for row in found["rows"]:
            if row["wanted"] <= 0.5:  # "nothing at 50 % or less reached the full run"
                assert (row["to_full_run"]["mean"] > 0) == found["lower_is_better"]
            if not found["lower_is_better"] and row["name"] == "loss-proportional":
                ahead.append(100 * row["to_short_run"]["mean"])
            if not found["lower_is_better"] and row["name"] in ("ucb", "epsilon-greedy"):
                behind.append(100 * row["to_short_run"]["mean"])
    assert round(min(ahead), 1) == -1.0  # "the most it lost is a point"
    assert (
        min(ahead)
        == 100 * studies.rows_at(studies.NOISE, 0.3)["loss-proportional"]["to_short_run"]["mean"]
    )
    assert [sum(points > 0 for points in ahead), len(ahead)] == [
        6,
        9,
    ]  # "of nine rows ahead in six"
    assert sum(points < -2 for points in behind) >= 3  # "in several"


def test_what_the_pages_say_of_cifar_100_is_what_was_found():
    rows = studies.rows_at("cifar100_16px", 0.3)
    assert (
        0.45 < rows["full run"]["mean"] < 0.5
    )  # "gets half right", "half of the test images are beyond it"
    assert list(rows)[1] == "short run"  # "no rule is ahead": the rows are sorted
    for name in ("loss-proportional", "random"):  # "within its noise"
        assert abs(rows[name]["to_short_run"]["mean"]) < rows["short run"]["deviation"]
    for name in ("epsilon-greedy", "ucb"):  # "by intervals clear of zero"
        assert rows[name]["to_random"]["interval"][1] < 0
    assert round(100 * rows["ucb"]["to_random"]["mean"], 1) == -2.6


def test_what_the_pages_say_of_banking77_is_what_was_found():
    rows = studies.rows_at("banking77_bert", 0.5)
    values = {
        name: [100 * row["values"][str(seed)] for seed in range(3)] for name, row in rows.items()
    }
    for row in rows.values():
        if row["to_short_run"]:  # "tell no rule from the short run"
            low, high = row["to_short_run"]["interval"]
            assert low < 0 < high
    spreads = [max(of) - min(of) for name, of in values.items() if name != "full run"]
    assert (round(min(spreads)), round(max(spreads))) == (7, 11)
    lost = [
        short - random for short, random in zip(values["short run"], values["random"], strict=True)
    ]
    assert (round(min(lost)), round(max(lost))) == (2, 6)
    assert all(
        drawn > random
        for drawn, random in zip(values["loss-proportional"], values["random"], strict=True)
    )
    assert {row["seeds"] for row in studies.summary("banking77_bert")["tuning"]} == {1}


def test_what_the_pages_say_of_shakespeare_is_what_was_found():
    rows = studies.rows_at("shakespeare_llama", 0.5)
    half = {name: row for name, row in rows.items() if name != "full run"}
    for name, row in half.items():
        assert round(row["to_full_run"]["mean"]) in (9, 10)  # "nine to ten behind the full run"
        if name != "short run":  # "within a point", "against the short run it has none"
            assert abs(row["to_short_run"]["mean"]) < 1
            low, high = row["to_short_run"]["interval"]
            assert low < 0 < high
    clear = [
        name
        for name, row in half.items()
        if row["to_random"] and row["to_random"]["interval"][1] < 0
    ]
    assert clear == ["epsilon-greedy"]  # "alone has an interval clear of zero"
    assert half["epsilon-greedy"]["to_random"]["interval"][1] > -0.1  # "only just"
    assert list(half)[-1] == "loss-proportional"  # "the last here": the rows are sorted
    assert {rule["chosen"] for rule in studies.summary("shakespeare_llama")["tuning"]} == {2e-3}


def test_what_the_pages_say_of_wrong_labels_is_what_was_found():
    rows, wrong = studies.rows_at(studies.NOISE, 0.3), studies.relabelled()
    lost = {
        name: -100 * row["to_short_run"]["mean"]
        for name, row in rows.items()
        if row["to_short_run"]
    }
    assert round(100 * wrong["full run"]) == 40
    for name, points in (("ucb", 30), ("epsilon-greedy", 15)):
        assert wrong[name] > 0.55  # "train on wrong labels above all", "chases noise"
        assert round(lost[name]) == points
    assert abs(lost["random"]) < 0.5  # "nothing to speak of"
    for name in ("epsilon-greedy (exclude_hardest 0.4)", "loss-proportional (exclude_hardest 0.4)"):
        assert wrong[name] < wrong["random"] - 0.02  # "fewer wrong labels than chance"
        assert lost[name] > max(1, lost["random"])  # "worse than those of random pruning"
    assert (
        lost["epsilon-greedy (exclude_hardest 0.4)"] < lost["epsilon-greedy"] / 2
    )  # "gives back most of that"
    assert round(lost["loss-proportional"], 1) == 1.0  # "a point, by an interval clear of zero"
    assert rows["loss-proportional"]["to_short_run"]["interval"][1] < 0
    assert (
        lost["loss-proportional"] < lost["loss-proportional (exclude_hardest 0.4)"]
    )  # "less without the guard"


def test_what_the_pages_say_of_long_runs_is_what_was_found():
    rows, short = studies.rows_at("cifar10_long", 0.3), studies.rows_at("cifar10_16px", 0.3)
    assert set(rows) == {"full run", "short run", "loss-proportional", "random", "ucb"}
    assert {row["seeds"] for row in rows.values()} == {1}  # "one seed"
    to_short = {
        name: 100 * row["to_short_run"]["mean"] for name, row in rows.items() if row["to_short_run"]
    }
    assert max(to_short.values()) < 0  # "no rule has a lead"
    for name in ("loss-proportional", "random"):
        assert round(abs(to_short[name]), 2) <= 0.5  # "within half a point"
    assert round(to_short["ucb"]) == -2
    for name in set(rows) - {"full run"}:  # "closer to the full run"
        assert 0 > rows[name]["to_full_run"]["mean"] > short[name]["to_full_run"]["mean"]
    for study, shares in (("cifar10_long", [43, 10]), ("cifar10_resnet8", [23, 4])):
        found, chance = studies.kept(study, "ucb", 0.3)
        assert [round(100 * share) for share in found[:2]] == shares
        assert all(a > 5 * b for a, b in zip(found[:2], chance[:2], strict=True))
    assert max(studies.kept("cifar10_long", "ucb", 0.3)[1][:2]) < 1e-5  # "nothing of either"
    best = chosen_rates(studies.STUDIES / "cifar10_resnet8")["full run", 1.0]
    for run, _ in studies.runs(
        "cifar10_long"
    ):  # "one learning rate for all, 0.8, which is the best of the full run"
        assert best == 0.8 == float(run["command"][run["command"].index("--learning_rate") + 1])


def test_what_the_readme_says_of_settings_is_what_was_found():
    of = {name: 100 * row["mean"] for name, row in studies.rows_at(studies.SETTINGS, 0.3).items()}
    varied = {
        pattern.format(v)
        for _, _, pattern, values in studies.VARIED
        for v in values.split()
        if "*" not in v
    }
    assert varied == {name for name in of if "(" in name}  # all that was tried is in the table
    found = (
        "scoring",
        "epsilon-greedy (num_train_epochs 60)",
    )  # "larger than noise"; "the rest is noise", below a point
    for _, rule, pattern, values in studies.VARIED:
        for name in (pattern.format(value) for value in values.split() if "*" not in value):
            if "scoring_mode" in name:  # of choices that are ruined in either mode, below
                continue
            assert (abs(of[name] - of[rule]) > 3) == any(words in name for words in found)
            assert abs(of[name] - of[rule]) < 1 or any(words in name for words in found)
    drawn = [
        of["loss-proportional"],
        *(of[f"loss-proportional (num_train_epochs {epochs})"] for epochs in (12, 60)),
    ]
    assert max(drawn) - min(drawn) < 0.5  # "the same to it"
    assert (
        3.5 < of["epsilon-greedy"] - of["epsilon-greedy (num_train_epochs 60)"] < 4.5
    )  # "four points"
    every_fifth = of["epsilon-greedy (period 5)"]
    assert abs(every_fifth - of["epsilon-greedy"]) < 0.5  # "no difference that shows"
    lost = {name: every_fifth - mean for name, mean in of.items() if "scoring" in name}
    assert (round(min(lost.values())), round(max(lost.values()))) == (14, 28)
    assert sum("scoring_mode" in name for name in lost) == 2  # "in either mode"
    tuned = {
        (row["name"], row["cost"]): row["chosen"]
        for row in studies.summary("cifar10_resnet8")["tuning"]
    }
    rates = [rate for (_, cost), rate in tuned.items() if cost < 1]
    assert (
        tuned["short run", 0.3] == tuned["short run", 0.1] == 2 * tuned["full run", 1.0]
    )  # "twice the full run's"
    assert rates.count(2 * tuned["full run", 1.0]) > len(rates) / 2


def test_what_was_promised_of_speed_was_measured():
    for row in (
        speed.one("overhead", model="resnet8_cifar"),
        speed.one("overhead_bert", model="bert"),
    ):
        assert row["pairs"] >= 7
        assert row["ratio"] <= 1.01
        assert row["ratio_95"][1] <= 1.03
    assert speed.one("throughput", path="cifar.py, Trainer")["ratio"] >= 0.9
    for name in speed.NEEDED:
        assert speed.one("choosing", samples=1_280_000, policy=name)["ratio"] <= 1
        assert speed.one("choosing_10m", policy=name)["ratio"] <= 1
        row = speed.one("choosing_100m", policy=name)
        assert row["seconds"] <= 60
        assert row["bytes_a_sample"] <= 40
    for row in speed.rows("exchange", way="once an epoch (hf_dynprune)"):
        assert row["bytes_per_observation"] < 1.05 * row["least"]
    for row in speed.rows("startup"):
        # `score` and `advise` list all the Trainer's arguments, and have no limit of their own.
        assert row.get("beyond", 0) < (
            1 if "score" in row["what"] or "advise" in row["what"] else 0.5
        ), row["what"]


def test_the_error_of_advise_is_that_of_its_file():
    runs = json.loads((ROOT / "recipes/results/benchmarks/advice.json").read_text())["runs"]
    worst, unrest = (max(abs(run[name]) for run in runs) for name in ("error", "unrest"))
    assert {run["recipe"] for run in runs} == {"quickstart", "cifar"}
    assert len(runs) == 6
    assert worst < 0.15  # of what is promised
    words = f"off by {100 * worst:.1f} % at the most, medians of {len(runs[0]['rounds'])} rounds"
    assert (
        f"{words} on a machine on which the times of the same run spread over up to {100 * unrest:.0f} % of"
        in " ".join(README.split())
    )


def test_the_quickstarts_figures_are_those_of_its_reports():
    table = (ROOT / "recipes" / "quickstart.py").read_text().split('"""')[1]
    for run, file in (("full", "full"), ("short", "short"), ("pruned", "report")):
        passes, steps, mean, *each = re.search(rf"{run} run +([\d. ]+)\n", table)[1].split()
        reports = [
            PruningReport.load(ROOT / f"recipes/results/quickstart/seed_{seed}/{file}.json")
            for seed in range(5)
        ]
        accuracies = [100 * report.metrics["eval_accuracy"] for report in reports]
        assert each == [f"{accuracy:.1f}" for accuracy in accuracies]
        assert mean == f"{sum(accuracies) / 5:.1f}"
        assert passes == f"{reports[0].passes / reports[0].num_samples:.2f}"
        assert steps == str(reports[0].totals["optimizer_steps"])


@pytest.mark.skipif("RELIABILITY" in os.environ, reason="the record is being written")
def test_the_table_of_reliability_is_that_of_the_record():
    record = reliability.read()  # an error for a key without a row
    table = reliability.render(record)
    assert len(table.split("\n")) == 2 + len(record)
    assert reliability.put_into(README, table) == README, "run `python tests/reliability.py`"


@pytest.mark.skipif("RELIABILITY" in os.environ, reason="the record is being written")
def test_every_row_of_reliability_was_tried():
    record = reliability.read()
    assert [key for key in reliability.ROWS if key not in record] == [], (
        "run `make torture` and `make reliability`"
    )
    assert all(row["tried"] >= 1 for row in record.values())
