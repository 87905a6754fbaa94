"""The table of speed in the docs, from the files that recipes/benchmarks/ wrote.

    python tests/speed.py    # renders recipes/results/benchmarks/*.json into docs/speed.md

No number of the table is written by hand; test_docs.py compares.
"""

import json

from reliability import ROOT, put_into

PAGE = ROOT / "docs" / "speed.md"
RESULTS = ROOT / "recipes" / "results" / "benchmarks"
NEEDED = {"random": "random", "epsilon-greedy": "ε-greedy", "ucb": "UCB", "infobatch": "InfoBatch"}
RULES = NEEDED | {"loss-proportional": "loss-proportional", "orderdp": "OrderDP"}
PARTS = ("choose", "iterate", "observe", "apply")
NAMES = {
    "resnet8_cifar": "ResNet-8 (CIFAR)",
    "bert": "a tiny BERT",
    "causal_lm": "a small Llama, vocabulary 32,000",
}


def rows(file, **values):
    found = json.loads((RESULTS / f"{file}.json").read_text())["rows"]
    return [row for row in found if all(row[name] == value for name, value in values.items())]


def one(file, **values):
    (row,) = rows(file, **values)
    return row


def interval(low, high):
    return f"(95 %: {low:.3f} to {high:.3f})"


def two_digits(value):
    return f"{float(f'{value:.2g}'):,.0f}"


