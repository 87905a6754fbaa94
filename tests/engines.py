"""What the processes of test_engines.py do, each on its rank.

    torchrun ... tests/engines.py FOLDER ENGINE ...
    torchrun ... tests/engines.py FOLDER ENGINE/SCENARIO ...

- `ddp`: each rank has the whole model.
- `fsdp2`: `from_pretrained(distributed_config=...)` splits it by torch's `fully_shard`.
- `accelerate`: accelerate does so (`fsdp=True`). For CPUs it must be told: see engine_settings.py.
- `zero1`, `zero2`, `zero3`: DeepSpeed splits the optimizer, also the gradients, also the model.

Each scenario returns what its rank saw. If it fails, the text of its error is noted instead.
"""

import gc
import os
import signal
import sys
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import error_of
from tiny import comparable, images, learning_rates, llama, recorded, texts, trainer, vit
from torch.distributed.fsdp import fully_shard
from transformers import BartConfig, BartForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

from hf_dynprune import UCB
from hf_dynprune.losses import derive_rule, model_class
from recipes.benchmarks import engine_settings

# As torchrun sets them.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
GLOBAL_BATCH = 12
LAYERS = {"vit": "ViTLayer", "llama": "LlamaDecoderLayer"}
# 17 of 45 samples are dropped. Two ranks score 9 and 8 of them: two passes and one.
POLICY, N, SCORED_AT_ONCE = UCB(keep_ratio=28 / 45, first=1), 45, 8


def split(model, folder, **sizes):
    """The model, split over the ranks while it is loaded."""
    if RANK == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return type(model).from_pretrained(folder, distributed_config=DistributedConfig(**sizes))


def run_of(engine, folder, model, data, pruning=POLICY, config=None, extra=None, **settings):
    """A trainer whose global batches do not depend on the number of ranks.

    Args:
        config: What differs from the engine's settings in engine_settings.py.
    """
    defaults = {
        "per_device_train_batch_size": GLOBAL_BATCH // RANKS,
        "per_device_eval_batch_size": SCORED_AT_ONCE,
        "ddp_find_unused_parameters": False,
        "learning_rate": 3e-3,
    }
    if engine == "fsdp2":
        model = split(model, folder / "model", fsdp_size=RANKS)
    if engine == "accelerate":
        defaults |= engine_settings.fsdp2(LAYERS[model.config.model_type], **(config or {}))
    if engine.startswith("zero"):
        defaults |= engine_settings.zero(int(engine[-1]), **(config or {}))
    settings = {**defaults, **settings}
    return trainer(folder, model=model, data=data, pruning=pruning, extra=extra, **settings)


def weights_of(run):
    """The whole weights of a model that may be split."""
    weights = dict(run.model.named_parameters())
    gathered = nullcontext()
    if run.is_deepspeed_enabled:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(weights.values()))
    with gathered:
        return {
            name: getattr(w, "full_tensor", lambda w=w: w)().detach().clone()
            for name, w in weights.items()
        }


def outcome(run):
    return {
        "weights": weights_of(run),
        "table": run.pruner.table.state_dict(),
        "report": comparable(run.pruning_report),
        "learning rates": learning_rates(run),
        "loss": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        "split": run.is_deepspeed_enabled
        or any(hasattr(w, "full_tensor") for w in run.model.parameters()),
    }


def trained(*args, **settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = run_of(*args, **settings)
    batches = recorded(run)
    run.train()
    return {**outcome(run), "batches": batches, "warned": [str(each.message) for each in caught]}


def plain(engine, folder):
    return trained(engine, folder, vit(), images(N))


def accumulated(engine, folder):
    """Two batches in a step, and forward passes that score: another number on each rank."""
    half = GLOBAL_BATCH // RANKS // 2
    pruning = UCB(POLICY.keep_ratio, first=1, scoring="dropped")
    settings = {"per_device_train_batch_size": half, "gradient_accumulation_steps": 2}
    return trained(engine, folder, vit(), images(N), pruning, **settings)


def is_labelled(sample):
    return sample % 8 == 0


def few_labels(row, number):
    return row if is_labelled(number) else {"labels": [-100] * len(row["labels"])}


def tokens(engine, folder):
    """A loss over tokens. Some batches have no valid label on one rank, and have on the other."""
    data = texts("causal LM", n=N, padded=True).map(few_labels, with_indices=True)
    return trained(engine, folder, llama(), data)


def saving(engine, folder, **settings):
    return run_of(
        engine, folder, vit(dropout=0.1), images(N), save_strategy="steps", save_steps=3, **settings
    )


def resumed(engine, folder, **settings):
    """The run, and the runs that continue from two of its checkpoints."""
    whole = saving(engine, folder, **settings)
    whole.train()
    runs = {0: outcome(whole)}
    for step in (3, 6):  # in the middle of an epoch, both
        part = saving(engine, folder, **settings)
        part.args.save_strategy = "no"
        part.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert part.pruning_report.resumed[-1]["step"] == step
        runs[step] = outcome(part)
    return runs


def resumed_from_full(engine, folder):
    """The same with checkpoints that hold the whole model in one file."""
    return resumed(engine, folder, config={"state_dict": "FULL_STATE_DICT"})


class KilledAtStep5(TrainerCallback):
    """In the middle of an epoch, after the checkpoint of step 3."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5 and RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(engine, folder):
    saving(engine, folder.parent / "killed", extra={"callbacks": [KilledAtStep5()]}).train()


def continued(engine, folder):
    """The run that was killed, from its newest checkpoint."""
    run = saving(engine, folder.parent / "killed")
    run.train(resume_from_checkpoint=True)
    return run.pruning_report.resumed[-1]["step"], outcome(run)


def refused(engine, folder):
    """What is said to DeepSpeed's tensor parallelism, in which ranks share a batch."""
    more = {"tensor_parallel": {"autotp_size": RANKS}}
    data = texts("causal LM")
    return [error_of(lambda: run_of(engine, folder, llama(), data, config=more))]


def names(engine, folder):
    """What is known of a model by the name of its class."""
    sizes = {"d_model": 16, "vocab_size": 40, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForCausalLM(BartConfig(**sizes, **heads))
    before = derive_rule(model).name, model_class(model)
    fully_shard(model)
    return before, (derive_rule(model).name, model_class(model)), type(model) is model_class(model)


TRAINED = (plain, accumulated, tokens)
SCENARIOS = {
    "ddp": TRAINED,
    "fsdp2": (*TRAINED, names),
    "accelerate": (*TRAINED, resumed, resumed_from_full),
    "zero1": (*TRAINED, resumed),
    "zero2": (*TRAINED, resumed),
    "zero3": (*TRAINED, resumed, refused),
}
NAMED = {each.__name__: each for some in SCENARIOS.values() for each in some}
NAMED |= {"killed": killed, "continued": continued}


def main(folder, engines):
    gc.freeze()  # as conftest.py does
    if not any(engine.startswith("zero") for engine in engines):
        dist.init_process_group("gloo")
    seen = {}
    for name in engines:
        engine, _, alone = name.partition("/")
        scenarios = [NAMED[alone]] if alone else SCENARIOS[engine] if RANKS == 2 else (plain,)
        for scenario in scenarios:
            key = engine, scenario.__name__
            try:
                seen[key] = scenario(engine, folder / engine / scenario.__name__)
            except Exception:
                seen[key] = traceback.format_exc()
            torch.save(seen, folder / f"rank{RANK}.pt")
            dist.barrier()
    sys.stdout.flush()
    # Skip the interpreter's teardown, in which gloo's threads now and then abort the process.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
