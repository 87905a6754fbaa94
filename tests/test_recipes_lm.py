"""recipes/causal_lm.py and recipes/sft.py: in this process, and under accelerate and torchrun."""

import json
import math
import re
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
import yaml
from programs import torchrun
from test_recipes import run
from tiny import bert, llama
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction

from recipes.studies import texts

ROOT = Path(__file__).parents[1]
CONFIG = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
CONFIG |= {"num_attention_heads": 2, "max_position_embeddings": 64}
SCRATCH = ["--model_config", json.dumps(CONFIG), "--tokenizer_vocabulary", "300"]
LITTLE = ["--num_train_epochs", "2", "--per_device_train_batch_size", "8"]
LITTLE += ["--disable_tqdm", "True", "--report_to", "none"]
PRUNED = ["--pruning", "ucb", "--keep_ratio", "0.5"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions with answers like GSM8K's, and a text in one row like Tiny Shakespeare."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("questions", "text")}
    for split, n in (("train", 48), ("test", 11)):
        rows = [
            {
                "question": f"What is {i} and {i * 7 % 13}?",
                "answer": f"It is {'so ' * (i % 5)}{i + i * 7 % 13}.",
            }
            for i in range(n)
        ]
        datasets.Dataset.from_list(rows).to_parquet(
            folders["questions"] / f"{split}-00000-of-00001.parquet"
        )
        text = " ".join(f"line {i} of {i * i}" for i in range(n * 3))
        datasets.Dataset.from_dict({"text": [text]}).to_parquet(
            folders["text"] / f"{split}-00000-of-00001.parquet"
        )
    return {name: str(folder) for name, folder in folders.items()}


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def weights_of(folder, name="model"):
    return (folder / f"{name}.safetensors").read_bytes()


# ---- what is trained and measured ----------------------------------------------------------------


# peft uses the old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_causal_lm_from_scratch_resumes_and_adapts(data, recipe, tmp_path, capsys):
    """From scratch with a new tokenizer, then LoRA on the saved model. Both resume bit for bit."""
    save = ["--save_strategy", "steps", "--save_steps", "4", "--bf16", "False"]
    save += ["--learning_rate", "1e-3"]
    common = ["--dataset", data["questions"], *LITTLE, *PRUNED, *save]
    adapted = ["--model", tmp_path / "a", "--lora_rank", "2"]
    for name, model, weights in (("a", SCRATCH, "model"), ("lora", adapted, "adapter_model")):
        recipe("causal_lm", *common, *model, "--output_dir", tmp_path / name)
        assert "ucb: perplexity " in capsys.readouterr().out
        resume = ["--resume_from_checkpoint", tmp_path / name / "checkpoint-4"]
        recipe("causal_lm", *common, *model, *resume, "--output_dir", tmp_path / "b")
        assert weights_of(tmp_path / name, weights) == weights_of(tmp_path / "b", weights)
        report = report_of(tmp_path / name)
        assert report["cost_ratio"] == pytest.approx(0.5)
        assert report["num_samples"] == 48
        assert report["metrics"]["eval_perplexity"] == pytest.approx(
            math.exp(report["metrics"]["eval_token_loss"])
        )
        card = (tmp_path / name / "README.md").read_text()
        assert ("library_name: peft" in card) is (name == "lora")
        assert "type: perplexity" in card

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer("What is 3?").input_ids) == "What is 3?"
    # Loads base model and adapters, as the card says.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert any("lora" in name for name, _ in model.named_parameters())


def test_perplexity_counts_each_token_once(recipe):
    causal_lm, generator = recipe("causal_lm"), torch.Generator().manual_seed(0)
    parts, losses, exact = [], [], []
    for size, length in ((3, 7), (2, 4)):  # batches differ in size and length
        logits = torch.randn(size, length, 5, generator=generator)
        labels = torch.randint(0, 5, (size, length), generator=generator)
        labels[torch.rand(size, length, generator=generator) < 0.4] = -100
        logits[0, :-1].scatter_(1, labels[0, 1:, None].clamp(min=0), 9.0)  # all right
        parts.append(causal_lm.token_losses((logits, "more"), labels))
        exact += [
            all(row[i].argmax() == label for i, label in enumerate(ids[1:]) if label != -100)
            for row, ids in zip(logits, labels, strict=True)
        ]
        flat = F.cross_entropy(
            logits[:, :-1].reshape(-1, 5),
            labels[:, 1:].reshape(-1),
            reduction="none",
            ignore_index=-100,
        )
        losses.append(flat[labels[:, 1:].reshape(-1) != -100])
    mean = torch.cat(losses).mean().item()
    found = causal_lm.perplexity(
        EvalPrediction(predictions=torch.cat(parts).numpy(), label_ids=None)
    )
    assert found.pop("exact_match") == pytest.approx(sum(exact) / len(exact))
    assert 0 < sum(exact) < len(exact)
    assert found == pytest.approx({"token_loss": mean, "perplexity": math.exp(mean)}, rel=1e-5)


