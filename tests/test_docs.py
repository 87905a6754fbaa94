"""README and docs: programs run, commands parse, links lead somewhere, numbers are those of files.

Programs are the ```python blocks. Those of a page run one after the other in one scope, which the
context of the page fills first. Commands are the lines of the ```bash blocks. The parser of each
program is asked for its options. Commands that only read reports are run.
"""

import ast
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout, suppress
from dataclasses import fields
from functools import cache
from pathlib import Path

import datasets
import fragments
import notebooks
import pytest
import reliability
import speed
import studies
import tiny
import torch
from tiny import arguments, images, vit

import hf_dynprune
from hf_dynprune.cli import main
from hf_dynprune.policies import POLICIES, PruningPolicy
from hf_dynprune.potential import Magnitude
from hf_dynprune.report import PruningReport
from recipes.studies.plan import Setting
from recipes.studies.summarise import chosen_settings, summarise

ROOT = Path(__file__).parents[1]
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in fragments.PAGES}
# Pages that are not part of the site. Their commands and links are checked, too.
BESIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "CODE_OF_CONDUCT.md",
    "SECURITY.md",
    "recipes/results/README.md",
    "model_cards/README.md",
)
EVERY = PAGES | {name: (ROOT / name).read_text() for name in BESIDE} | notebooks.texts()


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


# ---- programs ------------------------------------------------------------------------------------


def many_images(folder):
    """Images, a model and arguments: what most programs are given."""
    return {
        "model": vit(),
        "model_init": lambda: vit(),
        "args": arguments(folder),
        "arguments": lambda folder, **settings: arguments(folder, **settings),
        "train": images(),
        "test": images(8),
    }


def trained(folder):
    """A trainer that has trained."""
    run = tiny.trainer(folder / "run", pruning=hf_dynprune.UCB(keep_ratio=0.5))
    run.train()
    return {"trainer": run, **many_images(folder)}


class Contrastive(torch.nn.Module):
    """A model with one loss for the whole batch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x, labels=None):
        embedded = self.layer(x)
        similarities = embedded @ embedded.T
        return {"loss": torch.nn.functional.cross_entropy(similarities, torch.arange(len(x)))}


class MaskedLlama(tiny.transformers.LlamaForCausalLM):
    """A model that takes the column `loss_mask` and ignores it."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, loss_mask=None):
        return super().forward(input_ids, attention_mask, labels=labels)


def losses(folder):
    """Data for the losses that are not the model's own."""
    generator = torch.Generator().manual_seed(0)
    points = {"x": torch.randn(40, 4, generator=generator).tolist(), "labels": [0, 1, 2, 1] * 10}
    texts = tiny.texts("causal LM", 30, padded=True)
    masks = [[0, 1] * 6 for _ in range(len(texts))]
    pixels = images()["pixel_values"]
    return many_images(folder) | {
        "points": datasets.Dataset.from_dict(points).with_format("torch"),
        "contrastive_model": Contrastive(),
        "language_model": MaskedLlama(tiny.llama().config),
        "masked_texts": texts.add_column("loss_mask", masks).with_format("torch"),
        "images_with_masks": [
            {"pixel_values": each, "mask": (each.sum(0) > 0).long()} for each in pixels
        ],
    }


