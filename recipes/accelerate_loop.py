"""Prune your own Accelerate loop with `DynamicPruner`, as `DynamicPruningTrainer` does, on CIFAR.

python recipes/accelerate_loop.py --pruning ucb --keep_ratio 0.3 --output_dir runs/loop
torchrun --nproc_per_node 2 recipes/accelerate_loop.py recipes/configs/accelerate_loop_pruned.yaml
"""

from dataclasses import dataclass
from functools import partial

import common
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from common import option

from hf_dynprune import DynamicPruner, FullData, PruningArguments, RunShape
from hf_dynprune.losses import derive_rule, observe_signals
from hf_dynprune.scoring import score_samples
from hf_dynprune.vision import CIFAR_MEAN, CIFAR_STD, ImageCache, batch_collator, create_timm_model


@dataclass
class LoopArguments(common.RunArguments, common.DataArguments):
    dataset: str = option("uoft-cs/cifar10", "Hub id or local path of the dataset.")
    model: str = option("resnet18_cifar", "Any timm architecture, or one with a CIFAR stem.")
    output_dir: str = option("runs/loop", "Output folder.")
    epochs: int = option(20, "Number of epochs.")
    batch_size: int = option(256, "Batch size per rank.")
    learning_rate: float = option(0.1, "Initial learning rate of SGD; it falls linearly to zero.")
    seed: int = option(0, "Seed of weights, order and choices.")
    mixed_precision: str | None = option(None, "no, bf16 or fp16; default: Accelerate's setting.")


def main() -> None:
    """Train. One long function on purpose: it is meant to be read from top to bottom."""
    args, pruning = common.parse(__doc__, LoopArguments, PruningArguments)
    statistics = {"mean": CIFAR_MEAN, "std": CIFAR_STD}
    with common.user_mistakes():
        common.check_output(args, args)
        policy = pruning.policy() or FullData()
        accelerator = Accelerator(mixed_precision=args.mixed_precision)
        splits = args.load_both_splits()
        train = ImageCache.from_dataset(splits[0], augment=True, seed=args.seed, **statistics)
        test = ImageCache.from_dataset(splits[1], **statistics)
        shape = RunShape(len(train), args.batch_size, num_epochs=args.epochs)
        pruner = DynamicPruner(policy, shape, seed=args.seed)
        set_seed(args.seed)
        names = train.label_names
        model = create_timm_model(args.model, label_names=names, image_size=32, **statistics)
    rule = derive_rule(model)  # how the loss of one sample is computed
    settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    optimizer = torch.optim.SGD(model.parameters(), args.learning_rate, **settings)
    loader = pruner.dataloader(train, batch_collator)  # for all epochs; batches have sample_index
    tests = torch.utils.data.DataLoader(test, args.batch_size, collate_fn=batch_collator)
    parallel, optimizer, loader, tests = accelerator.prepare(model, optimizer, loader, tests)
    options = {"rule": rule, "collator": batch_collator, "batch_size": args.batch_size}
    options["mode"] = policy.mode_of_scoring
    options["forward"] = lambda batch: model(**send_to_device(batch, accelerator.device))
    # Called if the policy scores before a choice: sample indices -> signals.
    scorer = partial(score_samples, model, train, signals=pruner.scored_signals, **options)
    for epoch in range(pruner.num_epochs):
        train.set_epoch(epoch)  # for the augmentation
        pruner.begin_epoch(epoch, scorer=scorer)
        for number, batch in enumerate(loader):
            # The learning rate reaches zero at the end of the budget.
            clock = pruner.clock
            left = (clock.total - clock.virtual(clock.start + number)) / clock.total
            optimizer.param_groups[0]["lr"] = args.learning_rate * left * pruner.lr_scale
            index = batch.pop("sample_index")
            outputs = parallel(**batch)
            losses = rule.losses(outputs, batch, 0.0, None)
            pruner.observe(index, observe_signals(pruner.signals, outputs, batch, losses))
            # Samples of this batch per rank: Accelerate averages gradients over the ranks.
            samples = pruner.sampler.samples_in(number, 1) / accelerator.num_processes
            accelerator.backward((losses.train * pruner.weights(index)).sum() / samples)
            optimizer.step()
            optimizer.zero_grad()
    pruner.end_epoch()  # records the last observations
    parallel.eval()
    right = []
    with torch.no_grad():
        for batch in tests:
            found = parallel(**batch).logits.argmax(-1) == batch["labels"]
            right.append(accelerator.gather_for_metrics(found))
    pruner.add_evaluation({"eval_accuracy": torch.cat(right).float().mean().item()})
    report = pruner.report
    if accelerator.is_main_process:
        model.save_pretrained(args.output_dir)
        report.save(f"{args.output_dir}/report.json")
    accuracy = report.metrics["eval_accuracy"]
    accelerator.print(f"accuracy {accuracy:.2%}, cost {report.cost_ratio:.4f}")
    common.leave_together()


if __name__ == "__main__":
    main()
