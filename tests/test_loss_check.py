"""Is the loss that is trained the Trainer's? Found out by gradients, not by the value alone."""

import copy

import datasets
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from programs import torchrun
from tiny import bert, images, llama, same_weights, texts, trainer, vit
from torch import nn
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutput, SequenceClassifierOutput

from hf_dynprune import UCB, DynamicPruningMixin, FullData
from hf_dynprune.loss_check import LossCheck, agree, part_of, places_of, slope
from hf_dynprune.losses import RULES, derive_rule

CLASS_WEIGHTS = torch.tensor([1.0, 10.0, 1.0])


def of_class(cls, model):
    """The model with the forward of a class that is derived from its own."""
    model.__class__ = cls
    return model


class OwnCausalLM(transformers.LlamaForCausalLM):
    """A forward of its own, as users write it."""

    def of(self, logits, labels):
        raise NotImplementedError

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        logits = super().forward(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = None if labels is None else self.of(logits.float(), labels)
        return CausalLMOutput(loss=loss, logits=logits)


class InPlaceForCausalLM(OwnCausalLM):
    def of(self, logits, labels):  # its labels are shifted already
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class SmoothForCausalLM(OwnCausalLM):
    def of(self, logits, labels):
        flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(*flat, label_smoothing=0.05)


class OtherMeanForCausalLM(OwnCausalLM):
    def of(self, logits, labels):  # divides by all tokens
        flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(*flat, reduction="sum") / labels.numel()


class PenalisedForCausalLM(OwnCausalLM):
    def of(self, logits, labels):
        flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(*flat) + 1e-1 * sum(p.square().mean() for p in self.parameters())


class WeightedForSequenceClassification(transformers.BertForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        logits = super().forward(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = F.cross_entropy(logits.float(), labels, weight=CLASS_WEIGHTS.to(logits.device))
        return SequenceClassifierOutput(loss=loss, logits=logits)


def both(folder, model, data, *, cls=Trainer, per_sample=None, extra=None, **settings):
    """The stock run and ours over all data, from the same weights."""
    ours = type("Pruned", (DynamicPruningMixin, cls), {})
    fn = {} if per_sample is None else {"per_sample_loss_fn": per_sample}
    runs = []
    for kind, more in ((cls, {}), (ours, {"pruning": FullData()})):
        arguments = {**(extra or {}), **(fn if kind is ours else {})}
        settings = {"max_steps": 4, "learning_rate": 1e-3, **settings}
        run = trainer(
            folder,
            cls=kind,
            model=copy.deepcopy(model),
            data=data,
            extra=arguments,
            **settings,
            **more,
        )
        run.train()
        runs.append(run)
    return runs


def assert_same_weights(one, other, atol=1e-6):
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


# ---- a name that does not tell the loss ----------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("cls", "fits"),
    [
        (InPlaceForCausalLM, "'tokens'"),
        (SmoothForCausalLM, "batch_mean"),
        (OtherMeanForCausalLM, "batch_mean"),
        (PenalisedForCausalLM, "batch_mean"),
    ],
)
def test_a_loss_that_its_name_does_not_tell_is_refused(cls, fits, bf16, tmp_path):
    """Fresh weights: the values are nearly equal, and in bf16 nothing else was looked at before."""
    data = texts("causal LM", 24, padded=True)
    run = trainer(tmp_path, model=of_class(cls, llama()), data=data, pruning=FullData(), bf16=bf16)
    with pytest.raises(ValueError, match=f"{cls.__name__}.*{fits}"):
        run.train()
    assert run.state.global_step == 0


def test_the_rule_that_the_error_names_trains_as_stock(tmp_path):
    data = texts("causal LM", 24, padded=True)
    stock, ours = both(tmp_path, of_class(InPlaceForCausalLM, llama()), data, per_sample="tokens")
    assert_same_weights(stock, ours)


@pytest.mark.parametrize("bf16", [False, True])
def test_class_weights_in_forward_are_refused(bf16, tmp_path):
    model = of_class(WeightedForSequenceClassification, bert())
    data = texts(n=24, padded=True)
    run = trainer(tmp_path, model=model, data=data, pruning=FullData(), bf16=bf16)
    with pytest.raises(ValueError, match="WeightedForSequenceClassification"):
        run.train()
    assert run.state.global_step == 0


def test_class_weights_that_the_first_batch_does_not_show_are_refused_later(tmp_path):
    """A batch of one class has the plain mean. The batches 2, 4, ... are compared, too."""
    data = texts(n=24, padded=True)
    model = of_class(WeightedForSequenceClassification, bert())
    first_of_a_class = [i for i, label in enumerate(data["labels"]) if label == 0][:4]
    rest = [i for i in range(24) if i not in first_of_a_class]
    data = data.select([*first_of_a_class, *rest])

    class InOrder(DynamicPruningMixin, Trainer):
        def get_train_dataloader(self):
            loader = super().get_train_dataloader()
            self._made[1].sampler.order_of = lambda kept, seed, epoch: torch.arange(24)
            return loader

    run = trainer(
        tmp_path, cls=InOrder, model=model, data=data, pruning=FullData(),
        per_device_train_batch_size=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="WeightedForSequenceClassification"):
        run.train()
    assert run.state.global_step == 1


SIZES = {
    "vocab_size": 40,
    "d_model": 16,
    "decoder_layers": 1,
    "encoder_layers": 1,
    "decoder_attention_heads": 2,
    "encoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "encoder_ffn_dim": 16,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("family", ["Bart", "MBart", "Pegasus"])
def test_causal_models_whose_labels_are_in_place(family, tmp_path):
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**SIZES)
    )
    assert derive_rule(model) is RULES["tokens"]
    stock, ours = both(tmp_path, model, texts("causal LM", 24, padded=True), max_steps=2)
    assert_same_weights(stock, ours)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft about transformers
@pytest.mark.parametrize(
    "config",
    [peft.PromptTuningConfig(num_virtual_tokens=3), peft.PrefixTuningConfig(num_virtual_tokens=3)],
)
def test_virtual_tokens_are_in_front_of_the_batch(config, tmp_path):
    """With a prompt in front the first label, too, is predicted."""
    config.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(llama(), config)
    data = texts("causal LM", 24, padded=True)
    settings = {"label_names": ["labels"], "gradient_accumulation_steps": 2, "optim": "sgd"}
    stock, ours = both(tmp_path, model, data, learning_rate=0.1, **settings)
    assert_same_weights(stock, ours)


# ---- batches without a label ---------------------------------------------------------------------


def test_a_first_batch_without_a_label_trains_and_the_next_is_compared(tmp_path):
    data = texts("causal LM", 8, padded=True)

    def ignored(row, i):
        return {"labels": [-100] * len(row["labels"])} if i % 2 else {}

    data = data.map(ignored, with_indices=True)
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    for seed in range(4):  # whatever the order
        stock, ours = both(tmp_path, llama(), data, seed=seed, **settings)
        assert_same_weights(stock, ours)
    wrong = of_class(InPlaceForCausalLM, llama())
    run = trainer(tmp_path, model=wrong, data=data, pruning=FullData(), **settings)
    with pytest.raises(ValueError, match="InPlaceForCausalLM"):
        run.train()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_samples_without_a_label_do_not_count(accumulation, tmp_path):
    data = images(24)
    labels = [-100 if i % 3 == 0 else int(label) for i, label in enumerate(data["labels"])]
    data = data.remove_columns("labels").add_column("labels", labels).with_format("torch")
    settings = {
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    stock, ours = both(tmp_path, vit(), data, **settings)
    assert_same_weights(stock, ours)


def test_signals_of_a_sample_without_a_label(tmp_path):
    data = images(16)
    values = [-100 if i == 0 else int(label) for i, label in enumerate(data["labels"])]
    data = data.remove_columns("labels").add_column("labels", values).with_format("torch")
    for signal in ("el2n", "margin", "confidence", "correct"):
        run = trainer(tmp_path, data=data, pruning=UCB(1.0, signal=signal), max_steps=2)
        run.train()
        assert run.pruner.table["mean"].isfinite().all()


# ---- functions of a user -------------------------------------------------------------------------


class Head(nn.Module):
    """Its outputs are a dict of its own. With `zero` all predictions are uniform."""

    def __init__(self, zero=False, reduction="mean"):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.reduction = nn.Linear(192, 4), reduction
        if zero:
            nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)

    def forward(self, pixel_values, labels=None):
        scores = self.head(pixel_values.flatten(1))
        each = F.cross_entropy(scores, labels, reduction="none")
        loss = each.mean() if self.reduction == "mean" else each.sum()
        return {"loss": loss, "each": each, "scores": scores}


def each(outputs, inputs):
    return outputs["each"]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        lambda o, i: o["each"][:1].expand(len(o["each"])),
        lambda o, i: F.cross_entropy(o["scores"], i["labels"].roll(1), reduction="none"),
        lambda o, i: 0.9 * o["each"] - 0.1 * o["scores"].log_softmax(-1).mean(-1),  # smoothed
        lambda o, i: (1 - (-o["each"]).exp()) ** 2 * o["each"],
    ],
)  # fmt: skip
def test_a_wrong_function_is_refused_also_on_uniform_predictions(function, zero, tmp_path):
    extra = {"per_sample_loss_fn": function}
    run = trainer(tmp_path, model=Head(zero), pruning=FullData(), extra=extra)
    with pytest.raises(ValueError, match=r"'custom'.*Head.*compute_loss_func="):
        run.train()
    assert run.state.global_step == 0