def a_loop(folder):
    """A model, an optimizer and data for a loop."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, 4, generator=generator)
    model = torch.nn.Linear(4, 2)
    return {
        "dataset": [{"x": row, "y": i % 2} for i, row in enumerate(rows)],
        "train": [{"image": row, "label": i % 2} for i, row in enumerate(rows)],
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": torch.nn.CrossEntropyLoss(reduction="none"),
        "num_epochs": 8,
    }


def language(folder):
    """A tiny language model, its tokenizer, and texts."""
    from test_sft import pairs, tokenizer
    from trl import SFTConfig

    return {
        "sft_config": SFTConfig(str(folder), num_train_epochs=2, use_cpu=True, bf16=False),
        "language_model": tiny.llama(),
        "args": arguments(folder),
        "tokenized": tiny.texts("causal LM"),
        "tokenizer": tokenizer(),
        "prompts_with_completions": pairs(),
    }


def preferred(folder):
    """Tiny models, and arguments and rows for the trainers of other libraries."""
    from library_trainers import CASES, SETTINGS, cross, pairs, rows, sentences, texts

    def settings(name):
        case = CASES[name]
        return case.arguments(str(folder), **{**SETTINGS, **case.settings})

    return {
        "dpo_config": settings("dpo"),
        "reward_config": settings("reward"),
        "kto_config": settings("kto"),
        "orpo_config": settings("orpo"),
        "sentence_arguments": settings("sentences"),
        "cross_encoder_arguments": settings("cross-encoder"),
        "language_model": tiny.llama(),
        "reference_model": tiny.llama(),
        "reward_model": tiny.llama("SequenceClassification", num_labels=1),
        "sentence_model": sentences(),
        "cross_encoder": cross(),
        "tokenizer": language(folder)["tokenizer"],
        "pairs": pairs(),
        "labelled": rows(prompt=(2, 4), completion=(1, 7), label=lambda i: i % 3 > 0),
        "similar_texts": texts(),
    }


def reinforced(folder):
    """A tiny language model, prompts, and a reward function."""
    import test_grpo

    run = test_grpo.trainer(folder, max_steps=3)
    return {
        "model": run.model,
        "reward_function": test_grpo.by_tokens,
        "args": run.args,
        "prompts": test_grpo.prompts(),
        "tokenizer": test_grpo.tokenizer(),
    }


def on_the_hub(folder):
    """A trained trainer, a trained timm trainer, and the reports of more runs."""
    from test_hub import timm_trainer

    scope = trained(folder) | {"PruningReport": PruningReport}
    scope["timm_trainer"] = timm_trainer(folder / "timm")
    scope["timm_trainer"].train()
    full, pruned = hf_dynprune.FullData(), scope["trainer"].pruning
    for name, policy, settings in (
        ("full", full, {}),
        ("short", full, {"num_train_epochs": 2}),
        ("ucb_1", pruned, {"seed": 1}),
        ("ucb_2", pruned, {"seed": 2}),
    ):
        run = tiny.trainer(folder / name, pruning=policy, **settings)
        run.train()
        run.pruning_report.save(folder / "runs" / name / "report.json")
    return scope


def with_options(folder):
    command_line = ["--pruning", "ucb", "--keep_ratio", "0.3", "--output_dir", str(folder)]
    more = {"command_line": command_line, "train_without_augmentation": images()}
    return many_images(folder) | more


def stored(folder):
    """A dataset."""
    return {"data": datasets.Dataset.from_dict({"value": list(range(50))})}


CONTEXTS = {
    "README.md": many_images,
    "docs/get_started.md": many_images,
    "docs/trainer.md": with_options,
    "docs/loss.md": losses,
    "docs/loop.md": a_loop,
    "docs/pays.md": a_loop,
    "docs/choose.md": many_images,
    "docs/text.md": language,
    "docs/preference.md": preferred,
    "docs/rl.md": reinforced,
    "docs/report.md": trained,
    "docs/hub.md": on_the_hub,
    "docs/scores.md": many_images,
    "docs/policy.md": many_images,
    "docs/infobatch.md": a_loop,
    "docs/speed.md": stored,
    "model_cards/README.md": on_the_hub,
}
ON_THE_HUB = ("docs/hub.md", "model_cards/README.md")


def run_programs(name, given):
    """Run the programs of a page in the current folder; return their scope.

    Args:
        given: What they are given, see `CONTEXTS`.
    """
    scope = {"__name__": "docs", **given}
    for number, text in enumerate(blocks(EVERY[name], "python"), 1):
        exec(compile(text, f"{name}, program {number}", "exec"), scope)
    return scope


def test_every_page_with_programs_has_a_context():
    assert {name for name, text in EVERY.items() if blocks(text, "python")} == CONTEXTS.keys()


# What trl and torch warn of with their own defaults.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("name", [name for name in CONTEXTS if name not in ON_THE_HUB])
def test_the_programs_of_a_page_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = run_programs(name, CONTEXTS[name](tmp_path))
    EXPECTED.get(name, lambda scope: None)(scope)


def of_the_readme(scope):
    assert PruningReport.load("report.json").cost_ratio == pytest.approx(0.3)


def of_get_started(scope):
    assert scope["pruned"].passes == pytest.approx(scope["short"].passes, rel=0.02)


def of_the_guide(scope):
    assert scope["policy"] == hf_dynprune.LossProportional(keep_ratio=0.3)
    assert scope["again"].state.global_step == scope["again"].state.max_steps
    assert scope["trainer"].pruning_report.totals["scoring_passes"] > 0


def of_losses(scope):
    assert scope["rule"].name == "masked_tokens"


def of_the_loop(scope):
    assert scope["pruner"].report.cost_ratio == pytest.approx(0.3, abs=0.01)
    assert scope["resumed"].report.cost_ratio == pytest.approx(0.3, abs=0.01)


def of_scores(scope):
    assert scope["trainer"].pruning_report.cost_ratio > 0.5  # charged with the scores


def of_speed(scope):
    """The rows lie in the file in another order, and are read without a list of indices."""
    found = datasets.load_from_disk("shuffled")
    assert found._indices is None
    assert sorted(found["value"]) == scope["data"]["value"] != list(found["value"])


def of_infobatch(scope):
    epochs = scope["pruner"].report.epochs
    assert [epoch.full_data for epoch in epochs] == [False] * 7 + [True]  # the last eighth
    assert all(128 < epoch.samples < 256 for epoch in epochs[1:7])


EXPECTED = {
    "README.md": of_the_readme,
    "docs/get_started.md": of_get_started,
    "docs/trainer.md": of_the_guide,
    "docs/loss.md": of_losses,
    "docs/loop.md": of_the_loop,
    "docs/scores.md": of_scores,
    "docs/infobatch.md": of_infobatch,
    "docs/speed.md": of_speed,
}


def run_programs_that_push(folder):
    """Run the programs of `ON_THE_HUB` in an empty folder.

    test_hub.py calls it in its child process, because huggingface_hub reads its settings when it
    is imported.
    """
    os.chdir(folder)
    given = on_the_hub(folder)
    for name in ON_THE_HUB:
        assert CONTEXTS[name] is on_the_hub
        run_programs(name, given)


def test_the_change_of_a_program_runs_before_and_after(tmp_path):
    (diff,) = blocks(PAGES["docs/get_started.md"], "diff")
    for sign in "-+":
        lines = [line[1:] for line in diff.splitlines() if line[:1] in (sign, " ")]
        exec("\n".join(lines), many_images(tmp_path))


# ---- commands ------------------------------------------------------------------------------------


def commands():
    """The commands of all pages, each as a list of words."""
    for name, text in EVERY.items():
        for block in blocks(text, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield pytest.param(words, id=f"{name}: {' '.join(words)[:60]}")


@cache
def help_of(*program):
    """What a program prints for --help."""
    out = io.StringIO()
    with redirect_stdout(out), suppress(SystemExit):
        if program[0] == "hf-dynprune":
            main([*program[1:], "--help"])
        else:
            before, sys.argv, path = sys.argv, [program[0], "--help"], list(sys.path)
            sys.path.insert(0, str(ROOT / "recipes"))
            try:
                runpy.run_path(str(ROOT / program[0]), run_name="__main__")
            finally:
                sys.argv, sys.path[:] = before, path
    return out.getvalue()


def options_of(*program):
    return set(re.findall(r"--(\w+)", help_of(*program)))


def given(words):
    return {word[2:].partition("=")[0] for word in words if re.match(r"--\w", word)}


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_is_one_that_the_program_takes(words):
    program = words[0]
    if program == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.findall(r"\[(\w+)\]", " ".join(words))
        assert set(extras) <= project["optional-dependencies"].keys()
    elif program == "hf-dynprune":
        depth = 3 if words[1] == "plot" else 2
        assert given(words) <= options_of(*words[:depth])
    else:
        assert program in ("python", "accelerate", "torchrun")
        place = next(i for i, word in enumerate(words) if word.startswith(("recipes/", "tests/")))
        file, rest = words[place], words[place + 1 :]
        assert (ROOT / file).is_file()
        if "--" in rest:  # of compare.py: the recipe and its options follow
            split = rest.index("--")
            rest, (recipe, *of_recipe) = rest[:split], rest[split + 1 :]
            assert given(of_recipe) <= options_of(recipe)
        if given(rest):
            assert given(rest) <= options_of(file)
        for word in rest:
            if word.startswith("recipes/"):
                assert (ROOT / word).exists(), word


def leave_a_run(folder, policy, epochs=3, samples=12):
    """Run a loop without a model. Leave the files that a recipe leaves."""
    shape = hf_dynprune.RunShape(samples, 4, num_epochs=epochs)
    pruner = hf_dynprune.DynamicPruner(policy, shape, magnitude=Magnitude("loss"))
    for epoch in range(epochs):
        pruner.begin_epoch(epoch)
        for index in torch.tensor(list(pruner.sampler)).split(4):
            pruner.observe(index, {"loss": index.float() + 1})
        pruner.add_evaluation({"eval_accuracy": 0.5 + epoch / 10})
    pruner.end_epoch()
    pruner.report.save(folder / "report.json")
    pruner.table.save(folder / "table.safetensors")


def test_commands_that_read_reports_run(tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    leave_a_run(Path("runs/full"), hf_dynprune.FullData())
    leave_a_run(Path("runs/short"), hf_dynprune.FullData(), epochs=2)
    leave_a_run(Path("runs/random"), hf_dynprune.RandomPruning(keep_ratio=0.5))
    leave_a_run(Path("runs/pruned"), hf_dynprune.UCB(keep_ratio=0.5))
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    pictures = [Image.new("RGB", (4, 4), (i, i, i)) for i in range(12)]
    rows = {"img": pictures, "label": [0, 1] * 6}
    Path("data").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet("data/train-00000-of-00001.parquet")
    ran = []
    for block in blocks(PAGES["docs/report.md"], "bash"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            local = ["data" if word == "uoft-cs/cifar10" else word for word in words]
            assert main(local[1:]) == 0, line
            ran.append(words[1:3])
    assert {"report", "plot", "card"} == {words[0] for words in ran}
    capsys.readouterr()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_rendered_as_it_is_meant(name):
    # A comment that begins a line ends the paragraph, and a line break in the text that stands for
    # a picture joins two words.
    assert re.findall(r"^ *<!-- value.*", PAGES[name], re.MULTILINE) == []
    assert [text for text in re.findall(r"!\[([^\]]*)\]", PAGES[name]) if "\n" in text] == []


# ---- links and names -----------------------------------------------------------------------------


@cache
def anchors(path):
    """The anchors of the headings of a page, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("name", EVERY)