def samples(causal_lm, data, *, longest=64, **settings):
    """The samples of a split, its tokenizer and the columns."""
    arguments = causal_lm.DataArguments(dataset=data, **settings)
    train, _ = arguments.load_splits()
    tokenizer = causal_lm.make_tokenizer(
        causal_lm.RecipeArguments(from_scratch=True, tokenizer_vocabulary=300), train[0].values()
    )
    config = causal_lm.AutoConfig.for_model("llama", max_position_embeddings=longest)
    return causal_lm.make_samples(train, tokenizer, arguments, config), tokenizer, train


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("scratch", [True, False])
def test_the_attention_of_the_model(attention, scratch, recipe, tmp_path):
    for name, made in (("causal_lm", llama()), ("text_classification", bert())):
        made.save_pretrained(tmp_path / name)
        module = recipe(name)
        arguments = module.RecipeArguments(
            model=str(tmp_path / name), from_scratch=scratch, attn_implementation=attention
        )
        assert module.make_model(arguments, made.config).config._attn_implementation == attention


@pytest.mark.parametrize(("sign", "value"), [("+", int.__add__), ("-", int.__sub__)])
def test_the_sums_are_right_and_a_model_trains_on_them(sign, value, recipe, tmp_path, monkeypatch):
    given = ["texts", "sums", f"--sign={sign}", "--train", "40", "--test", "20"]
    given += ["--output", str(tmp_path / "data")]
    monkeypatch.setattr("sys.argv", given)
    texts.main()
    rows = datasets.load_dataset(str(tmp_path / "data"))
    assert {name: len(split) for name, split in rows.items()} == {"train": 40, "test": 20}
    every = [row for split in rows.values() for row in split]
    assert len({row["question"] for row in every}) == 60
    for row in every:
        numbers = map(int, row["question"].split(sign))
        assert value(*numbers) == int(row["answer"][::-1]) >= 0
    options = ["--dataset", tmp_path / "data", *SCRATCH[:2], "--tokenizer_vocabulary", "260"]
    recipe("causal_lm", *options, *LITTLE, "--output_dir", tmp_path / "out")
    assert 0 <= report_of(tmp_path / "out")["metrics"]["eval_exact_match"] <= 1


def test_a_target_in_a_mixture_is_the_reference(data, recipe, tmp_path, monkeypatch, capsys):
    sizes = {"--rows": 20, "--target": 12, "--other_rows": 30, "--characters": 40, "--test": 8}
    given = ["texts", "mixture", "--task", data["questions"], "--other", data["text"]]
    given += [*map(str, sum(sizes.items(), ())), "--output", str(tmp_path / "data")]
    monkeypatch.setattr("sys.argv", given)
    texts.main()
    rows = datasets.load_dataset(str(tmp_path / "data"))
    assert {name: len(split) for name, split in rows.items()} == {
        "train": 50,
        "target": 12,
        "test": 8,
    }
    assert sum(rows["train"]["target"]) == 20
    assert len({*rows["train"]["text"], *rows["target"]["text"]}) == 62

    common = ["--dataset", tmp_path / "data", *SCRATCH, *LITTLE]
    scored = ["--score", "reference", "--target_split", "target", "--output_dir", tmp_path / "s"]
    recipe("causal_lm", *common, *scored)
    assert "reference: 41 passes" in capsys.readouterr().out  # 2 epochs of 12, and 50 / 3
    fields = json.dumps({"scores": str(tmp_path / "s" / "scores.safetensors")})
    rule = ["--pruning", "reference-loss", "--keep_ratio", "0.5", "--pruning_kwargs", fields]
    recipe("causal_lm", *common, *rule, "--output_dir", tmp_path / "pruned")
    assert report_of(tmp_path / "pruned")["cost_ratio"] == pytest.approx(
        (50 + 12 * 2 + 50 / 3) / 100
    )
    joined = ["--train_split", "train+target", "--output_dir", tmp_path / "joined"]
    recipe("causal_lm", *common, *joined)
    assert report_of(tmp_path / "joined")["num_samples"] == 62

    monkeypatch.setattr("sys.argv", [*given, "--rows", "40"])
    with pytest.raises(SystemExit, match="2"):
        texts.main()
    assert "rows + target=52" in capsys.readouterr().err


