"""Trainings on a GPU, as far as one process can show them; each is run on the CPU, too.

`make gpu` runs the tests marked `gpu` on a machine with a GPU (recipes/benchmarks/gpu.py).
"""

import pytest
import torch
from tiny import Shares, images, learning_rates, recorded, tiny_models, trainer, vit
from transformers import Trainer

from hf_dynprune import UCB, FullData

# Several visible GPUs would make the Trainer use nn.DataParallel.
GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs one visible GPU"),
    ],
)
on_each_device = pytest.mark.parametrize("device", ["cpu", GPU])
CHOOSES = UCB(0.5, first=1)


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Convolutions of a GPU compute in float32, as the CPU's do."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def made(folder, device, **settings):
    """A trainer on the device, and the list to which it adds the samples of each batch."""
    run = trainer(folder, use_cpu=device == "cpu", **{"pruning": CHOOSES, **settings})
    assert run.args.device.type == device
    return run, recorded(run)


def losses(run):
    return torch.tensor([entry["loss"] for entry in run.state.log_history if "loss" in entry])


@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "bf16"), *(pytest.param("cuda", p, marks=GPU.marks) for p in ("bf16", "fp16"))],
)
def test_half_precision_trains_the_same_samples(device, precision, tmp_path):
    # The choices of this policy do not follow from the scores, which differ by rounding.
    # The loss scaler skips its first steps: the learning rate is low, so they change little.
    settings = {"pruning": Shares(), "learning_rate": 1e-3}
    whole, expected = made(tmp_path, device, **settings)
    half, batches = made(tmp_path, device, **settings, **{precision: True})
    for run in (whole, half):
        run.train()
    assert (half.accelerator.scaler is not None) == (precision == "fp16")
    assert batches == expected
    scores = half.pruner.table["mean"]
    assert scores.isfinite().all()
    assert not torch.equal(scores, whole.pruner.table["mean"])
    torch.testing.assert_close(scores, whole.pruner.table["mean"], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("device", [GPU])
def test_full_data_in_fp16_is_the_stock_run(device, tmp_path):
    """The loss scaler skips the same steps, and the learning rate waits as in the stock run."""
    ours, _ = made(tmp_path, device, pruning=FullData(), fp16=True)
    stock = trainer(tmp_path, cls=Trainer, use_cpu=False, fp16=True)
    for run in (ours, stock):
        run.train()
    assert ours.accelerator.scaler.get_scale() == stock.accelerator.scaler.get_scale()
    assert learning_rates(ours) == learning_rates(stock)
    torch.testing.assert_close(losses(ours), losses(stock), rtol=1e-2, atol=1e-3)


@on_each_device
def test_a_compiled_model_gives_the_same_choices(device, tmp_path):
    plain, expected = made(tmp_path, device)
    # On a CPU the inductor and autograd's tracing take half a minute.
    backend = "inductor" if device == "cuda" else "eager"
    compiled, batches = made(tmp_path, device, torch_compile=True, torch_compile_backend=backend)
    for run in (plain, compiled):
        run.train()
    assert batches == expected
    for name in ("mean", "variance"):
        a, b = plain.pruner.table[name], compiled.pruner.table[name]
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@on_each_device
@pytest.mark.parametrize("name", ["bert", "llama causal", "vit"])
def test_scores_are_the_losses_of_single_samples_on_the_cpu(name, device, tmp_path):
    make, data = tiny_models(n=20)[name]
    settings = {"learning_rate": 0.0, "num_train_epochs": 1, "pruning": UCB(1.0)}
    run, _ = made(tmp_path, device, model=make(), data=data, **settings)
    run.train()
    model, expected = make().train(), []
    for row in data.with_format("torch"):
        expected.append(model(**{key: value[None] for key, value in row.items()}).loss.detach())
    torch.testing.assert_close(
        run.pruner.table["mean"], torch.stack(expected), rtol=1e-4, atol=1e-5
    )


@on_each_device
def test_data_may_lie_on_the_device(device, tmp_path):
    host = [{name: torch.as_tensor(value) for name, value in row.items()} for row in images(20)]
    held = [{name: value.to(device) for name, value in row.items()} for row in host]
    seen = []
    for data in (host, held):
        run, batches = made(tmp_path, device, data=data)
        run.train()
        seen.append((batches, run.pruner.table["mean"]))
    assert seen[0][0] == seen[1][0]
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-4, atol=1e-5)


@on_each_device
def test_resuming_continues_the_random_numbers_of_the_device(device, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    whole, expected = made(tmp_path, device, model=vit(dropout=0.2), **settings)
    whole.train()
    part, batches = made(tmp_path, device, model=vit(dropout=0.2))
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert batches == expected[4:]
    torch.testing.assert_close(losses(part), losses(whole), rtol=1e-4, atol=1e-5)