def test_links_lead_somewhere(name):
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", EVERY[name]):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = folder / file if file else ROOT / name
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


@pytest.mark.parametrize("name", EVERY)
def test_files_that_a_page_names_exist(name):
    named = re.findall(r"`((?:recipes|model_cards|tests|docs|hf_dynprune)/[\w/.-]+)`", EVERY[name])
    for path in named:
        if path != "docs/_build/index.html":
            assert (ROOT / path).exists(), path


def test_every_policy_has_its_row():
    rows = re.findall(r"^\| `(\w+)\(.*?\)` \| `([\w-]+)` \|", PAGES["docs/choose.md"], re.MULTILINE)
    assert {name: cls for cls, name in rows} == {
        name: cls.__name__ for name, cls in POLICIES.items()
    }


def test_every_setting_of_all_policies_has_its_row():
    rows = re.findall(r"^\| `(\w+)=(.*?)` \|", PAGES["docs/choose.md"], re.MULTILINE)
    settings = {entry.name: entry.default for entry in fields(PruningPolicy)}
    assert {name: ast.literal_eval(value) for name, value in rows} == settings


def test_every_field_of_the_report_is_explained():
    explained = re.findall(r"^\| (`.*?) \|", PAGES["docs/report.md"], re.MULTILINE)
    names = {name for cell in explained for name in re.findall(r"`(\w+)`", cell)}
    assert PruningReport({"name": "full"}, 1, 0, 0).to_dict().keys() <= names