def test_a_loss_of_ones_own_on_a_known_head_needs_two_arguments(tmp_path):
    def focal(outputs, inputs):
        loss = F.cross_entropy(outputs["logits"], inputs["labels"], reduction="none")
        return (1 - (-loss).exp()) ** 2 * loss

    run = trainer(tmp_path, pruning=FullData(), extra={"per_sample_loss_fn": focal})
    with pytest.raises(ValueError, match=r"compute_loss_func=.*'single_label'"):
        run.train()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_function_of_the_right_parts_trains_as_stock(reduction, tmp_path):
    stock, ours = both(tmp_path, Head(reduction=reduction), images(20), per_sample=each)
    assert_same_weights(stock, ours)


@pytest.mark.parametrize("bf16", [False, True])
def test_class_weights_of_a_compute_loss_train_as_stock(bf16, tmp_path):
    """The weighted mean divides by the weights of the batch."""
    weight = torch.tensor([0.5, 1.0, 1.5, 2.0])

    class Weighted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = F.cross_entropy(outputs.logits, labels, weight=weight)
            return (loss, outputs) if return_outputs else loss

    def natural(outputs, inputs):
        return F.cross_entropy(outputs.logits, inputs["labels"], reduction="none", weight=weight)

    stock, ours = both(tmp_path, vit(), images(20), cls=Weighted, per_sample=natural, bf16=bf16)
    assert_same_weights(stock, ours, atol=2e-4 if bf16 else 1e-5)

    def unweighted(outputs, inputs):
        return F.cross_entropy(outputs.logits, inputs["labels"], reduction="none")

    with pytest.raises(ValueError, match=r"Weighted\.compute_loss"):
        both(tmp_path, vit(), images(20), cls=Weighted, per_sample=unweighted)


