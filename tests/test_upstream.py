"""What mends transformers: the mends act, and the stock classes still need them.

A test that is expected to fail (strict) is of the stock class. If it passes, upstream mended the
bug: delete the mend in hf_dynprune/upstream.py.
"""

import copy

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from test_tasks import train
from tiny import images, llama, same_weights, texts, trainer, vit
from transformers import Trainer, ViTForImageClassification

from hf_dynprune import UCB, DynamicPruningMixin, DynamicPruningTrainer, FullData
from hf_dynprune.upstream import restore_weights


def kinds(since="0"):
    """The stock class, expected to fail from a version of transformers on, and ours."""
    there = Version(transformers.__version__) >= Version(since)
    fails = pytest.mark.xfail(there, reason="not mended upstream", strict=True)
    return [
        pytest.param({"cls": Trainer}, marks=fails, id="stock"),
        pytest.param({"pruning": FullData()}, id="pruned"),
    ]


KINDS, KINDS_OF_NAMES = kinds(), kinds(since="5.9")  # from 5.9 on a ViT is saved under other names


# ---- weights that are saved under other names, huggingface/transformers#48805 --------------------


@pytest.mark.parametrize("kind", KINDS_OF_NAMES)
def test_a_resumed_run_has_the_weights_of_its_checkpoint(kind, tmp_path):
    settings = {"save_strategy": "epoch", "learning_rate": 0.05}
    whole = trainer(tmp_path, **settings, **kind)
    whole.train()
    part = trainer(tmp_path / "part", model=vit(seed=7), **settings, **kind)
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))  # nothing is left to train
    assert same_weights(part.model, whole.model)


@pytest.mark.parametrize("kind", KINDS_OF_NAMES)
def test_the_best_model_is_loaded_at_the_end(kind, tmp_path):
    run = trainer(
        tmp_path,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        learning_rate=0.05,
        extra={"eval_dataset": images(10, seed=3)},
        **kind,
    )
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert losses.index(min(losses)) != len(losses) - 1  # the best is not the last
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


class SlimForImageClassification(ViTForImageClassification):
    """Leaves its frozen backbone out of each checkpoint."""


def slim(seed):
    model = SlimForImageClassification(vit().config)
    model.load_state_dict(vit(seed=seed).state_dict())
    model._keys_to_ignore_on_save = [
        name for name, _ in model.named_parameters() if name.startswith("vit.")
    ]
    model.vit.requires_grad_(False)
    return model


def test_what_a_checkpoint_leaves_out_stays_as_it_is(tmp_path):
    settings = {"save_strategy": "epoch", "pruning": UCB(0.5)}
    whole = trainer(tmp_path, model=slim(7), **settings)
    whole.train()
    part = trainer(tmp_path, model=slim(7), **{**settings, "num_train_epochs": 4})
    part.train(resume_from_checkpoint=True)
    for name, value in vit(seed=7).vit.state_dict().items():
        assert torch.equal(part.model.vit.state_dict()[name], value), name


def test_weights_of_another_model_are_an_error(tmp_path):
    vit().save_pretrained(tmp_path)
    deeper = copy.deepcopy(vit().config)
    deeper.num_hidden_layers = 2
    with pytest.raises(RuntimeError, match=r"layer.*1"):
        restore_weights(ViTForImageClassification(deeper), str(tmp_path))


class Plain(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(192, 4) for _ in range(layers))

    def forward(self, pixel_values, labels=None):
        logits = sum(layer(pixel_values.flatten(1)) for layer in self.layers)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_plain_module_that_does_not_fit_is_an_error(tmp_path):
    extra = {"per_sample_loss_fn": "single_label"}
    settings = {"save_strategy": "epoch", "pruning": UCB(0.5), "extra": extra}
    trainer(tmp_path, model=Plain(1), **settings).train()
    with pytest.raises(RuntimeError, match=r"layers\.1\.weight"):
        trainer(tmp_path, model=Plain(2), **settings).train(resume_from_checkpoint=True)


# ---- persistent workers of a resumed run (no public thread found) --------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_with_persistent_workers_is_the_run_that_was_not_interrupted(kind, tmp_path):
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    settings |= {"save_strategy": "epoch", "num_train_epochs": 2}

    def make(folder):
        torch.manual_seed(0)
        extra = {"per_sample_loss_fn": "single_label"} if "pruning" in kind else {}
        return trainer(folder, model=Dropped(), data=images(24), extra=extra, **settings, **kind)

    whole = make(tmp_path)
    whole.train()
    part = make(tmp_path / "part")
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_weights(part.model, whole.model)


class Dropped(Plain):
    """With dropout, which draws from the global random state."""

    def __init__(self):
        super().__init__(1)

    def forward(self, pixel_values, labels=None):
        return super().forward(
            torch.nn.functional.dropout(pixel_values, 0.2, self.training), labels
        )


# ---- the loss of accumulated batches, huggingface/transformers#47688 -----------------------------


