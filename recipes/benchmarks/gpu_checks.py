"""What the checks of gpu.py do. Each returns a sentence and the numbers behind it, or raises.

    torchrun ... recipes/benchmarks/gpu_checks.py ENGINE FOLDER    # what the ranks of a check do

Sizes are tiny where torch finds no GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import engine_settings
import measure
import overhead
import throughput
import torch
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_dynprune import UCB, DynamicPruningTrainer, FullData, PruningPolicy, RandomPruning
from hf_dynprune.vision import CIFAR_MEAN, CIFAR_STD, ImageCache, batch_collator

ROOT = Path(__file__).resolve().parents[2]
LARGE = torch.cuda.is_available()

Figures = dict[str, Any]
Result = tuple[str, Figures]  # a sentence, and the numbers behind it


def expect(holds: bool, found: str) -> None:
    if not holds:
        raise AssertionError(found)


# ---- a tiny language model, trained in several ways ----------------------------------------------

SAMPLES, GLOBAL_BATCH = 64, 16


def llama() -> LlamaForCausalLM:
    set_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=4, **sizes))


def texts() -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 64, (SAMPLES, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(folder: Path, model: PreTrainedModel | None = None, **settings: Any) -> Trainer:
    """Train with a policy that chooses by scores: one epoch on all data, three on half of them."""
    defaults = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        "optim": "sgd",
        "learning_rate": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not LARGE,
        "dataloader_pin_memory": LARGE,
    }
    run = DynamicPruningTrainer(
        model=llama() if model is None else model,
        args=TrainingArguments(str(folder), **{**defaults, **settings}),
        train_dataset=texts(),
        pruning=UCB(0.5, first=1),
    )
    run.remove_callback(PrinterCallback)
    run.train()
    return run


def outcome(run: Trainer) -> dict[str, list[float]]:
    """What a run chose, scored and lost."""
    table, log = run.pruner.table, run.state.log_history
    return {
        "times kept": table["times_kept"].tolist(),
        "scores": table["mean"].tolist(),
        "losses": [entry["loss"] for entry in log if "loss" in entry],
    }


def same(one: Mapping[str, list[float]], other: Mapping[str, list[float]]) -> Figures:
    """Expect the same choices, and the same scores and losses to rounding."""
    expect(one["times kept"] == other["times kept"], "the runs chose different samples")
    apart = {}
    for name in ("scores", "losses"):
        a, b = torch.tensor(one[name]), torch.tensor(other[name])
        expect(a.shape == b.shape, f"{len(a)} {name} beside {len(b)}")
        apart[name] = float(((a - b).abs() / b.abs()).max())
        expect(apart[name] < 1e-3, f"{name} differ by {apart[name]:.2g} of their value")
    return {"differences": apart}


def worst(figures: Figures) -> str:
    return f"scores and losses differ by at most {max(figures['differences'].values()):.1g}"


# ---- several processes ---------------------------------------------------------------------------


def settings_of(engine: str) -> dict[str, Any]:
    """TrainingArguments that make the Trainer use an engine."""
    if engine == "ddp":
        return {"ddp_find_unused_parameters": False}
    if engine == "fsdp2":
        return engine_settings.fsdp2("LlamaDecoderLayer")
    return engine_settings.zero(int(engine.removeprefix("zero")))


def train_rank(engine: str, folder: Path) -> None:
    """What each process of `on_ranks` does."""
    shared = int(os.environ["WORLD_SIZE"]) > torch.cuda.device_count()  # NCCL refuses to share
    if shared:
        # accelerate gives DDP the local rank as the number of the GPU. Here all ranks have GPU 0.
        os.environ["LOCAL_RANK"] = "0"
    run = train(folder, ddp_backend="gloo" if shared else "nccl", **settings_of(engine))
    rank = torch.distributed.get_rank()
    split = any(hasattr(weight, "full_tensor") for weight in run.model.parameters())
    found = {
        **outcome(run),
        "backend": torch.distributed.get_backend(),
        "split": split or run.is_deepspeed_enabled,
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort the interpreter's teardown


def on_ranks(engine: str, ranks: int, folder: Path) -> list[dict[str, Any]]:
    """Train on that many processes. Returns what each rank saw."""
    folder = folder / f"{engine} on {ranks}"
    folder.mkdir()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = dict(os.environ)
    if not LARGE:
        environment |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *launch, __file__, engine, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    printed, _, _ = done.stderr.partition("failed (exitcode")  # torchrun's own traceback follows
    expect(done.returncode == 0, f"{engine} on {ranks} processes: {printed[-2000:]}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def engines(names: tuple[str, ...], least: int, folder: Path) -> Result:
    """Each engine on all GPUs, at least on `least` ranks, beside one rank with the larger batch.

    Without a GPU on two ranks.
    """
    alone = on_ranks("ddp", 1, folder)[0]
    figures: Figures = {"ranks": max(least, torch.cuda.device_count()) if LARGE else 2}
    for name in names:
        seen = on_ranks(name, figures["ranks"], folder)
        apart = [same(rank, alone) for rank in seen]
        expect(seen[0]["split"] or name == "ddp", "nothing split")
        figures[name] = {**apart[0], "backend": seen[0]["backend"], "split": seen[0]["split"]}
    words = "; ".join(
        f"{name} ({figures[name]['backend']}): {worst(figures[name])}" for name in names
    )
    count = figures["ranks"]
    return f"{count} {'ranks choose as one' if count > 1 else 'rank'}. {words}", figures


# ---- steps ---------------------------------------------------------------------------------------

# torch.profiler's names of what makes the host wait for the device.
WAITS = ("aten::item", "aten::_local_scalar_dense", "cudaMemcpy")
WAITS += ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def steps(folder: Path) -> Result:
    """Seconds of whole runs in turns. The host waits for the device at both ends alone."""
    overhead.prepare()
    figures: Figures = {}
    for model in ("resnet8_cifar", "causal_lm") if LARGE else ("bert",):
        batch, count = overhead.MODELS[model].batch, 200 if LARGE else 6

        def speed(kind: str, model: str = model, batch: int = batch, count: int = count) -> float:
            run = overhead.make_run(kind, model, count, str(folder))
            clock = throughput.Clock(batch * count, batch, lambda: None)
            return throughput.timed(run, clock)

        if LARGE:
            speed("stock")  # of the first run, kernels are loaded
        ways = {kind: partial(speed, kind) for kind in ("stock", "pruned")}
        found = measure.in_turns(ways, 7 if LARGE else 2)
        figures[model] = measure.ratio(found["stock"], found["pruned"])
    words = (
        f"{model} {row['ratio']:.3f} (95 %: {row['ratio_95'][0]:.3f} to {row['ratio_95'][1]:.3f})"
        for model, row in figures.items()
    )
    return f"a step's seconds, to the stock Trainer's: {'; '.join(words)}", figures


def whole_run(model: str, pruning: PruningPolicy | None, folder: Path) -> tuple[float, float]:
    """The seconds of a run and its cost; without `pruning` it is the stock Trainer's full run."""
    steps, epochs = (200, 3) if LARGE else (6, 2)
    kind = "pruned" if pruning else "stock"
    run = overhead.make_run(kind, model, steps, str(folder), pruning, num_train_epochs=epochs)
    begun = time.perf_counter()
    run.train()
    if LARGE:
        torch.cuda.synchronize()
    return time.perf_counter() - begun, run.pruning_report.cost_ratio if pruning else 1.0