def test_every_paper_of_a_policy_is_listed():
    page = PAGES["docs/papers.md"]
    cited = " ".join((cls.__doc__ or "").partition("Paper")[2] for cls in POLICIES.values())
    for identifier in re.findall(r"\d{4}\.\d{5}", cited):
        assert identifier in page, identifier
    for call, cls in re.findall(r"`((\w+)\.paper_like\(.*?\))`", page):
        assert eval(call, {cls: getattr(hf_dynprune, cls)})


# ---- numbers -------------------------------------------------------------------------------------

BEING_WRITTEN = "RELIABILITY" in os.environ


@pytest.mark.parametrize("name", PAGES)
def test_tables_and_numbers_are_those_of_the_files(name):
    tables = dict(fragments.TABLES)
    if BEING_WRITTEN:
        del tables["reliability"]
    assert fragments.rendered(PAGES[name], tables) == PAGES[name], "run `python tests/fragments.py`"


def test_every_table_of_a_study_is_on_a_page():
    assert {*studies.TITLES, studies.SETTINGS} == {
        folder.name for folder in studies.STUDIES.iterdir() if folder.is_dir()
    }
    for file in studies.STUDIES.glob("*/*.md"):
        assert f"<!-- study {file.parent.name} {file.stem} -->" in PAGES["docs/results.md"], file


