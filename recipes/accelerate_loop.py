"""A loop of your own under Accelerate, pruned by `DynamicPruner`: what `DynamicPruningTrainer` does, by hand, on CIFAR.

python recipes/accelerate_loop.py --pruning ucb --keep_ratio 0.3 --output_dir runs/loop
torchrun --nproc_per_node 2 recipes/accelerate_loop.py recipes/configs/accelerate_loop_pruned.yaml
"""

from dataclasses import dataclass, field

import common
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed

from hf_dynprune import DynamicPruner, FullData, PruningArguments
from hf_dynprune.losses import derive_rule, observe_signals
from hf_dynprune.scoring import score_samples
from hf_dynprune.vision import CIFAR_MEAN, CIFAR_STD, ImageCache, batch_collator, create_timm_model


@dataclass
class LoopArguments(common.RunArguments, common.DataArguments):
    dataset: str = field(
        default="uoft-cs/cifar10", metadata={"help": "Hub id or local path of the dataset."}
    )
    model: str = field(
        default="resnet18_cifar",
        metadata={"help": "Any timm architecture, or one with a CIFAR stem."},
    )
    output_dir: str = field(default="runs/loop", metadata={"help": "Where to write."})
    epochs: int = field(default=20, metadata={"help": "Epochs."})
    batch_size: int = field(default=256, metadata={"help": "Batch of one rank."})
    learning_rate: float = field(
        default=0.1, metadata={"help": "Of SGD; it falls linearly to zero."}
    )
    seed: int = field(default=0, metadata={"help": "Of weights, order and choices."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16; default: Accelerate's."}
    )


def main() -> None:
    args, pruning = common.parse(__doc__, LoopArguments, PruningArguments)
    with common.user_mistakes():
        common.check_output(args, args)
        policy = pruning.policy() or FullData()
        accelerator = Accelerator(mixed_precision=args.mixed_precision)
        splits = args.load_splits()
        train = ImageCache.from_dataset(
            splits[0], mean=CIFAR_MEAN, std=CIFAR_STD, augment=True, seed=args.seed
        )
        test = ImageCache.from_dataset(splits[1], mean=CIFAR_MEAN, std=CIFAR_STD)
        pruner = DynamicPruner(
            policy, len(train), batch_size=args.batch_size, num_epochs=args.epochs, seed=args.seed
        )
        set_seed(args.seed)
        model = create_timm_model(
            args.model, label_names=train.label_names, image_size=32, mean=CIFAR_MEAN, std=CIFAR_STD
        )
    rule = derive_rule(model)  # the loss of one sample
    optimizer = torch.optim.SGD(
        model.parameters(), args.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    loader = pruner.dataloader(
        train, batch_collator
    )  # one for all epochs; its batches carry "sample_index"
    tests = torch.utils.data.DataLoader(test, args.batch_size, collate_fn=batch_collator)
    parallel, optimizer, loader, tests = accelerator.prepare(model, optimizer, loader, tests)
    scoring = {
        "rule": rule,
        "collator": batch_collator,
        "batch_size": args.batch_size,
    }  # of policies that ask for passes
    scoring["mode"] = policy.scoring_mode or ("train" if policy.scoring == "dropped" else "eval")
    scoring["forward"] = lambda batch: model(**send_to_device(batch, accelerator.device))
    for epoch in range(pruner.num_epochs):
        train.set_epoch(epoch)  # of the augmentation
        pruner.begin_epoch(
            epoch,
            scorer=lambda index: score_samples(
                model, train, index, pruner.scored_signals, **scoring
            ),
        )
        for number, batch in enumerate(loader):
            left = pruner.clock.total - pruner.clock.virtual(
                pruner.clock.start + number
            )  # the schedule follows the budget
            optimizer.param_groups[0]["lr"] = (
                args.learning_rate * (left / pruner.clock.total) * pruner.lr_scale
            )
            index = batch.pop("sample_index")
            outputs = parallel(**batch)
            losses = rule.losses(outputs, batch, 0.0, None)
            pruner.observe(index, observe_signals(pruner.signals, outputs, batch, losses))
            samples = (
                pruner.sampler.samples_in(number, 1) / accelerator.num_processes
            )  # gradients are averaged over ranks
            accelerator.backward((losses.train * pruner.weights(index)).sum() / samples)
            optimizer.step()
            optimizer.zero_grad()
    pruner.end_epoch()  # the last observations
    parallel.eval()
    with torch.no_grad():
        right = [
            accelerator.gather_for_metrics(parallel(**b).logits.argmax(-1) == b["labels"])
            for b in tests
        ]
    pruner.add_evaluation({"eval_accuracy": torch.cat(right).float().mean().item()})
    if accelerator.is_main_process:
        model.save_pretrained(args.output_dir)
        pruner.report.save(f"{args.output_dir}/report.json")
    accelerator.print(
        f"accuracy {pruner.report.metrics['eval_accuracy']:.2%}, cost {pruner.report.cost_ratio:.4f}"
    )
    common.leave_together()


if __name__ == "__main__":
    main()
