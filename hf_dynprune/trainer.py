"""DynamicPruningTrainer: dynamic data pruning inside the Hugging Face Trainer.

    Trainer ◀── UpstreamMends ◀── CardMixin ◀── PrunedDataMixin ◀── SampleLossMixin
                upstream.py       data_side.py                      loss_side.py

With `pruning=None` every method of these classes calls the stock one and does nothing else.
"""

from transformers import Trainer

from .data_side import PrunedDataMixin
from .loss_side import SampleLossMixin

__all__ = ["DynamicPruningMixin", "DynamicPruningTrainer"]


class DynamicPruningMixin(SampleLossMixin, PrunedDataMixin):
    """Adds `pruning=` to a Trainer.

    ```python
    class PrunedSeq2SeqTrainer(DynamicPruningMixin, Seq2SeqTrainer):
        pass
    ```

    Args:
        pruning: The policy, such as `UCB(keep_ratio=0.3)`; None is the stock Trainer.
        per_sample_loss_fn: How the loss of one sample is computed if transformers' name of the
            model's head does not tell, or with `compute_loss_func` or a compute_loss of the class
            that is mixed with: a name in [`hf_dynprune.losses.RULES`], a function (outputs, inputs)
            -> losses (B,), or a [`hf_dynprune.losses.LossRule`]. A policy that needs no loss of a
            sample, such as `RandomPruning`, trains without it; see `hf_dynprune/loss_side.py`.
        scoring_dataset: The training samples, in their order, as scoring passes shall see them,
            such as without augmentation. *Optional*, defaults to `train_dataset`. Only policies
            with a `scoring` other than `"trained"` take such passes.

    All other arguments are the Trainer's.

    Attributes:
        pruner: The [`DynamicPruner`] of the current run, or of the last one.
        pruning_report: Its [`PruningReport`]; None with `pruning=None`.

    Raises:
        TypeError, ValueError: At construction, before anything is trained, if something cannot be
            pruned.

    Relations: The loss, the optimizer, evaluation, logging, callbacks and checkpoints are the
    Trainer's. Each train() starts a run with an empty table of scores. `resume_from_checkpoint`
    continues the identical run.
    """


class DynamicPruningTrainer(DynamicPruningMixin, Trainer):
    """The Hugging Face Trainer with one new argument, `pruning=`; see [`DynamicPruningMixin`].

    ```python
    trainer = DynamicPruningTrainer(
        model=model, args=args, train_dataset=train, pruning=UCB(keep_ratio=0.3)
    )
    trainer.train()
    trainer.pruning_report.save("report.json")
    ```
    """