def test_samples(data, recipe):
    causal_lm = recipe("causal_lm")
    made, tokenizer, train = samples(causal_lm, data["questions"])
    for row, source in zip(made, train, strict=True):
        kept = [i for i in row["labels"] if i != -100]
        assert (
            tokenizer.decode(row["input_ids"])
            == f"{source['question']}\n{source['answer']}{tokenizer.eos_token}"
        )
        assert tokenizer.decode(kept) == f"{source['answer']}{tokenizer.eos_token}"
    everything, _, _ = samples(causal_lm, data["questions"], answer_only=False)
    assert all(row["labels"] == row["input_ids"] for row in everything)
    cut, _, _ = samples(causal_lm, data["questions"], max_length=8)
    assert max(len(row["input_ids"]) for row in cut) == 8
    assert len(cut) < len(train)  # the answers of long questions are cut off
    assert all(any(label != -100 for label in row["labels"][1:]) for row in cut)
    short, _, _ = samples(causal_lm, data["questions"], longest=20)
    assert max(len(row["input_ids"]) for row in short) == 20

    blocks, tokenizer, train = samples(causal_lm, data["text"], block_size=16)
    assert {len(row["input_ids"]) for row in blocks.select(range(len(blocks) - 1))} == {16}
    joined = [token for row in blocks for token in row["input_ids"]]
    assert tokenizer.decode(joined) == train[0]["text"] + tokenizer.eos_token  # nothing is lost
    assert all(row["labels"] == row["input_ids"] for row in blocks)


def test_blocks_are_held_out_of_a_text_in_one_row(data, recipe):
    causal_lm = recipe("causal_lm")
    model = causal_lm.RecipeArguments(model_config=CONFIG, tokenizer_vocabulary=300)

    def load(**share):
        return causal_lm.load_samples(
            causal_lm.DataArguments(dataset=data["text"], block_size=16, **share), model
        )

    whole, test, tokenizer, _ = load()
    assert (
        tokenizer.decode(test[0]["input_ids"])
        in datasets.load_dataset(data["text"], split="test")[0]["text"]
    )
    train, held_out, _, _ = load(validation_share=0.25)
    assert len(held_out) == round(len(whole) / 4)
    assert sorted(train["input_ids"][:] + held_out["input_ids"][:]) == sorted(whole["input_ids"][:])


# ---- launchers -----------------------------------------------------------------------------------


