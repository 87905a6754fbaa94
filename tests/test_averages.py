"""What a loss averages: the numbers of samples, with gradient, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_dynprune.averages import Averages, around, without_gradient

B, T, C = 6, 5, 4


@pytest.fixture
def z():
    torch.manual_seed(0)
    return (torch.randn(B, T, C) * 3).requires_grad_()


LABELS = torch.arange(B * T).reshape(B, T) % C
LABELS[0, 1:] = LABELS[3, 2:] = -100
Y = torch.rand(B, generator=torch.Generator().manual_seed(1))

# name -> (the loss as a library writes it, the number of each sample by definition)
LOSSES = {
    "mean": (lambda z: z[:, 0, 0].mean(), lambda z: z[:, 0, 0]),
    "torch.mean": (lambda z: torch.mean(z[:, 0, 0]), lambda z: z[:, 0, 0]),
    "nanmean": (lambda z: z[:, 0, 0].nanmean(), lambda z: z[:, 0, 0]),
    "mean of several numbers a sample": (lambda z: z.mean(), lambda z: z.mean((1, 2))),
    "minus, and a factor": (lambda z: -3 * z[:, 0, 0].mean(), lambda z: -3 * z[:, 0, 0]),
    "a sum of two": (
        lambda z: 2 * z[:, 0, 0].mean() - z[:, 0, 1].square().mean() / 4,
        lambda z: 2 * z[:, 0, 0] - z[:, 0, 1].square() / 4,
    ),
    "added in place": (
        lambda z: z[:, 0, 0].mean().add_(0.5 * torch.mean(z[:, 0, 1])),
        lambda z: z[:, 0, 0] + 0.5 * z[:, 0, 1],
    ),
    "mse": (lambda z: nn.MSELoss()(z[:, 0, 0], Y), lambda z: (z[:, 0, 0] - Y) ** 2),
    "bce": (
        lambda z: nn.BCEWithLogitsLoss()(z[:, 0, 0], Y),
        lambda z: F.softplus(z[:, 0, 0]) - Y * z[:, 0, 0],
    ),
    "cross-entropy": (
        lambda z: nn.CrossEntropyLoss()(z[:, 0], LABELS[:, 0]),
        lambda z: -z[:, 0].log_softmax(1).gather(1, LABELS[:, :1]).squeeze(1),
    ),
    "kl": (
        lambda z: nn.KLDivLoss(reduction="batchmean")(z[:, 0].log_softmax(1), z[:, 1].softmax(1)),
        lambda z: (z[:, 1].softmax(1) * (z[:, 1].log_softmax(1) - z[:, 0].log_softmax(1))).sum(1),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("alone", [False, True])
def test_the_numbers_of_samples(name, alone, z):
    loss, by_definition = LOSSES[name]
    given = z.detach() if alone else z
    with Averages(B, alone=alone) as averages:
        value = loss(given)
        (z[:, 0, 0] * 7).mean()  # for a metric
    losses = averages.parts_of(value)
    assert torch.allclose(value, loss(z))
    expected = by_definition(z)
    torch.testing.assert_close(losses.plain, expected.detach())
    assert not losses.plain.requires_grad
    assert losses.terms.tolist() == [1.0] * B
    if not alone:
        torch.testing.assert_close(losses.train, expected)
        weights = torch.arange(B) / B
        one, other = (
            torch.autograd.grad((weights * rows).sum(), z, retain_graph=True)[0]
            for rows in (losses.train, expected)
        )
        torch.testing.assert_close(one, other)


def test_tokens_of_a_batch(z):
    """Trained as the mean over the batch's tokens is; observed as the mean over a sample's own."""
    with Averages(B) as averages:
        loss = nn.CrossEntropyLoss()(z.view(-1, C), LABELS.view(-1))
    losses = averages.parts_of(loss)
    expected = F.cross_entropy(z.view(-1, C), LABELS.view(-1))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(losses.train.mean(), expected)
    own = [F.cross_entropy(row, labels) for row, labels in zip(z, LABELS, strict=True)]
    torch.testing.assert_close(losses.plain, torch.stack(own).detach())
    one, other = (torch.autograd.grad(x, z)[0] for x in (losses.train.mean(), expected))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: torch.logsumexp(z[:, 0, 0], 0),
        lambda z: z[:, 0, 0].sum(),
        lambda z: z[: B - 1, 0, 0].mean(),  # of other numbers than those of the samples
        lambda z: z[:, 0].mean(0).sum(),
        lambda z: F.cross_entropy(z[:, 0], LABELS[:, 0], weight=torch.arange(C) + 1.0),
        lambda z: z[:, 0, 0].detach().mean() + z.sum(),
    ],
)
def test_nothing_is_averaged_over_samples(loss, z):
    with Averages(B) as averages:
        value = loss(z)
    assert averages.parts_of(value) is None
    torch.testing.assert_close(value, loss(z))


def test_a_mean_of_means_counts_once(z):
    with Averages(B) as averages:
        loss = torch.stack([z[:, 0, 0].mean(), z[:, 0, 1].mean()]).mean()
    losses = averages.parts_of(loss)
    torch.testing.assert_close(losses.train, (z[:, 0, 0] + z[:, 0, 1]) / 2)


def test_passes_without_gradient():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        with without_gradient(model), Averages(3, alone=True) as averages:
            out = model(torch.ones(3, 2))
            assert not out.requires_grad
            loss = -out.squeeze(1).mean()
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(averages.parts_of(loss).plain, -out.squeeze(1))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_pass_is_not_watched():
    class Model(nn.Linear):
        def forward(self, x):
            seen.append(len(torch.overrides._get_current_function_mode_stack()))
            if fails:
                raise KeyError("in a pass")
            return super().forward(x)

    model, seen, fails, x = Model(2, 1), [], False, torch.ones(3, 2)
    averages = Averages(3)
    with around([model], averages.pause, averages.resume), averages:
        loss = (model(x).squeeze(1) * model(x).squeeze(1)).mean()
    torch.testing.assert_close(averages.parts_of(loss).train, model(x).squeeze(1) ** 2)
    fails, averages = True, Averages(3)
    with (
        pytest.raises(KeyError),
        around([model], averages.pause, averages.resume),
        averages,
    ):
        model(x)
    assert seen == [0] * 4
    assert torch.overrides._get_current_function_mode_stack() == []
