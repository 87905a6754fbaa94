"""recipes/dpo.py: pairs of questions and answers, a run from YAML, a resumed one with LoRA."""

import re
from pathlib import Path

import datasets
import pytest
import yaml
from test_recipes_lm import PRUNED, ROOT, base, data, report_of, weights_of

# trl and peft use the old names.
pytestmark = pytest.mark.filterwarnings("ignore:`\\w*gradient_checkpointing\\w*`:FutureWarning")

__all__ = ["base", "data"]  # fixtures


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("48 + 24 = <<48+24=72>>72 clips.\n#### 72", "72"),
        ("He paid $1,250 in all.\n#### 1,250", "1,250"),
        ("Each has 3.50 left, of 13.50 and 3.", None),
        ("0", "0"),
    ],
)
def test_a_wrong_answer_has_another_result_wherever_it_stands(answer, right, recipe):
    dpo = recipe("dpo")
    right = right or "3"
    seen = set()
    for seed in range(20):
        wrong = dpo.wrong_answer(answer, seed)
        numbers, others = (re.findall(dpo.NUMBER, text) for text in (answer, wrong))
        assert len(numbers) == len(others)
        changed = {b for a, b in zip(numbers, others, strict=True) if a == right}
        assert len(changed) == 1
        (result,) = changed
        assert result != right
        assert ("," in right) == ("," in result)
        value, found = (int(text.replace(",", "")) for text in (right, result))
        assert found >= 0
        assert abs(found - value) <= max(9, value // 10)
        rest = zip(numbers, others, strict=True)
        assert all(a == b for a, b in rest if a != right)
        seen.add(result)
    assert len(seen) > 5
    assert dpo.wrong_answer(answer, 7) == dpo.wrong_answer(answer, 7)


def test_pairs(recipe):
    dpo = recipe("dpo")
    rows = [{"question": f"{i}?", "answer": f"#### {i}" if i % 3 else "none"} for i in range(9)]
    made = dpo.pairs(datasets.Dataset.from_list(rows))
    assert made["prompt"][:] == [f"{i}?\n" for i in range(9) if i % 3]
    assert all(a != b for a, b in zip(made["chosen"][:], made["rejected"][:], strict=True))
    given = datasets.Dataset.from_list([{"chosen": "a", "rejected": "b"}])
    assert dpo.pairs(given) is given
    with pytest.raises(ValueError, match="3 answers"):
        dpo.pairs(datasets.Dataset.from_list([rows[0]] * 3))


def test_dpo_from_yaml_without_a_reference_in_memory(base, recipe, tmp_path, capsys):
    config = ROOT / "recipes/configs/dpo_pruned.yaml"
    recipe("dpo", config, *base, "--output_dir", tmp_path / "out")
    assert "loss-proportional: rewards/accuracies " in capsys.readouterr().out
    report = report_of(tmp_path / "out")
    assert report["cost_ratio"] == pytest.approx(0.5)
    assert report["num_samples"] == 48
    assert 0 <= report["metrics"]["eval_rewards/accuracies"] <= 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from hf_dynprune.preference import DynamicPruningDPOTrainer" in card


def test_dpo_with_lora_resumes(base, recipe, tmp_path):
    lora = ["--use_peft", "True", "--lora_target_modules", "all-linear", "--lora_r", "2"]
    save = ["--save_strategy", "steps", "--save_steps", "4", "--bf16", "False"]
    common = [*base, *PRUNED, *lora, *save, "--eval_strategy", "no"]
    recipe("dpo", *common, "--output_dir", tmp_path / "a")
    resume = ["--resume_from_checkpoint", tmp_path / "a" / "checkpoint-4"]
    recipe("dpo", *common, *resume, "--output_dir", tmp_path / "b")
    assert weights_of(tmp_path / "a", "adapter_model") == weights_of(
        tmp_path / "b", "adapter_model"
    )


def test_answers_without_numbers_end_the_program(base, recipe, tmp_path, capsys):
    rows = [{"question": "Who?", "answer": "I."}] * 4
    folder = Path(tmp_path / "words")
    folder.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    with pytest.raises(SystemExit) as ended:
        recipe("dpo", *base, "--dataset", folder, "--output_dir", tmp_path / "out")
    assert ended.value.code == 2
    assert "4 answers" in capsys.readouterr().err


def test_the_configurations_differ_only_in_the_pruning():
    full, pruned = (
        yaml.safe_load((ROOT / f"recipes/configs/dpo_{name}.yaml").read_text())
        for name in ("full", "pruned")
    )
    different = {name for name in full | pruned if full.get(name) != pruned.get(name)}
    assert different == {"pruning", "keep_ratio", "output_dir"}