def test_causal_lm_under_accelerate_launch_and_from_yaml(data, tmp_path):
    settings = {
        "dataset": data["text"],
        "block_size": 16,
        "tokenizer_vocabulary": 300,
        "model_config": CONFIG,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "pruning": "infobatch",
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    out = run(
        *launcher, "recipes/causal_lm.py", str(tmp_path / "run.yaml"), "--learning_rate", "1e-2"
    )
    assert "infobatch: perplexity " in out
    assert report_of(tmp_path / "out")["totals"]["optimizer_steps"] == 4


def test_two_ranks_measure_what_one_does(data, recipe, tmp_path):
    options = ["--dataset", data["questions"], *SCRATCH, *LITTLE, *PRUNED]
    options += ["--learning_rate", "0", "--bf16", "False"]
    two = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "3"]
    two += ["--ddp_find_unused_parameters", "False", "--output_dir", tmp_path / "two"]
    done = torchrun(ROOT / "recipes/causal_lm.py", *options, *two, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    recipe("causal_lm", *options, "--output_dir", tmp_path / "one")
    one, both = report_of(tmp_path / "one"), report_of(tmp_path / "two")
    assert both["environment"]["ranks"] == 2
    assert both["metrics"]["eval_perplexity"] == pytest.approx(
        one["metrics"]["eval_perplexity"], rel=1e-5
    )
    assert both["epochs"][1]["scores"] == pytest.approx(one["epochs"][1]["scores"], rel=1e-4)
    assert both["passes"] == one["passes"]


# ---- mistakes, configurations --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "text", *SCRATCH], "1 rows.* --block_size 128"),
        (["--dataset", "text", *SCRATCH, "--block_size", "128"], "block_size=128 .* 64 tokens"),
        (["--dataset", "questions", *SCRATCH, "--block_size", "1"], "block_size=1 "),
        (
            ["--dataset", "text", *SCRATCH, "--validation_share", "0.1", "--eval_split", "test"],
            r"eval_split='test' and validation_share=0\.1",
        ),
        (["--dataset", "questions", *SCRATCH, "--lora_rank", "8"], "lora_rank=8"),
        (
            ["--dataset", "questions", *SCRATCH, "--prompt_column", "query"],
            "'query'.*prompt_column=",
        ),
        (["--dataset", "questions", "--tokenizer_vocabulary", "300"], "tokenizer_vocabulary=300"),
        (["--dataset", "questions", "--model_config", "{"], "model_config='{'"),
        (["--dataset", "questions", *SCRATCH, "--output_dir", "used"], r"/used .*\(report\.json\)"),
    ],
)
def test_mistakes_end_the_program_before_the_training(
    options, message, data, recipe, tmp_path, capsys
):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "report.json").write_text("{}")
    places = {**data, "used": str(tmp_path / "used")}
    options = [
        "--output_dir",
        str(tmp_path / "new"),
        *(places.get(option, option) for option in options),
    ]
    with pytest.raises(SystemExit) as ended:
        recipe("causal_lm", *options)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


@pytest.mark.parametrize("recipe", ["causal_lm", "sft"])
def test_the_configurations_differ_only_in_the_pruning(recipe):
    full, pruned = (
        yaml.safe_load((ROOT / f"recipes/configs/{recipe}_{name}.yaml").read_text())
        for name in ("full", "pruned")
    )
    different = {name for name in full | pruned if full.get(name) != pruned.get(name)}
    assert different == {"pruning", "keep_ratio", "output_dir"}


# ---- recipes/sft.py ------------------------------------------------------------------------------


@pytest.fixture
def base(data, recipe, tmp_path):
    """The folder of a model and its tokenizer."""
    llama(vocab_size=300, max_position_embeddings=64, eos_token_id=0).save_pretrained(
        tmp_path / "base"
    )
    _, tokenizer, _ = samples(recipe("causal_lm"), data["questions"])
    tokenizer.save_pretrained(tmp_path / "base")
    return ["--dataset", data["questions"], "--model_name_or_path", tmp_path / "base", *LITTLE]


# trl and peft use the old names.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing`:FutureWarning")
def test_sft(base, recipe, tmp_path, capsys):
    lora = ["--use_peft", "True", "--lora_target_modules", "all-linear", "--lora_r", "2"]
    recipe("sft", *base, *PRUNED, *lora, "--output_dir", tmp_path / "out")
    assert "ucb: mean_token_accuracy " in capsys.readouterr().out
    report = report_of(tmp_path / "out")
    assert report["cost_ratio"] == pytest.approx(0.5)
    assert report["num_samples"] == 48
    assert weights_of(tmp_path / "out", "adapter_model")


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing`:FutureWarning")
def test_sft_without_padding(base, recipe, tmp_path):
    """An example is a sample without padding; packed, a row is."""
    packed = ["--padding_free", "False", "--packing", "True", "--max_length", "128"]
    shares = {"full": 1.0, "pruned": 0.5}
    for name, more in (("full", []), ("pruned", []), ("pruned", packed)):
        config, folder = ROOT / f"recipes/configs/sft_{name}.yaml", tmp_path / f"{name}{len(more)}"
        recipe("sft", config, *base, *more, "--output_dir", folder)
        report = report_of(folder)
        n = report["num_samples"]
        assert (n < 48) == bool(more)
        assert report["cost_ratio"] == pytest.approx(round(shares[name] * n) / n)
