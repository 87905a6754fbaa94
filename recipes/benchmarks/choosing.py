"""What choosing costs per epoch, without a model: seconds and the peak of memory.

    cd recipes/benchmarks
    results=../results/benchmarks
    rules="random epsilon-greedy ucb infobatch"
    python choosing.py --sizes 5e4 1.28e6 --policies $rules loss-proportional orderdp \\
        --output $results/choosing.json
    python choosing.py --sizes 5e4 --policies $rules loss-proportional orderdp --rounds 1 \\
        --epochs 20 --output $results/choosing_50k.json
    python choosing.py --sizes 1e7 --policies $rules --rounds 5 --output $results/choosing_10m.json
    python choosing.py --sizes 1e8 --policies $rules --rounds 1 --epochs 3 \\
        --output $results/choosing_100m.json

An epoch is everything that the pruner does in one: begin_epoch (score, plan, order), the batches of
indices, weights and observe for each batch, end_epoch (the table). The baseline is torch's
`RandomSampler` and `BatchSampler` over all N samples, which only make the batches of indices of a
full epoch. In each round each rule runs in a fresh process, in turns with the baseline. The first
epoch is not counted: nothing is known in it. Seconds are those that the processor worked for the
process, which has one thread: other programs on the machine count less.

The peak is the resident memory of the process in the first two epochs, minus what it had before the
pruner was made. The baseline comes later.
"""

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import measure
import torch
from torch.utils.data import BatchSampler, RandomSampler

from hf_dynprune import DynamicPruner, RunShape, make_policy
from hf_dynprune.policies import POLICIES

NEEDED = ("random", "epsilon-greedy", "ucb", "infobatch")
OTHERS = ("loss-proportional", "orderdp", "seta", "kakurenbo", "ies")
PHASES = ("choose", "iterate", "observe", "apply")


def policy_of(name: str, keep_ratio: float):
    settings: dict[str, Any] = {"scoring": "trained"}  # other scoring needs a model
    if name == "infobatch":
        settings["last"] = 0.0
    if "keep_ratio" in POLICIES[name].__dataclass_fields__:
        settings["keep_ratio"] = keep_ratio
    return make_policy(name, **settings)


def full_epoch(n: int, batch_size: int) -> float:
    begun = time.process_time()
    for _ in BatchSampler(RandomSampler(range(n)), batch_size, drop_last=False):
        pass
    return time.process_time() - begun


def pruned_epoch(pruner: DynamicPruner, epoch: int, losses: torch.Tensor) -> dict[str, float]:
    """Seconds of each phase. The model's part, tensors of indices and losses, is not timed."""
    marks = [time.process_time()]
    pruner.begin_epoch(epoch)
    marks.append(time.process_time())
    for _ in BatchSampler(pruner.sampler, pruner.shape.batch_size, drop_last=False):
        pass
    marks.append(time.process_time())
    spent = 0.0
    for batch in BatchSampler(pruner.sampler, pruner.shape.batch_size, drop_last=False):
        index = torch.tensor(batch)
        signals = {name: losses[: len(index)] for name in pruner.signals}
        begun = time.process_time()
        pruner.weights(index)
        pruner.observe(index, signals)
        spent += time.process_time() - begun
    marks.append(time.process_time())
    pruner.end_epoch()
    marks.append(time.process_time())
    begun, chosen, iterated, observed, ended = marks
    seconds = {"choose": chosen - begun, "iterate": iterated - chosen, "apply": ended - observed}
    return {**seconds, "observe": spent}


def peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(name: str, n: int, keep_ratio: float, batch_size: int, epochs: int) -> dict[str, Any]:
    """Measure a few epochs in this process."""
    torch.set_num_threads(1)
    policy, losses = policy_of(name, keep_ratio), torch.rand(batch_size).exp()
    before = peak_bytes()
    pruner = DynamicPruner(policy, RunShape(n, batch_size, num_epochs=epochs))
    pruned, full, peak = [], [], 0
    for epoch in range(epochs):
        pruned.append(pruned_epoch(pruner, epoch, losses))
        if epoch == 1:
            peak = peak_bytes() - before
        if epoch > 0:
            full.append(full_epoch(n, batch_size))
    phases = {phase: statistics.median(epoch[phase] for epoch in pruned[1:]) for phase in pruned[0]}
    return {
        "phases": phases,
        "pruned": statistics.median(sum(epoch.values()) for epoch in pruned[1:]),
        "full": statistics.median(full),
        "peak": peak,
        "kept": pruner.report.epochs[-1].samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[5e4, 1.28e6, 1e7], help="numbers of samples"
    )
    parser.add_argument("--policies", nargs="+", default=[*NEEDED, *OTHERS], help="names of rules")
    parser.add_argument("--keep_ratio", type=float, default=0.3)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=4, help="epochs, the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    rows = []
    for n in map(int, options.sizes):
        task = (n, options.keep_ratio, options.batch_size, options.epochs)
        turns = {
            name: lambda name=name, task=task: measure.apart(run, name, *task)
            for name in options.policies
        }
        for name, runs in measure.in_turns(turns, options.rounds, f"N = {n:,d}").items():
            compared = measure.ratio([one["pruned"] for one in runs], [one["full"] for one in runs])
            peak, pruned, full = (
                statistics.median(one[what] for one in runs) for what in ("peak", "pruned", "full")
            )
            phases = {p: statistics.median(one["phases"][p] for one in runs) for p in PHASES}
            row = {"samples": n, "policy": name, "kept": runs[0]["kept"], "seconds": pruned}
            row |= {**phases, "full_seconds": full, **compared}
            rows.append({**row, "bytes_a_sample": peak / n, "runs": runs})
    shown = {"samples": ",d", "policy": "", "kept": ",d", **dict.fromkeys(PHASES, ".3f")}
    shown |= {"seconds": ".3f", "full_seconds": ".3f", "ratio": ".2f", "bytes_a_sample": ".1f"}
    measure.report("Seconds of choosing, an epoch", rows, shown, options)


if __name__ == "__main__":
    main()