def bill(folder: Path) -> Result:
    """Seconds of whole runs on less data, to those of the stock Trainer on all data."""
    overhead.prepare()
    figures: Figures = {}
    policies = {"stock": None, "random": RandomPruning(0.3), "UCB": UCB(0.3)}
    for model in ("resnet8_cifar", "causal_lm") if LARGE else ("bert",):
        if LARGE:
            whole_run(model, None, folder)  # of the first run, kernels are loaded
        ways = {name: partial(whole_run, model, each, folder) for name, each in policies.items()}
        found = measure.in_turns(ways, 5 if LARGE else 2)
        seconds = {name: [run[0] for run in runs] for name, runs in found.items()}
        figures[model] = {
            name: {"cost": found[name][0][1], **measure.ratio(seconds[name], seconds["stock"])}
            for name in policies
            if name != "stock"
        }
    words = (
        f"{model}, {name}: cost {row['cost']:.2f}, seconds {row['ratio']:.2f} "
        f"(95 %: {row['ratio_95'][0]:.2f} to {row['ratio_95'][1]:.2f})"
        for model, rows in figures.items()
        for name, row in rows.items()
    )
    return f"of the stock Trainer's full run; {'; '.join(words)}", figures


class Window(TrainerCallback):
    """Counts the waits of the steps after `first` up to `last`."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.waits = first, last, {}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.first:
            self.profile = torch.profiler.profile()
            self.profile.start()
        if state.global_step == self.last:
            self.profile.stop()
            counts = {event.key: event.count for event in self.profile.key_averages()}
            self.waits = {name: counts.get(name, 0) for name in WAITS}
            launched = any("LaunchKernel" in name for name in counts)
            expect(launched or not LARGE, "the profiler saw no kernel")


def waits(folder: Path) -> Result:
    """How often the host waits for the device in steps that do not log.

    The losses of the batches 1, 2, 4, 8, ... are compared with the model's own, which waits.
    """
    overhead.prepare()
    figures: Figures = {}
    first, last = (33, 63) if LARGE else (4, 7)
    count = last - first
    # By default each tensor of a batch is copied with a wait, and the sample index is one more. So
    # that nothing hides, the copies do not wait here. Then ours may not either.
    ways = {"copies do not wait": True, "default": False} if LARGE else {"copies do not wait": True}
    for copies, non_blocking in ways.items():
        for model in ("bert", "resnet8_cifar") if LARGE else ("bert",):
            seen = {}
            for kind in ("stock", "pruned"):
                window = Window(first, last)
                more = {"accelerator_config": {"non_blocking": non_blocking}}
                run = overhead.make_run(kind, model, last + 2, str(folder), **more)
                run.add_callback(window)
                run.train()
                seen[kind] = window.waits
            ours = {name: seen["pruned"][name] - seen["stock"][name] for name in WAITS}
            figures[f"{model}, {copies}"] = {**seen, "steps": count}
            expect(
                not non_blocking or max(ours.values()) <= 0,
                f"{model}: in {count} steps we wait more often than the stock Trainer: {ours}",
            )
    more = (
        f"{name} {sum(row['pruned'].values()) - sum(row['stock'].values()):+d}"
        for name, row in figures.items()
    )
    return f"waits in {count} steps, beyond the stock Trainer's: {'; '.join(more)}", figures


# ---- images --------------------------------------------------------------------------------------


class HeldImages(ImageCache):
    """An `ImageCache` on the device, where it also augments."""

    def __init__(self, samples: int, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=draw)
        labels = torch.randint(0, 10, (samples,), generator=draw)
        names = [str(label) for label in range(10)]
        options = {"mean": CIFAR_MEAN, "std": CIFAR_STD, "label_names": names}
        super().__init__(images, labels, augment=True, **options)
        self.held = torch.nn.functional.pad(images, [self.shift] * 4).to(device)
        self.held_labels = self.labels.to(device)
        self.scale = [
            torch.tensor(values, device=device).view(1, 3, 1, 1) * 255
            for values in (self.mean, self.std)
        ]

    def __getitems__(self, indices) -> dict[str, torch.Tensor]:
        device, size, count = self.held.device, self.images.shape[-1], len(indices)
        index = torch.as_tensor(indices)
        if device.type == "cuda":
            index = index.pin_memory().to(device, non_blocking=True)
        top, left = torch.randint(0, 2 * self.shift + 1, (2, count, 1), device=device)
        side = torch.arange(size, device=device)
        mirrored = torch.rand(count, 1, device=device) < 0.5
        columns = left + torch.where(mirrored, side.flip(0), side)
        rows, channels = top + side, torch.arange(3, device=device)
        pixels = self.held[
            index[:, None, None, None],
            channels[:, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]
        mean, std = self.scale
        return {"pixel_values": (pixels.float() - mean) / std, "labels": self.held_labels[index]}


def images(folder: Path) -> Result:
    """A ResNet of CIFAR in a bare loop and by Trainers, with images that lie on the device."""
    options = argparse.Namespace(
        samples=50_000 if LARGE else 320,
        batch_size=512 if LARGE else 64,
        model="resnet18_cifar" if LARGE else "resnet8_cifar",
        rounds=3 if LARGE else 1,
        compile=LARGE,
    )
    held = HeldImages(options.samples, throughput.DEVICE)
    data = throughput.cifar.Images(held, held, held)
    # Tensors of the device cannot be pinned. The copy of the sample index does not wait.
    more = {"dataloader_pin_memory": False, "accelerator_config": {"non_blocking": True}}
    args = throughput.make_arguments(options, str(folder), **more)
    run = partial(throughput.recipe_run, data)
    ways = {
        "bare loop": partial(throughput.bare_loop, data, args),
        "stock Trainer": partial(
            throughput.stock_run, held, data, data_collator=batch_collator, **more
        ),
        "all data": partial(run, FullData, **more),
        "UCB that keeps everything": partial(run, partial(UCB, keep_ratio=1.0), **more),
    }
    bare, *rows = throughput.compare(ways, options, str(folder))
    speed = bare["images_per_second"]
    words = (f"{row['path']} {row['ratio']:.3f}" for row in rows)
    return (
        f"bare loop: {speed:,.0f} images a second, {50_000 / speed:.1f} s for an epoch of 50,000; "
        f"to it, {'; '.join(words)}",
        {"rows": [bare, *rows], "options": vars(options)},
    )


# ---- other libraries -----------------------------------------------------------------------------


def liger(folder: Path) -> Result:
    """Liger's kernels beside transformers' own. Its fused loss hides the losses of samples."""
    parts = {"rope": True, "rms_norm": True, "swiglu": True}
    parts |= {"cross_entropy": False, "fused_linear_cross_entropy": False}
    kernels = {"use_liger_kernel": True, "liger_kernel_config": parts}
    plain = outcome(train(folder))
    figures = same(outcome(train(folder, **kernels)), plain)
    try:
        train(folder, use_liger_kernel=True)
    except ValueError:
        return f"the same choices with Liger's kernels; {worst(figures)}; its loss refused", figures
    raise AssertionError("Liger's fused loss was not refused")


def qlora(folder: Path) -> Result:
    """LoRA on a model of random weights that is quantised to 4 bits when it is loaded."""
    from peft import LoraConfig, get_peft_model

    llama().save_pretrained(folder / "model")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    where = 0 if LARGE else "cpu"
    base = LlamaForCausalLM.from_pretrained(
        folder / "model", quantization_config=bits, device_map={"": where}
    )
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, lora)
    frozen = {name: w.clone() for name, w in model.named_parameters() if not w.requires_grad}
    packed = sum(weight.dtype == torch.uint8 for weight in frozen.values())
    expect(packed > 0, "no weight was quantised")
    found = outcome(train(folder, model))
    weights = dict(model.named_parameters())
    expect(all(torch.equal(weights[name], w) for name, w in frozen.items()), "a base weight moved")
    expect(bool(torch.tensor(found["scores"]).isfinite().all()), "a score is not finite")
    expect(
        any(bool(w.any()) for name, w in weights.items() if "lora_B" in name), "LoRA did not train"
    )
    figures = {"quantised": packed, "first loss": found["losses"][0], "last": found["losses"][-1]}
    return f"{packed} matrices of 4 bits; only LoRA's weights changed; all scores finite", figures


# ---- the suite -----------------------------------------------------------------------------------


def marked_tests(folder: Path) -> Result:
    """The tests marked `gpu`. A warning of a library is not an error: none could be seen yet."""
    files = [str(f) for f in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in f.read_text()]
    chosen = ["-m", "gpu"] if LARGE else ["-k", "cpu and bf16"]
    result = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", *chosen, *files]
    done = subprocess.run(
        [*command, f"--junitxml={result}"], cwd=ROOT, capture_output=True, text=True
    )
    expect(done.returncode == 0, done.stdout[-2000:])
    suite = ElementTree.parse(result).getroot().find("testsuite")
    names = ("tests", "skipped", "failures", "errors")
    figures = {name: int(suite.attrib[name]) for name in names}
    passed = figures["tests"] - figures["skipped"]
    expect(passed > 0, "no test was run")
    return f"{passed} passed, {figures['skipped']} skipped", figures


ZERO = ("zero1", "zero2", "zero3")
RUNS: dict[str, Callable[[Path], Result]] = {  # by the names of gpu.CHECKS
    "tests": marked_tests,
    "waits": waits,
    "steps": steps,
    "bill": bill,
    "ddp": partial(engines, ("ddp",), 2),
    "fsdp2": partial(engines, ("fsdp2",), 1),
    "zero": partial(engines, ZERO, 1),
    "liger": liger,
    "qlora": qlora,
    "images": images,
}

if __name__ == "__main__":
    train_rank(sys.argv[1], Path(sys.argv[2]))
