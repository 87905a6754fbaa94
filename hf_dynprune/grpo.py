"""DynamicPruningGRPOTrainer and DynamicPruningRLOOTrainer: trl's trainers with `pruning=`.

A sample is a prompt. The policy chooses prompts before they are rolled out:

    policy ──prompts──▶ RepeatingSampler ──▶ rows with `sample_index`
                                                     │  _generate_and_score_completions takes it out
    table ◀── one observation a prompt ◀── _calculate_rewards: rewards of all ranks, in groups

One generation of P prompts gives G completions each. Each is trained on in R batches: R =
steps_per_generation * num_iterations. What a checkpoint in the middle of them needs, the rollouts,
is saved with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from .checks import missing
from .data_side import PrunedDataMixin, run_shape
from .potential import Magnitude
from .pruner import DynamicPruner
from .sampler import SAMPLE_INDEX, IndexedRows, RepeatingSampler
from .schedule import RunShape
from .trl_card import TrlCardMixin
from .upstream import UpstreamMends

try:
    import trl
    from trl import GRPOTrainer, RLOOTrainer
    from trl.trainer.utils import RepeatSampler
except ImportError as error:
    raise missing("hf_dynprune.grpo", "trl", "llm", error) from error

# The names of trl that this file leans on, private or not documented. Reason for each:
SEAMS = {
    "GRPOTrainer._get_train_sampler": "chooses the order of the prompts; ours takes its place",
    "RepeatSampler": "the order that ours repeats; a loader with another one is refused",
    "GRPOTrainer._prepare_inputs": "called once for each batch that is trained on",
    "GRPOTrainer._generate_and_score_completions": "gets the rows of a generation, in training and "
    "in evaluation; the index is taken out of them there",
    "GRPOTrainer._generate": "the seconds of generation",
    "GRPOTrainer._calculate_rewards": "gets the completions of this rank and returns the rewards "
    "of all ranks by function, in the order of the rows",
    "GRPOTrainer._step": "batches trained so far; says which part of a generation is next. trl "
    "does not restore it",
    "GRPOTrainer._buffered_inputs": "the rollouts that are still to be trained on. trl does not "
    "save them",
    "GRPOTrainer._metrics": "what trl adds to the next log, as averages",
    "GRPOTrainer.reward_weights": "the weights of the reward functions",
    "GRPOTrainer.reward_func_names": "for the message if there is no reward",
    "GRPOTrainer.num_generations": "completions of a prompt in training",
    "GRPOTrainer.num_iterations": "how often a generation is trained on",
    "GRPOTrainer.shuffle_dataset": "whether the order of the prompts is random",
    "GRPOTrainer.multi_objective_aggregation": "whether functions are normalised one by one",
    "RLOOTrainer.reward_clip_range": "limits of a reward",
    "GRPOConfig.generation_batch_size": "completions of one generation on all ranks",
    "GRPOConfig.steps_per_generation": "batches that a generation is divided into",
    "Trainer._init_training_state": "knows the checkpoint that a run continues from",
    "Trainer._save_rng_state": "runs on every rank before our own file lists the checkpoint's",
}

# What is observed of a prompt, see `policies/prompts.py`.
SIGNALS = ("reward_mean", "reward_std", "solved", "completions")

_WAY_OUT = "hf_dynprune.grpo was made for trl >= 1.16, < 2: install that, and report your version."


# ---- the run in prompts --------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptShape(RunShape):
    """The shape of a run whose samples are prompts.

    An epoch of K prompts has K // prompts * repeats batches. A tail that does not fill a generation
    is left out, as trl does.

    Args:
        prompts: P, the prompts of one generation on all ranks together.
        completions: G, the completions of a prompt.
        repeats: R, the batches of a rank that one generation is trained on.
    """

    prompts: int = field(default=1, kw_only=True)
    completions: int = field(default=2, kw_only=True)
    repeats: int = field(default=1, kw_only=True)

    @property
    def global_batch(self) -> int:
        """P: prompts are chosen, observed and left out by generations."""
        return self.prompts

    def batches(self, size: int) -> int:
        """Batches that a rank trains in an epoch of `size` prompts."""
        return size // self.prompts * self.repeats

    def check_size(self, epoch: int, size: int) -> None:
        """Raise ValueError if `size` prompts do not fill one generation."""
        if size < self.prompts:
            raise ValueError(
                f"Epoch {epoch} keeps {size} of {self.samples} prompts, and one generation takes "
                f"{self.prompts} (generation_batch_size / num_generations): raise keep_ratio, or "
                "lower generation_batch_size or steps_per_generation."
            )


class PromptPruner(DynamicPruner):
    """A [`DynamicPruner`] that observes once a generation and trains on it in several batches."""

    shape: PromptShape

    def lap(self, phase: str) -> None:
        """Add the seconds since the last lap to a phase of the epoch."""
        self.report.epochs[-1].seconds.setdefault(phase, 0.0)
        self._watch.lap(phase)

    def advance(self) -> None:
        """Note that this rank trains on one more batch."""
        self._batches_done += 1

    def observe_rollouts(
        self, index: Tensor, signals: Mapping[str, Tensor], counts: Mapping[str, int]
    ) -> None:
        """Note a generation. All ranks make the same call.

        Args:
            index: (P,) int64, the prompts.
            signals: (P,) values for each of `signals`; others are ignored.
            counts: What was rolled out on all ranks together, see [`hf_dynprune.report.ROLLOUTS`].
        """
        checked = self._checked(index, signals, self.signals)
        mine = slice(self.rank, None, self.shape.ranks)  # ranks exchange what each noted
        self._observations.add(index[mine], {name: v[mine] for name, v in checked.items()})
        record = self.report.epochs[-1]
        record.forward_passes += len(index)
        record.backward_passes += len(index)
        for name, count in counts.items():
            record.rollouts[name] = record.rollouts.get(name, 0) + count

    def _identity(self) -> dict[str, Any]:
        shape = self.shape
        more = {"completions of a prompt": shape.completions, "batches a generation": shape.repeats}
        return {**super()._identity(), **more}


def group_signals(
    rewards: Tensor,
    weights: Tensor,
    generations: int,
    *,
    full_marks: float | None = None,
    clip: tuple[float, float] | None = None,
) -> dict[str, Tensor]:
    """What is observed of each prompt, from the rewards of its completions.

        r = sum_f w_f reward_f    over the functions f that gave a reward; NaN if none did
        reward_mean, reward_std   of the r of a group that are not NaN (n - 1 in the denominator)
        solved                    share of these with r >= full marks
        completions               number of these

    A std is exactly 0 if all rewards of the group are equal, or if there is only one. Without any
    reward mean, std and solved are NaN.

    Args:
        rewards: (P * G, F) float, groups one after the other; NaN where a function gave none.
        weights: (F,) float.
        generations: G.
        full_marks: The reward from which a completion counts as solved, *optional*. By default the
            sum of the positive weights of the functions that gave a reward, the most that they can
            give if each is at most 1.
        clip: Limits of r, as RLOO has them.

    Returns:
        For each of `SIGNALS` (P,) float32.
    """
    weights = weights.to(rewards)
    given = ~rewards.isnan()
    total = (rewards * weights).nansum(1)
    full = (given * weights.clamp(min=0)).sum(1)
    if full_marks is not None:
        full = torch.full_like(total, full_marks)
    if clip is not None:
        total, full = total.clamp(*clip), full.clamp(max=clip[1])
    scored = given.any(1)
    solved = (scored & (total >= full - 1e-6)).view(-1, generations).sum(1)
    total = total.where(scored, torch.nan).view(-1, generations)
    count = scored.view(-1, generations).sum(1)
    mean = total.nanmean(1)
    std = ((total - mean[:, None]) ** 2).nansum(1).div((count - 1).clamp(min=1)).sqrt()
    std = std.where(_differ(total), 0.0).where(count > 0, torch.nan)
    signals = (mean, std, solved / count, count)
    return {name: value.to(torch.float32) for name, value in zip(SIGNALS, signals, strict=True)}


def _differ(grouped: Tensor) -> Tensor:
    """(P,) bool: whether a row of (P, G) holds two different numbers besides NaN."""
    return grouped.nan_to_num(-torch.inf).amax(1) > grouped.nan_to_num(torch.inf).amin(1)


# ---- the trainers --------------------------------------------------------------------------------


class PromptPruningMixin(TrlCardMixin, PrunedDataMixin):
    """Adds `pruning=` to trl's GRPOTrainer and RLOOTrainer.

    An epoch is what lies between two choices: round(keep_ratio * N) prompts. With a smaller
    keep_ratio choices are made more often. `period` stays in epochs, because loaders draw ahead
    within one, so a choice within one could not be resumed exactly. Set `max_steps` to keep the
    number of steps.

    A pass in the report is one prompt with all its completions.

    Args:
        pruning: The policy; None is trl's trainer. It may observe `reward_mean`, `reward_std`,
            `solved` and `completions`.

    All other arguments are trl's.

    Attributes:
        full_marks: The reward from which a completion counts as solved; see [`group_signals`].
            Set it before `train`.

    Raises:
        ValueError: At construction, for streams, a column `sample_index`, policies that need losses
            or weigh samples, a `scoring` other than `"trained"`, and a choice that does not fill
            one generation. At the first generation, if no reward function gives a reward and the
            policy observes rewards.

    Relations: Generation, rewards, advantages and the loss are trl's. Not verified: vLLM,
    `rollout_func`, environments and tools, images, `sync_ref_model` after a resume.
    """

    full_marks: float | None = None
    # The prompts of the rows that are being rolled out.
    _rolled_out: list[int]

    # ---- what a run is ----

    def observed_signals(self) -> tuple[str, ...]:
        """The signals that this class observes of each prompt."""
        return (*super().observed_signals(), *SIGNALS)

    def _prepare_observation(self, pruner: DynamicPruner) -> None:
        policy, columns = pruner.policy, getattr(self.train_dataset, "column_names", ())
        if SAMPLE_INDEX in columns:
            raise ValueError(
                f"The training dataset has a column {SAMPLE_INDEX!r}, the name under which pruning "
                "passes on which prompt a row is: rename or remove it."
            )
        if policy.weighs:
            raise ValueError(
                f"{policy} weighs samples, and {type(self).__name__} has no weights of prompts: "
                "use a policy without weights, such as ThompsonPrompts(keep_ratio=0.5)."
            )
        if policy.scoring != "trained":
            raise ValueError(
                f"scoring={policy.scoring!r} scores samples by forward passes, and a prompt is "
                "scored by rollouts: use scoring='trained'."
            )
        super()._prepare_observation(pruner)

    def _takes_index(self) -> bool:
        return True

    def _planned_shape(self) -> PromptShape:
        args: Any = self.args
        trainer = cast(Any, self)
        shape = run_shape(args, len(cast(Any, self.train_dataset)), drop_last=True)
        return PromptShape(
            **{entry.name: getattr(shape, entry.name) for entry in fields(RunShape)},
            prompts=args.generation_batch_size // trainer.num_generations,
            completions=trainer.num_generations,
            repeats=args.steps_per_generation * trainer.num_iterations,
        )

    def _shape_of(self, stock: DataLoader) -> RunShape:
        batches: Any = stock.batch_sampler
        while hasattr(batches, "batch_sampler"):  # accelerate's share of a rank
            batches = batches.batch_sampler
        sampler, samples = getattr(batches, "sampler", None), len(cast(Any, self.train_dataset))
        if not isinstance(sampler, RepeatSampler) or sampler.num_samples != samples:
            raise ValueError(
                f"The loader of get_train_dataloader has a {type(sampler).__name__}: expected "
                f"trl's RepeatSampler over the {samples} prompts of the train_dataset. Let pruning "
                "choose the prompts, or use pruning=None."
            )
        return self._planned_shape()

    def _indexed(self, collator: Any) -> Any:
        return IndexedRows(collator)

    def _magnitude(self) -> Magnitude | None:
        """The spread of a prompt's rewards, if the policy observes it: a run may have none."""
        observed = "reward_std" in cast(Any, self.pruning).signals
        return Magnitude("reward_std", "signal") if observed else None

    def _make_pruner(self, shape: RunShape) -> PromptPruner:
        shape = cast(PromptShape, shape)
        sampler = RepeatingSampler(
            shape.samples,
            shape.prompts,
            generations=shape.completions,
            repeats=shape.repeats,
            shuffle=cast(Any, self).shuffle_dataset,
        )
        return PromptPruner(
            cast(Any, self.pruning),
            shape,
            seed=self.args.seed,
            data_seed=self.args.seed,  # trl's order leaves data_seed out of account
            fingerprint=self._fingerprint(),
            memory=self.memory,
            magnitude=self._magnitude(),
            sampler=sampler,
        )

    # ---- a generation ----

    def _rolls_out(self) -> bool:
        """Whether a pruned run trains now. In evaluation trl calls the same methods."""
        return self.pruning is not None and self.is_in_train and cast(Any, self.model).training

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        if self._rolls_out():
            cast(PromptPruner, self.pruner).advance()
        return inputs

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        if self._rolls_out():
            # Reward functions and environments see the dataset's own columns.
            self._rolled_out = [row.pop(SAMPLE_INDEX) for row in inputs]
        return super()._generate_and_score_completions(inputs)  # type: ignore[misc]

    def _generate(self, prompts: list) -> Any:
        return self._timed("generation", super()._generate, prompts)  # type: ignore[misc]

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        behind = super()._calculate_rewards  # type: ignore[misc]
        rewards = self._timed("rewards", behind, inputs, prompts, completions, completion_ids_list)
        if self._rolls_out():
            self._observe_rewards(rewards, [len(ids) for ids in completion_ids_list])
        return rewards

    def _timed(self, phase: str, call: Any, *args: Any) -> Any:
        """Call it; in training, note its seconds as those of a phase."""
        if not self._rolls_out():
            return call(*args)
        pruner = cast(PromptPruner, self.pruner)
        pruner.lap("training")
        result = call(*args)
        pruner.lap(phase)
        return result

    def _observe_rewards(self, rewards: Tensor, lengths: list[int]) -> None:
        """Observe the prompts of a generation.

        Args:
            rewards: (B, F), of all ranks, by function.
            lengths: Tokens of this rank's completions.

        Cost: one collective of 16 bytes a completion.
        """
        trainer, pruner = cast(Any, self), cast(PromptPruner, self.pruner)
        mine = torch.tensor([self._rolled_out, lengths], device=rewards.device).T.contiguous()
        index, tokens = self.accelerator.gather(mine).unbind(1)
        groups = index.view(-1, trainer.num_generations)
        if len(index) != len(rewards) or bool((groups != groups[:, :1]).any()):
            raise RuntimeError(
                f"trl {trl.__version__} returned {len(rewards)} rewards for {len(index)} rows that "
                f"do not lie in groups of {trainer.num_generations}. {_WAY_OUT}"
            )
        first = not any(record.rollouts for record in pruner.report.epochs)
        if first and pruner.signals and bool(rewards.isnan().all()):
            raise ValueError(
                f"The reward functions {', '.join(trainer.reward_func_names)} gave no reward (None "
                f"or NaN) for any of {len(rewards)} completions, so {pruner.policy} has nothing to "
                "choose by: return a number for at least one of them."
            )
        clip = getattr(self, "reward_clip_range", None)
        signals = group_signals(
            rewards,
            trainer.reward_weights,
            trainer.num_generations,
            full_marks=self.full_marks,
            clip=None if clip is None else tuple(clip),
        )
        effective = int((self._spread(rewards, signals) > 0).sum())
        counts = {
            "prompts": len(groups),
            "effective_prompts": effective,
            "completions": len(index),
            "tokens": int(tokens.sum()),
            "reward_calls": rewards.numel(),
        }
        pruner.observe_rollouts(groups[:, 0], signals, counts)
        trainer._metrics["train"]["pruning/effective_prompts"].append(effective / len(groups))

    def _spread(self, rewards: Tensor, signals: Mapping[str, Tensor]) -> Tensor:
        """(P,) more than 0 if the advantages of a group are not all 0."""
        trainer = cast(Any, self)
        if getattr(self, "multi_objective_aggregation", "") != "normalize_then_sum":
            return signals["reward_std"]
        # There each function has advantages of its own.
        counted = rewards[:, trainer.reward_weights != 0].T
        differ = [_differ(one.view(-1, trainer.num_generations)) for one in counted]
        return torch.stack(differ).sum(0)

    # ---- checkpoints ----

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self.pruning is not None:
            pruner, trainer = cast(PromptPruner, self.pruner), cast(Any, self)
            trainer._step, trainer._buffered_inputs = pruner.batches_done, None
            if pruner.batches_done % pruner.shape.repeats:
                trainer._buffered_inputs = self._saved_rollouts(cast(str, resume_from_checkpoint))
        return position

    def _rollouts_file(self, folder: str) -> Path:
        return Path(folder) / f"rollouts_{self.args.process_index}.pt"

    def _save_rng_state(self, output_dir: str) -> None:
        if self.pruning is not None:
            pruner, trainer = cast(PromptPruner, self.pruner), cast(Any, self)
            file = self._rollouts_file(output_dir)
            file.unlink(missing_ok=True)  # of an earlier run in the same folder
            if pruner.batches_done % pruner.shape.repeats:
                file.parent.mkdir(parents=True, exist_ok=True)
                rollouts = {"ranks": self.args.world_size, "batches": trainer._buffered_inputs}
                torch.save(rollouts, file)
        super()._save_rng_state(output_dir)

    def _saved_rollouts(self, folder: str) -> list[dict[str, Any]]:
        """The rollouts of a checkpoint in the middle of a generation, as this rank needs them."""
        file, ranks = self._rollouts_file(folder), self.args.world_size
        saved = {"ranks": None}
        if file.exists():
            saved = torch.load(file, map_location="cpu", weights_only=True)
        if saved["ranks"] != ranks:
            raise ValueError(
                f"{folder} lies in the middle of a generation, and its rollouts are those of "
                f"{saved['ranks']} ranks, not of {ranks}: resume with as many ranks, or from a "
                "checkpoint at the end of a generation, or set ignore_data_skip=True to begin the "
                "epoch again."
            )
        return send_to_device(cast(Any, saved)["batches"], self.args.device)

    # ---- logs ----

    def floating_point_ops(self, inputs: Any) -> int:
        """The Trainer's count: a batch of trl is a list of rows, not a dict."""
        return super(UpstreamMends, self).floating_point_ops(inputs)


class DynamicPruningGRPOTrainer(PromptPruningMixin, GRPOTrainer):
    """trl's GRPOTrainer with one new argument, `pruning=`; see [`PromptPruningMixin`].

    ```python
    from hf_dynprune import ThompsonPrompts
    from hf_dynprune.grpo import DynamicPruningGRPOTrainer

    trainer = DynamicPruningGRPOTrainer(
        model, reward, args, train_dataset=prompts, pruning=ThompsonPrompts(keep_ratio=0.25)
    )
    ```
    """

    _replaced_orders = (GRPOTrainer,)


class DynamicPruningRLOOTrainer(PromptPruningMixin, RLOOTrainer):
    """trl's RLOOTrainer with one new argument, `pruning=`; see [`PromptPruningMixin`].

    The rewards that are observed do not hold the KL penalty that RLOO adds to them.
    """

    _replaced_orders = (RLOOTrainer,)