@pytest.mark.parametrize("name", ["bert", "llama classification"])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_batches_have_the_gradient_of_one_big_batch(kind, name, tmp_path):
    """Some heads take **kwargs, drop num_items_in_batch, and so are not divided by it."""
    kind = {"cls": Trainer, **kind} if "cls" in kind else kind
    _, big = train(name, tmp_path, 8, 1, **kind)
    _, steps = train(name, tmp_path, 4, 2, **kind)
    one, other = steps[0][1], big[0][1]
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_model_without_keywords_is_trained_alike_however_batches_are_accumulated(
    accumulation, tmp_path
):
    """Below 5.19 the Trainer divides its loss by the accumulated batches, `divided_later`."""
    settings = {"optim": "sgd", "max_steps": 2, "max_grad_norm": 0.0, "learning_rate": 0.1}
    models = []
    for cls, several in ((Trainer, 1), (DynamicPruningTrainer, accumulation)):
        torch.manual_seed(0)
        ours = {"pruning": FullData(), "extra": {"per_sample_loss_fn": "single_label"}}
        run = trainer(
            tmp_path,
            cls=cls,
            model=Plain(1),
            per_device_train_batch_size=8 // several,
            gradient_accumulation_steps=several,
            **settings,
            **(ours if cls is DynamicPruningTrainer else {}),
        )
        run.train()
        models.append(run.model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# ---- operations are counted once (no public thread found) ----------------------------------------


def test_operations_are_counted_once_in_a_run_and_as_by_the_stock_trainer(tmp_path, monkeypatch):
    counts = []
    original = type(vit()).num_parameters

    def num_parameters(self, *args, **kwargs):
        counts.append(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(vit()), "num_parameters", num_parameters)
    runs = {}
    for name, extra in (("stock", {"cls": Trainer}), ("pruned", {"pruning": FullData()})):
        counts.clear()
        run = trainer(tmp_path / name, num_train_epochs=2, **extra)
        counts.clear()
        run.train()
        runs[name] = (
            sum(1 for kwargs in counts if kwargs.get("exclude_embeddings")),
            run.state.total_flos,
        )
    assert runs["stock"][0] == 10  # steps
    assert runs["pruned"][0] == 1
    assert runs["pruned"][1] == runs["stock"][1] > 0


def test_operations_of_a_batch_before_any_run(tmp_path):
    batch = {"pixel_values": torch.zeros(2, 3, 8, 8)}
    stock, pruned = (
        trainer(tmp_path, **extra) for extra in ({"cls": Trainer}, {"pruning": UCB(0.5)})
    )
    assert pruned.floating_point_ops(batch) == stock.floating_point_ops(batch) > 0
    assert pruned.floating_point_ops({"labels": torch.zeros(2)}) == 0


def test_operations_of_a_trainers_own_count_stay_its_own(tmp_path):
    class Counting(Trainer):
        def floating_point_ops(self, inputs):
            return 7

    class Pruned(DynamicPruningMixin, Counting):
        pass

    run = trainer(tmp_path, cls=Pruned, pruning=UCB(0.5), num_train_epochs=2)
    run.train()
    assert run.state.total_flos == 7 * run.state.global_step


# ---- weights that a checkpoint leaves out --------------------------------------------------------


class Halves(torch.nn.Module):
    """A frozen body with running statistics, which is not saved, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = torch.nn.Sequential(torch.nn.Linear(192, 8), torch.nn.BatchNorm1d(8))
        self.body.requires_grad_(False)
        self.head = torch.nn.Linear(8, 4)

    def train(self, mode=True):
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.body(pixel_values.flatten(1)))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def frozen_vit():
    model = vit(seed=7)
    model.vit.requires_grad_(False)
    return model


class SavesTheHead(DynamicPruningTrainer):
    def _save(self, output_dir=None, state_dict=None):
        frozen = ("body.", "vit.")
        kept = {k: v for k, v in self.model.state_dict().items() if not k.startswith(frozen)}
        super()._save(output_dir, kept)


@pytest.mark.parametrize("model", [Halves, frozen_vit])
def test_frozen_weights_that_are_not_saved_stay(model, tmp_path, reliability):
    def made(folder):
        extra = {"per_sample_loss_fn": "single_label"}
        settings = {"save_strategy": "epoch", "pruning": UCB(0.5), "extra": extra}
        return trainer(folder, cls=SavesTheHead, model=model(), **settings)

    whole, part = made(tmp_path), made(tmp_path / "part")
    whole.train()
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_weights(part.model, whole.model)
    reliability("restoring")


def tied():
    return llama(tie_word_embeddings=True)


def adapted():
    torch.manual_seed(1)
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(llama(), peft.LoraConfig(**settings))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft about transformers
@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("model", [tied, adapted])
def test_tied_weights_and_adapters_are_restored(model, best, tmp_path, reliability):
    data = texts("causal LM", 20, padded=True)
    settings = {"save_strategy": "epoch", "pruning": UCB(0.5), "data": data}
    if best:
        settings |= {"eval_strategy": "epoch", "load_best_model_at_end": True}
        settings |= {"learning_rate": 0.2, "extra": {"eval_dataset": data.select(range(4))}}
    whole = trainer(tmp_path, model=model(), **settings)
    whole.train()
    part = trainer(tmp_path / "part", model=model(), **settings)
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_weights(part.model, whole.model)
    reliability("restoring")