def lines():
    """(what is measured, beside what, figure, file)"""
    for file, row in [(name, row) for name in ("overhead", "overhead_bert") for row in rows(name)]:
        yield (
            f"optimizer step that scores every trained sample, {NAMES[row['model']]}, "
            f"{row['pairs']} pairs",
            f"the stock Trainer's, {row['stock_ms']:.0f} ms",
            f"{row['ratio']:.3f} {interval(*row['ratio_95'])}; memory {row['memory_ratio']:.3f}",
            file,
        )
    bare = one("throughput", path="bare loop")
    jpeg = one("throughput", path="JPEG: bare loop on decoded tensors")
    for path, words, beside in (
        ("cifar.py, Trainer", "images a second of `recipes/cifar.py`, ResNet-8", bare),
        ("cifar.py, UCB that keeps everything", "the same, every sample scored", bare),
        ("stock path (PIL)", "the stock way: PIL and torchvision, image by image", bare),
        ("stock path (PIL), 1 worker", "the same, with a worker", bare),
        ("JPEG: ImageCache, Trainer", "images a second of `recipes/cifar.py`, 64 px", jpeg),
        ("JPEG: stock path (PIL)", "the stock way from JPEG, 64 px", jpeg),
    ):
        row = one("throughput", path=path)
        speed = f"a bare PyTorch loop's, {beside['images_per_second']:,.0f}"
        yield words, speed, f"{row['ratio']:.3f} {interval(*row['ratio_95'])}", "throughput"
    sizes = (
        ("choosing_50k", 50_000, "50 thousand"),
        ("choosing", 1_280_000, "1.28 million"),
        ("choosing_10m", 10**7, "10 million"),
    )
    for file, n, size in sizes:
        found = rows(file, samples=n)
        yield (
            f"an epoch's choice without a model, 0.3 of {size} samples",
            f"`RandomSampler` over all, {found[0]['full_seconds']:.2g} s",
            ", ".join(f"{RULES[row['policy']]} {row['ratio']:.2f}" for row in found),
            file,
        )
    found = {name: one("choosing_100m", policy=name) for name in NEEDED}
    yield (
        "the same, 0.3 of 100 million; memory at the peak",
        f"`RandomSampler` over all, {found['ucb']['full_seconds']:.0f} s",
        "; ".join(
            f"{NEEDED[n]} {r['seconds']:.0f} s, {r['bytes_a_sample']:.1f} bytes a sample"
            for n, r in found.items()
        ),
        "choosing_100m",
    )
    found = {row["policy"]: row for row in rows("choosing_50k")}
    yield (
        "an epoch's choice of 50 thousand by part: begin it, list its batches, note them, end it",
        f"`RandomSampler` over all, {1e3 * found['random']['full_seconds']:.1f} ms",
        "; ".join(
            f"{RULES[name]} "
            + ", ".join(f"{1e3 * found[name][part]:.1f}" for part in PARTS)
            + " ms"
            for name in ("random", "ucb", "loss-proportional")
        ),
        "choosing_50k",
    )
    for n, size in ((1_280_000, "1.28 million"), (10_000_000, "10 million")):
        for ranks in (2, 4):
            found = {row["way"]: row for row in rows("exchange", samples=n, ranks=ranks)}
            ours = found["once an epoch (hf_dynprune)"]
            each, packed = (
                found[f"in every step (all_gather{more})"]["ms_an_epoch"] / 1000
                for more in ("", ", float32 indices")
            )
            yield (
                f"what {ranks} ranks (gloo) exchange in an epoch, 0.3 of {size} samples",
                f"all-gathers in every step, {each:.2f} s; of one tensor, indices as float32, "
                f"{packed:.2f} s",
                f"{ours['ms_an_epoch'] / 1000:.3f} s; {ours['bytes_per_observation']:.2f} bytes an "
                f"observation of {ours['least']}",
                "exchange",
            )
    for role in ("rank 0, which chooses", "another rank"):
        row = one("scale", role=role, measured=False)
        largest = max(other["samples"] for other in rows("scale", role=role, measured=True))
        yield (
            f"a billion samples on 1,024 ranks, an epoch on {role}",
            f"extrapolated from {largest / 1e6:.0f} million",
            f"{row['GB']:.0f} GB of memory, {row['received_GB']:.1f} GB received, "
            f"{row['total']:.0f} s without the network",
            "scale",
        )
    shards, whole, stock = rows("sharded", measured=False)
    largest = max(row["samples"] for row in rows("sharded", measured=True))
    linear = f"extrapolated from {largest / 1e6:.0f} million"
    beside = f"the stock sampler's list of all, on each rank: {stock['total']:.0f} s, "
    for row, words in (
        (whole, f"of a billion samples, the K highest and their order, on rank 0; {linear}"),
        (shards, "the same in shards on 1,024 ranks, not built; measured with a rank's share"),
    ):
        yield (
            words,
            f"{beside}{stock['GB']:.0f} GB",
            f"{row['total']:.2g} s, {row['GB']:.2g} GB",
            "sharded",
        )
    yield (
        "samples a second of all ranks together at which that takes 5 % as long as the training",
        f"the stock sampler's list, {two_digits(stock['rate'])}",
        f"as it is, {two_digits(whole['rate'])} ({whole['rate'] / 2500:.0f} GPUs of 2,500 images a "
        f"second each); in shards, {two_digits(shards['rate'])}",
        "sharded",
    )
    for name in ("resnet8_cifar", "bert", "causal_lm"):
        row = rows("scoring", model=name)[-1]  # scored in larger batches
        yield (
            f"a scoring pass in batches of {row['scoring_batch']}, {NAMES[name]}",
            f"training, {row['training_ms']:.3g} ms a sample; inference alone, "
            f"{row['inference_ms']:.3g}",
            f"{row['of_training']:.2f} of training, {row['of_inference']:.2f} of inference",
            "scoring",
        )
    for what, words in (
        ("import hf_dynprune", "`import hf_dynprune`"),
        ("hf-dynprune --help", "`hf-dynprune --help`"),
        ("build: pruned, datasets.Dataset", "building the trainer on 1.28 million samples"),
    ):
        row = one("startup", what=what)
        beside = {"pass": "bare Python"}.get(row["needs"], "the stock Trainer")
        yield words, beside, f"{row['beyond']:+.3f} s", "startup"


def render():
    head = ["| what | compared with | measured | file |", "| --- | --- | --- | --- |"]
    return "\n".join(
        [
            *head,
            *(
                f"| {' | '.join(cells)} | [{f}.json](../recipes/results/benchmarks/{f}.json) |"
                for *cells, f in lines()
            ),
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(put_into(PAGE.read_text(), render(), "speed"))