def test_label_smoothing_beside_a_function_is_refused(tmp_path):
    def plain(outputs, inputs):
        return F.cross_entropy(outputs.logits, inputs["labels"], reduction="none")

    extra = {"per_sample_loss_fn": plain}
    run = trainer(tmp_path, pruning=FullData(), extra=extra, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1"):
        run.train()


def test_heads_beside_the_logits_are_refused(tmp_path):
    class TwoForCausalLM(OwnCausalLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            outputs = transformers.LlamaForCausalLM.forward(
                self, input_ids=input_ids, attention_mask=attention_mask, labels=labels
            )
            aux = 0.5 * outputs.logits
            loss = outputs.loss + F.cross_entropy(aux.flatten(0, 1), labels.flatten())
            return {"loss": loss, "logits": outputs.logits, "aux_logits": aux}

    data = texts("causal LM", 16, padded=True)
    run = trainer(tmp_path, model=of_class(TwoForCausalLM, llama()), data=data, pruning=UCB(0.5))
    with pytest.raises(ValueError, match="TwoForCausalLM"):
        run.train()


def test_answers_behind_the_sequence_are_left_out(tmp_path):
    generator = np.random.default_rng(0)
    rows = [
        {
            "input_ids": generator.integers(1, 40, 10).tolist(),
            "start_positions": int(generator.integers(0, 14)),
            "end_positions": int(generator.integers(0, 14)),
        }
        for _ in range(24)
    ]
    model = bert("QuestionAnswering", num_labels=2)
    run = trainer(tmp_path, model=model, data=datasets.Dataset.from_list(rows), pruning=UCB(0.5))
    run.train()
    assert run.pruner.table.observed.all()


# ---- how it compares -----------------------------------------------------------------------------


def logits_and_labels(dtype=torch.float32, classes=50, n=64):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, 8, generator=generator)
    head = nn.Linear(8, classes)
    return head, head(features).to(dtype), torch.randint(0, classes, (n,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_compared_behind_copies_in_another_precision(dtype):
    """accelerate converts the outputs; the model's loss belongs to what is before."""
    head, logits, labels = logits_and_labels(dtype)
    own = F.cross_entropy(logits.float(), labels)
    outputs = {"loss": own.float(), "logits": logits.float()}
    places = places_of(outputs, head)
    one = slope(own, places)
    assert one.where == "outputs"
    same = slope(F.cross_entropy(outputs["logits"], labels), places, one.where)
    half = dtype != torch.float32
    assert agree(one, same, 64, half, multiple=False) is None
    for other, least in ((F.cross_entropy(outputs["logits"], labels, label_smoothing=0.05), 0.03),
                         (2 * F.cross_entropy(outputs["logits"], labels), 0.9)):  # fmt: skip
        found = agree(one, slope(other, places, one.where), 64, half, multiple=False)
        assert found.gradients > least
    double = slope(2 * F.cross_entropy(outputs["logits"], labels), places, one.where)
    assert agree(one, double, 64, half, multiple=True) is None


def test_a_loss_that_depends_on_no_output_is_compared_by_parameters():
    head, logits, labels = logits_and_labels()
    own = F.cross_entropy(logits, labels)
    places = places_of({"loss": own}, head)
    one = slope(own, places)
    assert one.where == "parameters"
    found = agree(one, slope(own + head.bias.sum(), places, one.where), 64, False, multiple=True)
    assert found is not None


def test_without_gradients_the_values_are_compared():
    check = LossCheck(nn.Linear(2, 2), RULES["single_label"], "a model", sharded=True)
    one = slope(torch.tensor(2.0, requires_grad=True), check.places({}))
    assert one.where == ""
    other = slope(torch.tensor(2.001, requires_grad=True), {})
    assert agree(one, other, 1, False, multiple=False) is None
    assert agree(one, slope(torch.tensor(2.1), {}), 1, False, multiple=False) is not None


def test_a_loss_that_is_not_finite_is_the_trainers_matter():
    one = slope(torch.tensor(float("nan")), {})
    assert agree(one, slope(torch.tensor(1.0), {}), 1, False, multiple=False) is None


def test_a_part_of_a_batch():
    """Also of texts, which a cross-encoder has in lists; the whole if something has other rows."""
    rows = {"text": list("abcd"), "labels": torch.tensor([0, -100, 1, 2]), "prompt": "p"}
    part, taken = part_of(rows, 4, RULES["single_label"], 2)
    assert (part["text"], part["labels"].tolist(), part["prompt"], taken) == (
        ["a", "c"],
        [0, 1],
        "p",
        2,
    )
    for other in ({"more": ["x"] * 8}, {"more": torch.zeros(8)}):
        assert part_of({**rows, **other}, 4, RULES["single_label"], 2)[1] == 4


def test_batches_1_2_4_are_compared():
    check = LossCheck(nn.Linear(2, 2), RULES["single_label"], "a model")
    _, logits, labels = logits_and_labels(classes=4)
    losses = RULES["single_label"].losses({"logits": logits}, {"labels": labels}, 0.0, None)
    due = []
    for batch in range(1, 17):
        if check.due():
            due.append(batch)
            outputs = {"logits": logits}
            places = check.places(outputs)
            own = slope(F.cross_entropy(logits, labels), places)
            check(own, losses, places, outputs, {"labels": labels})
    assert due == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("model", [vit(dropout=0.5), transformers.ResNetForImageClassification])
def test_comparing_changes_nothing(model, tmp_path):
    """Dropout and the statistics of BatchNorm are those of the stock run, bit for bit."""
    if not isinstance(model, nn.Module):
        torch.manual_seed(0)
        config = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 4}
        model = model(transformers.ResNetConfig(**config, layer_type="basic"))
    stock, ours = both(tmp_path, model, images(24))
    assert same_weights(stock.model, ours.model)


def test_comparing_apart_changes_nothing(tmp_path):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, resid_pdrop=0.5)
    )
    stock, ours = both(tmp_path, model, texts("causal LM", 24, padded=True), learning_rate=1e-2)
    assert_same_weights(stock, ours, atol=2e-3)  # other dropout would differ far more


# ---- two ranks -----------------------------------------------------------------------------------


def test_on_two_ranks(tmp_path):
    done = torchrun(__file__, tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").exists()


def main(folder):
    data = texts(n=24, padded=True)
    for settings in ({}, {"ddp_find_unused_parameters": True, "bf16": True}):
        settings = {"ddp_backend": "gloo", "per_device_train_batch_size": 4, **settings}
        stock, ours = both(folder, vit(), images(24), **settings)
        assert_same_weights(stock, ours)
        wrong = of_class(WeightedForSequenceClassification, bert())
        run = trainer(folder, model=wrong, data=data, pruning=FullData(), **settings)
        with pytest.raises(ValueError, match="WeightedForSequenceClassification"):
            run.train()
    from pathlib import Path

    (Path(folder) / "done").touch()


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
