"""The recipes run as a person runs them: as programs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, cwd=ROOT):
    """Runs Python; what fails shows its output. The package is this folder's, installed or not."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quickstart(tmp_path):
    for module in ("timm", "sklearn", "matplotlib"):
        pytest.importorskip(module)
    table = run(ROOT / "recipes/quickstart.py", "--output_dir", tmp_path, "--epochs", 2, "--keep_ratio", 0.4)
    for name in ("full run", "short run", "pruned run"):
        assert re.search(rf"^{name} .*%$", table, flags=re.MULTILINE)

    reports = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("report", "full", "short")}
    assert reports["report"]["policy"]["name"] == "ucb"
    assert reports["report"]["cost_ratio"] == pytest.approx(0.4, abs=0.01)
    assert reports["full"]["cost_ratio"] == 1
    assert reports["short"]["passes"] == pytest.approx(reports["report"]["passes"], rel=0.05)
    assert all(epoch["metrics"]["eval_accuracy"] >= 0 for report in reports.values() for epoch in report["epochs"])
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG\r\n")

    card = (tmp_path / "README.md").read_text()
    assert "UCB(keep_ratio=0.4)" in card
    # The card's own words load the model; then it classifies an image.
    load = re.search(r"```python\n(import hf_dynprune.vision.*?)```", card, flags=re.DOTALL)[1]
    assert "AutoModelForImageClassification" in load
    use = "import torch; print(model(torch.zeros(1, 1, 8, 8)).logits.shape)"
    assert run("-c", load + use, cwd=tmp_path) == "torch.Size([1, 10])\n"