@pytest.mark.parametrize("name", sorted({*studies.TITLES, studies.SETTINGS}))
def test_the_summary_of_a_study_is_that_of_its_reports(name, tmp_path, monkeypatch):
    """Pictures are made; those of one study are also rendered, which takes ten times as long."""
    folder = studies.STUDIES / name
    if name != "cifar10_resnet8":  # it has all kinds of pictures
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **how: path.touch())
    for path in (folder / "study.json", *folder.glob("*/run.json"), *folder.glob("*/report.json")):
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    summarise(tmp_path)
    pictures = {path.name for path in folder.glob("*.png")}
    assert {path.name for path in tmp_path.glob("*.png")} == pictures
    for made in filter(Path.is_file, tmp_path.iterdir()):
        there = folder / made.name
        assert there.exists()
        if made.suffix != ".png":
            again = f"run `python recipes/compare.py --output_dir {folder}`"
            assert made.read_text() == there.read_text(), again


FIRST = ("random", "loss-proportional")  # the first rule of each study, of which one is tuned


@pytest.mark.parametrize("name", studies.TUNED)
def test_a_study_is_at_equal_cost_and_its_learning_rates_were_tuned(name):
    summary = studies.summary(name)
    chosen = chosen_settings(studies.STUDIES / name)
    tuned = {}  # at the batch size that was chosen
    for row in summary["tuning"]:
        key = row["name"], row["cost"]
        if row.get("batch_size") == chosen[key].batch:
            tuned[key] = row
    tune_first = any("--tune first" in command for command in summary["commands"])
    used = {}
    for run, _ in studies.runs(name):
        if run["rate"] is None:
            options = dict(word[2:].split("=", 1) for word in run["command"] if "=" in word)
            rate, batch = (options.get(o) for o in ("learning_rate", "per_device_train_batch_size"))
            if f"per_device_train_batch_size {batch}" in run["name"]:
                batch = None  # it is the method's own, and was not tuned
            setting = Setting(float(rate), None if batch is None else int(batch))
            used.setdefault((run["name"], run["cost"]), set()).add(setting)
    for row in summary["rows"]:
        key = row["name"], row["wanted"]
        # Static pruning by scores uses the rate of the first rule, the only one that --tune first
        # tunes for all rules.
        by_scores = row["name"].endswith((", scores charged", ", scores given"))
        not_tuned = tune_first and key not in tuned and row["name"] not in ("full run", "short run")
        source = key
        if by_scores or not_tuned:
            source = next((rule, key[1]) for rule in FIRST if (rule, key[1]) in tuned)
        tuning = tuned[source]
        assert used[key] == {Setting(tuning["chosen"], tuning.get("batch_size"))}
        assert len(tuning["means"]) >= 3
        assert not tuning["edge"], f"{row['name']}: the best of {tuning['means']} is at their end"
        if row["ranked"]:
            assert row["cost"] == pytest.approx(row["wanted"], rel=0.02)
            assert row["seeds"] >= 3


DETAILS = (studies.SETTINGS, studies.NOISE, "cifar100_16px", "cifar10_resnet20_16px")


@pytest.mark.parametrize("name", DETAILS)
def test_a_study_of_details_is_at_equal_cost_and_at_learning_rates_that_were_tuned(name):
    rates = chosen_settings(studies.STUDIES / "cifar10_resnet8")
    for run, _ in studies.runs(name):
        options = dict(word[2:].split("=", 1) for word in run["command"] if "=" in word)
        if "learning_rate" not in run["name"]:
            rate = rates.get((run["name"].partition(" (")[0], run["cost"]), rates["random", 0.3])
            assert float(options["learning_rate"]) == rate.rate
        # Settings are compared on held-out data.
        assert ("--validation_share" in run["command"]) == (name == studies.SETTINGS)
    for row in studies.summary(name)["rows"]:
        assert row["cost"] == pytest.approx(row["wanted"], rel=0.02)
        assert row["seeds"] == (3 if name in (studies.NOISE, "cifar100_16px") else 1)


def test_every_setting_that_was_tried_is_in_the_table():
    varied = {
        pattern.format(value)
        for _, _, pattern, values in studies.VARIED
        for value in values.split()
        if "*" not in value
    }
    assert varied == {name for name in studies.rows_at(studies.SETTINGS, 0.3) if "(" in name}


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
        # `score` and `advise` list all arguments of the Trainer.
        slow = "score" in row["what"] or "advise" in row["what"]
        assert row.get("beyond", 0) < (1 if slow else 0.5), row["what"]


def test_the_predictions_of_advise_are_as_good_as_promised():
    assert float(fragments.value("advice; worst")) < 15


def test_the_numbers_of_the_quickstart_are_those_of_its_reports():
    table = ast.get_docstring(ast.parse((ROOT / "recipes" / "quickstart.py").read_text()))
    for run, file in (("full", "full"), ("short", "short"), ("pruned", "report")):
        (numbers,) = re.findall(rf"^ *{run} run +([\d. ]+)$", table, re.MULTILINE)
        passes, steps, mean, *each = numbers.split()
        reports = [
            PruningReport.load(ROOT / f"recipes/results/quickstart/seed_{seed}/{file}.json")
            for seed in range(5)
        ]
        accuracies = [100 * report.metrics["eval_accuracy"] for report in reports]
        assert each == [f"{accuracy:.1f}" for accuracy in accuracies]
        assert mean == f"{sum(accuracies) / 5:.1f}"
        assert passes == f"{reports[0].passes / reports[0].num_samples:.2f}"
        assert steps == str(reports[0].totals["optimizer_steps"])


@pytest.mark.skipif(BEING_WRITTEN, reason="the record is being written")
def test_every_row_of_reliability_was_tried():
    record = reliability.read()
    missing = [key for key in reliability.ROWS if key not in record]
    assert missing == [], "run `make torture` and `make reliability`"
    assert all(row["tried"] >= 1 for row in record.values())
