"""The effective share: by hand, at its limits, in runs; and the line through our studies."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import trainer

from hf_dynprune import DynamicPruner, FullData, LossProportional, OrderDP, RandomPruning
from hf_dynprune.policies import IES, UCB
from hf_dynprune.potential import (
    STUDIES,
    Fit,
    Magnitude,
    effective_share,
    fit_line,
    magnitude_of_rule,
    measure,
    predicted_saving,
    read_rollout_log,
)
from hf_dynprune.report import EpochRecord, PruningReport
from hf_dynprune.table import Counts, History, Last, Memories, MovingMean
from recipes.studies.potential import (
    compared,
    main,
    plot_predicted,
    points_of,
    potential,
    saving_of,
)

NAN, INF = math.nan, math.inf
STORED = Path(__file__).parents[1] / "recipes" / "results" / "potential.json"


# ---- the number ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("magnitudes", "expected"),
    [
        ([1.0, 2.0, 3.0], 36 / (3 * 14)),
        ([3.0, 1.0], 16 / (2 * 10)),
        ([0.7, 0.7, 0.7, 0.7], 1.0),  # all equal
        ([0.0, 0.0, 5.0, 0.0], 1 / 4),  # one sample has all
        ([2.0, 2.0, 0.0, 0.0], 1 / 2),  # half of them, alike
        ([NAN, 1.0, NAN, 3.0], 16 / (2 * 10)),  # never observed samples are left out
        ([4.0], 1.0),
        ([1e38, 2e38, 3e38], 6 / 7),  # squares beyond float32
        ([1e-38, 2e-38, 3e-38], 6 / 7),
    ],
)
def test_share_by_hand(magnitudes, expected):
    assert effective_share(torch.tensor(magnitudes)) == pytest.approx(expected, rel=1e-6)


def test_share_is_exact_at_its_limits():
    assert effective_share(torch.full((1001,), 0.1)) <= 1.0
    assert effective_share(torch.full((1001,), 0.1)) == pytest.approx(1.0, abs=1e-12)
    huge = torch.tensor([1e300, 2e300, 3e300], dtype=torch.float64)
    assert effective_share(huge) == pytest.approx(6 / 7)


@pytest.mark.parametrize(
    ("magnitudes", "error", "value"),
    [
        (torch.zeros(0), ValueError, "0 samples"),
        (torch.full((3,), NAN), ValueError, "3 samples"),
        (torch.zeros(4), ValueError, "all 4 samples are 0"),
        (torch.tensor([1.0, -2.0]), ValueError, r"-2\.0"),
        (torch.tensor([1.0, INF]), ValueError, "inf"),
        (torch.ones(2, 2), ValueError, r"\(2, 2\)"),
        (torch.tensor([1, 2]), TypeError, "int64"),
        (torch.tensor([True, False]), TypeError, "bool"),
        ([1.0, 2.0], TypeError, "list"),
    ],
)
def test_share_refuses(magnitudes, error, value):
    with pytest.raises(error, match=value):
        effective_share(magnitudes)


def test_magnitudes_by_hand():
    p = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    loss = -p.log()
    torch.testing.assert_close(Magnitude("loss").of(loss), 1 - p)
    error = torch.tensor([4.0, 0.25, NAN])
    expected = torch.tensor([2.0, 0.5, NAN], dtype=torch.float64)
    torch.testing.assert_close(Magnitude("loss", "error").of(error), expected, equal_nan=True)
    assert Magnitude("reward_std", "signal").of(error)[:2].tolist() == [4.0, 0.25]
    # 1 - exp(-u) keeps its digits near 0, where float32 would give 0 or 6e-8
    assert Magnitude().of(torch.tensor([1e-12])).item() == pytest.approx(1e-12, rel=1e-6)


def test_magnitude_says_its_formula_and_refuses():
    assert str(Magnitude()) == "1 - exp(-loss)"
    assert str(Magnitude("reward_std", "signal")) == "reward_std"
    with pytest.raises(ValueError, match="'gradient'"):
        Magnitude("loss", "gradient")
    with pytest.raises(TypeError, match="signal=3"):
        Magnitude(3)


@pytest.mark.parametrize(
    "last", [torch.zeros(3), torch.tensor([-1.0, 2.0]), torch.full((3,), NAN), torch.zeros(0)]
)
def test_measure_gives_no_number_where_there_is_none(last):
    assert measure(last, Magnitude()) is None


def test_magnitude_follows_the_rule_of_the_loss():
    class Config:
        problem_type, num_labels = None, 1

    assert magnitude_of_rule("batch_mean") is None
    assert magnitude_of_rule("classification", Config).kind == "error"
    assert magnitude_of_rule("shifted_tokens", Config).kind == "likelihood"
    Config.num_labels = 3
    assert magnitude_of_rule("classification", Config).kind == "likelihood"
    Config.problem_type = "regression"
    assert magnitude_of_rule("classification", Config).kind == "error"
    assert magnitude_of_rule("classification").kind == "likelihood"


@pytest.mark.parametrize(
    ("memory", "column"),
    [
        (Last("correct", "loss"), "loss"),
        (Last("correct"), None),
        (MovingMean("loss", 0.8), None),
        (MovingMean("loss", 1.0), "mean"),
        (MovingMean("el2n", 1.0), None),
        (History("loss", 3), "loss_0"),
        (Counts("correct"), None),
        (Memories(MovingMean("loss", 0.8), History("loss", 2)), "loss_0"),
        (Memories(), None),
    ],
)
def test_memories_know_where_the_last_observation_is(memory, column):
    assert memory.last_of("loss") == column


# ---- in a run of the core ------------------------------------------------------------------------


def run(policy, losses, *, epochs=2, **given):
    """A run whose sample i has the loss losses[i] / (epoch + 1)."""
    pruner = DynamicPruner(policy, len(losses), batch_size=2, num_epochs=epochs, **given)
    for epoch in range(epochs):
        pruner.begin_epoch(epoch)
        for index in torch.tensor(list(pruner.sampler)).split(2):
            pruner.observe(index, {"loss": torch.tensor(losses)[index] / (epoch + 1)})
    pruner.end_epoch()
    return pruner


LOSSES = [0.1, 0.2, 0.4, 3.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "policy",
    [FullData(), RandomPruning(1.0), UCB(1.0), OrderDP(1.0), IES(scoring="trained")],
    ids=str,
)
def test_share_of_each_epoch_is_that_of_the_last_losses(policy):
    pruner = run(policy, LOSSES, magnitude=Magnitude())
    for epoch, record in enumerate(pruner.report.epochs):
        s = 1 - (-torch.tensor(LOSSES, dtype=torch.float64) / (epoch + 1)).exp()
        expected = float(s.sum() ** 2 / (6 * (s**2).sum()))
        assert record.effective_share == pytest.approx(expected, rel=1e-6)
    assert pruner.report.magnitude == "1 - exp(-loss)"


@pytest.mark.parametrize(
    ("policy", "more"), [(FullData(), 1), (UCB(0.5), 1), (OrderDP(0.5), 0), (IES(), 0)], ids=str
)
def test_a_column_is_added_only_if_none_holds_the_loss(policy, more):
    plain = DynamicPruner(policy, 6, num_epochs=2)
    measured = DynamicPruner(policy, 6, num_epochs=2, magnitude=Magnitude())
    assert len(measured.table.columns) - len(plain.table.columns) == more


def test_dropped_samples_count_by_their_last_loss_and_unseen_ones_not():
    pruner = run(RandomPruning(0.5, replacement=False), LOSSES, epochs=1, magnitude=Magnitude())
    last = pruner.table["loss"]
    assert int(last.isnan().sum()) == 3
    share = pruner.report.epochs[0].effective_share
    assert share == pytest.approx(effective_share(Magnitude().of(last[~last.isnan()])))
    longer = run(RandomPruning(0.5, replacement=False), LOSSES, epochs=2, magnitude=Magnitude())
    assert not longer.table["loss"].isnan().any()  # those of epoch 0 keep their loss
    kept_first = pruner.plan.indices
    torch.testing.assert_close(longer.table["loss"][kept_first], torch.tensor(LOSSES)[kept_first])


def test_choices_do_not_depend_on_the_measurement():
    policy = LossProportional(0.5)
    plain, measured = (
        run(policy, LOSSES, epochs=5),
        run(policy, LOSSES, epochs=5, magnitude=Magnitude()),
    )
    assert torch.equal(plain.table["times_kept"], measured.table["times_kept"])
    assert torch.equal(plain.table["mean"], measured.table["mean"])
    assert plain.report.gain is None
    assert plain.report.magnitude == ""


def test_a_column_of_another_meaning_is_left_alone():
    class Mine(Last):
        def last_of(self, signal):
            return None

    pruner = run(FullData(), LOSSES, memory=Mine("loss"), magnitude=Magnitude())
    assert pruner.report.gain is None


def test_a_run_that_is_continued_has_the_same_shares():
    whole = run(UCB(0.5), LOSSES, epochs=4, magnitude=Magnitude())
    begun = run(UCB(0.5), LOSSES, epochs=2, magnitude=Magnitude())
    resumed = DynamicPruner(UCB(0.5), 6, batch_size=2, num_epochs=4, magnitude=Magnitude())
    resumed.load_state_dict(begun.state_dict())
    for epoch in (2, 3):
        resumed.begin_epoch(epoch)
        for index in torch.tensor(list(resumed.sampler)).split(2):
            resumed.observe(index, {"loss": torch.tensor(LOSSES)[index] / (epoch + 1)})
    resumed.end_epoch()
    shares = [[r.effective_share for r in one.report.epochs] for one in (whole, resumed)]
    assert shares[0] == shares[1]


# ---- in the report -------------------------------------------------------------------------------


def report_of(*shares):
    records = [EpochRecord(i, True, 10, effective_share=share) for i, share in enumerate(shares)]
    return PruningReport({"name": "full"}, 10, 0, 0, epochs=records, magnitude="1 - exp(-loss)")


def test_gain_is_the_mean_over_the_epochs():
    report = report_of(None, 0.5, 0.8, 0.4)
    assert report.effective_share == 0.4
    assert report.gain == pytest.approx((2 + 1.25 + 2.5) / 3)
    assert report_of(None).gain is None
    assert "effective share" in report.summary()
    assert "effective share" not in report_of(None).summary()


def test_report_is_written_and_read(tmp_path):
    report = report_of(None, 0.5)
    report.save(tmp_path / "report.json")
    assert PruningReport.load(tmp_path / "report.json") == report
    values = report.to_dict()
    assert "effective_share" not in values["epochs"][0]  # as in earlier reports
    for wrong in (0, -0.5, 1.5, "NaN", True):
        values["epochs"][1]["effective_share"] = wrong
        with pytest.raises(ValueError, match=r"epochs\[1\]\.effective_share"):
            PruningReport.from_dict(values)


# ---- in the Trainer ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [FullData(), LossProportional(0.5), RandomPruning(0.5)], ids=str)
def test_trainer_measures_every_run(policy, tmp_path):
    ours = trainer(tmp_path, pruning=policy)
    ours.train()
    report, table = ours.pruning_report, ours.pruner.table
    known = table["loss"][~table["loss"].isnan()]
    assert report.effective_share == pytest.approx(effective_share(Magnitude().of(known)))
    shares = [record.effective_share for record in report.epochs]
    assert all(0 < share <= 1 for share in shares)
    logged = [e["pruning/effective_share"] for e in ours.state.log_history if _KEY in e]
    assert logged == shares  # each at the start of the next epoch, the last at the end of the run


_KEY = "pruning/effective_share"


def test_confidence_is_what_the_loss_tells(tmp_path):
    """exp(-loss) of the plain loss, without label smoothing, is the probability of the label."""
    once = trainer(
        tmp_path,
        pruning=UCB(1.0, signal="confidence"),
        num_train_epochs=1,
        label_smoothing_factor=0.2,
    )
    once.train()
    confidence = once.pruner.table["mean"].double()  # the mean of one observation
    s = Magnitude().of(once.pruner.table["loss"])
    torch.testing.assert_close(s, 1 - confidence, rtol=1e-4, atol=1e-6)


def test_a_run_without_a_loss_of_one_sample_has_no_number(tmp_path):
    def batch_loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    ours = trainer(tmp_path, pruning=RandomPruning(0.5), extra={"compute_loss_func": batch_loss})
    ours.train()
    assert ours.loss_rule is None
    assert ours.pruning_report.gain is None
    assert "loss" not in ours.pruner.table.columns
    assert not any(_KEY in entry for entry in ours.state.log_history)


def test_losses_of_a_batch_have_no_number(tmp_path):
    ours = trainer(tmp_path, pruning=UCB(0.5), extra={"per_sample_loss_fn": "batch_mean"})
    ours.train()
    assert ours.pruning_report.gain is None


# ---- what the studies let expect -----------------------------------------------------------------


def test_line_by_hand():
    # log saving = 0.1 + 2 log G, without noise
    gains = [1.0, 1.2, 1.5]
    fit = fit_line(gains, [math.exp(0.1 + 2 * math.log(g)) for g in gains], 12.706)
    assert (fit.intercept, fit.slope) == pytest.approx((0.1, 2.0))
    assert fit.deviation == pytest.approx(0.0, abs=1e-12)
    assert predicted_saving(1.2, fit) == pytest.approx([math.exp(0.1) * 1.44] * 3)
    # beyond the studies the line is not continued
    assert predicted_saving(9.0, fit) == pytest.approx(predicted_saving(1.5, fit))


def test_interval_by_hand():
    fit = Fit(0.0, 1.0, 0.1, 2.0, 4, 0.0, 0.5, 1.0, 2.0)
    found = predicted_saving(1.5, fit)
    half = 2.0 * 0.1 * math.sqrt(1 + 1 / 4 + math.log(1.5) ** 2 / 0.5)
    assert found == pytest.approx((1.5, 1.5 * math.exp(-half), 1.5 * math.exp(half)))
    assert found.shares[0] == pytest.approx(1 / 3)


@pytest.mark.parametrize("gain", [0.9, NAN, INF, "2"])
def test_saving_refuses(gain):
    with pytest.raises(ValueError, match=f"gain={gain!r}"):
        predicted_saving(gain)


@pytest.mark.parametrize(
    ("gains", "savings"),
    [([1.0, 2.0], [1.0, 2.0]), ([1.0] * 3, [1.0] * 3), ([1.0, 2.0, 3.0], [1.0])],
)
def test_line_refuses(gains, savings):
    with pytest.raises(ValueError, match=f"{len(gains)} gains"):
        fit_line(gains, savings, 2.0)


def test_shipped_line_is_the_stored_one():
    stored = json.loads(STORED.read_text())
    assert STUDIES._asdict() == pytest.approx(stored["fit"], rel=1e-5)
    fitted = [point for point in stored["points"] if point["fitted"]]
    assert len(fitted) == STUDIES.studies
    again = fit_line([p["gain"] for p in fitted], [p["saving"] for p in fitted], STUDIES.quantile)
    assert again._asdict() == pytest.approx(stored["fit"])


def test_predictions_are_written_before_a_study(tmp_path):
    report_of(0.8, 0.8).save(tmp_path / "short" / "report.json")
    output = ["--output", str(tmp_path / "out.json")]
    command = ["--predict", f"cifar@0.3={tmp_path / 'short'}", *output]
    main(command)
    (setting,) = json.loads((tmp_path / "out.json").read_text())["settings"]
    assert (setting["study"], setting["cost"]) == ("cifar", 0.3)
    assert setting["gain"] == pytest.approx(1.25)
    assert [setting["saving"]["factor"], *setting["saving"]["interval"]] == pytest.approx(
        predicted_saving(1.25)
    )
    # Further settings are added, and those in the file replaced.
    report_of(1.0).save(tmp_path / "other" / "report.json")
    other = tmp_path / "other"
    main(["--predict", f"cifar@0.3={other}", f"cifar@0.5={other}", *output])
    settings = json.loads((tmp_path / "out.json").read_text())["settings"]
    assert [(row["study"], row["cost"], row["gain"]) for row in settings] == [
        ("cifar", 0.3, 1.0),
        ("cifar", 0.5, 1.0),
    ]
    # Predictions of several lines in one file could not be told apart.
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"fit": {**STUDIES._asdict(), "slope": 9.0}, "settings": []}))
    of_another_line = [*command[:2], "--output", str(old)]
    with pytest.raises(SystemExit):
        main(of_another_line)
    report_of(None).save(tmp_path / "short" / "report.json")
    for wrong in (command, ["--predict", "cifar=runs", *output], command[:2]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_predictions_beside_what_was_measured(tmp_path):
    def row(name, cost, mean, interval=None):
        to_short = interval and {"mean": mean - 0.6, "interval": interval}
        known = {"name": name, "wanted": cost, "mean": mean, "ranked": True}
        return {**known, "to_short_run": to_short or {"interval": None}}

    def study(name, reached, interval):
        rows = [row("full run", 1.0, 0.7), row("short run", 0.5, 0.6)]
        rows.append(row("loss-proportional", 0.5, reached, interval))
        folder = tmp_path / name
        report_of(0.5).save(folder / "loss_proportional_0.5_seed0" / "report.json")
        (folder / "summary.json").write_text(json.dumps({"metric": "accuracy", "rows": rows}))
        return folder

    folders = [study("a", 0.65, [0.0, 0.1]), study("b", 0.6, None), study("c", 0.55, [-0.1, 0.0])]
    predicted = [
        {"study": name, "cost": cost, "saving": {"factor": factor, "interval": [0.9, 1.5]}}
        for name, cost, factor in (("a", 0.5, 1.3), ("b", 0.5, 1.2), ("c", 0.5, 1.0), ("a", 0.3, 1))
    ] + [{"study": "unfinished", "cost": 0.5, "saving": {"factor": 1, "interval": [1, 1]}}]
    found = compared(folders, predicted)
    measured = [setting["measured"] for setting in found["settings"]]
    assert [point["study"] for point in measured] == ["a", "b", "c"]
    assert [point["saving"] for point in measured] == pytest.approx([2**0.5, 1, 2**-0.5])
    # 0.1 is what the full run has more, at twice the cost.
    assert measured[0]["interval"] == pytest.approx([1, 2])
    assert measured[1]["interval"] is None
    assert measured[0]["gain"] == 2
    assert found["within"] == 2
    assert found["rank_correlation"] == pytest.approx(1)
    assert compared(folders[:2], predicted)["rank_correlation"] is None
    ax = plot_predicted(found["settings"]).axes[0]
    assert [label.get_text()[0] for label in ax.get_yticklabels()] == ["c", "b", "a"]
    ends = [bar.lines[2][0].get_segments()[0][:, 0].tolist() for bar in ax.containers]
    assert ends[::2] == [pytest.approx([0.9, 1.5])] * 3
    assert ends[1::2] == [pytest.approx(pair) for pair in ([0.5, 1], [1, 1], [1, 2])]


def test_predicted_studies_are_fitted_once_they_are_measured():
    names = ("cifar10_16px", "cifar10_resnet8", "cifar100_16px")
    studies = [STORED.parent / "studies" / name for name in names]
    saving = {"factor": 1.0, "interval": [0.9, 1.1]}
    predicted = [{"study": "cifar100_16px", "cost": 0.3, "saving": saving}]
    found = potential(studies, predicted)
    assert {point["study"] for point in found["points"] if point["predicted_first"]} == {names[2]}
    assert (found["before"]["fit"]["studies"], found["fit"]["studies"]) == (4, 5)
    assert potential(studies[:2], [])["fit"] == found["before"]["fit"]
    (setting,) = found["predicted"]["settings"]
    assert setting["measured"]["study"] == "cifar100_16px"


def test_settings_were_predicted_by_the_line_that_was_known_before():
    before = json.loads(STORED.read_text())["before"]
    predicted = json.loads((STORED.parent / "predicted.json").read_text())
    assert predicted["fit"] == pytest.approx(before["fit"], rel=1e-5)
    for setting in predicted["settings"]:
        expected = predicted_saving(setting["gain"], Fit(**before["fit"]))
        saving = setting["saving"]
        assert [saving["factor"], *saving["interval"]] == pytest.approx(expected, rel=1e-4)


def test_stored_points_are_those_of_the_reports():
    stored = json.loads(STORED.read_text())["points"]
    study = "cifar10_resnet20_16px"
    (found,) = points_of(STORED.parent / "studies" / study)
    (expected,) = (point for point in stored if point["study"] == study)
    assert {**found, "predicted_first": False} == pytest.approx(expected)


def test_measured_saving_by_hand():
    # On all data 60 % at half the cost, 70 % at the whole. 65 % needs sqrt(2) times half the cost.
    assert saving_of(0.5, 0.65, {0.5: 0.6, 1.0: 0.7}) == pytest.approx(math.sqrt(2))
    assert saving_of(0.5, 0.55, {0.5: 0.6, 1.0: 0.7}) == pytest.approx(1 / math.sqrt(2))


# ---- a log of reinforcement learning -------------------------------------------------------------


def log_of(folder, *entries):
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    return folder


def entry(zero, step, epoch, **more):
    return {"frac_reward_zero_std": zero, "step": step, "epoch": epoch, **more}


def test_log_by_hand(tmp_path):
    """10 steps of 0.5 and 30 of 0.1. An evaluation and the end of the run do not count."""
    other = {"eval_frac_reward_zero_std": 0.0, "step": 10}, {"train_loss": NAN, "step": 40}
    log = read_rollout_log(log_of(tmp_path, entry(0.5, 10, 3), *other, entry(0.9, 40, 12.0)))
    assert log.effective_share == pytest.approx(0.2)
    assert (log.first, log.last) == (pytest.approx(0.5), pytest.approx(0.1))
    assert log.gain == pytest.approx(5)
    assert (log.steps, log.entries, log.visits) == (40, 2, 12.0)
    assert log == read_rollout_log(tmp_path / "trainer_state.json")
    assert "G = 5.0" in str(log)


def test_a_log_says_whether_prompts_were_visited_often_enough(tmp_path):
    answers = {
        str(read_rollout_log(log_of(tmp_path, entry(0.5, 10, visits, **more)))).splitlines()[2]
        for visits, more in ((2.0, {}), (20.0, {}), (20.0, {"pruning/effective_prompts": 0.5}))
    }
    assert len(answers) == 3
    assert any("2.0" in answer for answer in answers)


def test_a_log_without_steps_counts_its_entries(tmp_path):
    log = read_rollout_log(log_of(tmp_path, *({"frac_reward_zero_std": x} for x in (0.0, 0.5))))
    assert (log.effective_share, log.steps, log.visits) == (0.75, 2, None)


def test_a_log_in_which_nothing_had_a_gradient(tmp_path):
    log = read_rollout_log(log_of(tmp_path, entry(1.0, 10, 1.0)))
    assert (log.effective_share, log.gain) == (0.0, INF)
    assert str(log)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{", "line 1"),
        ("[]", r"\[\]"),
        ("{}", "log_history"),
        ('{"log_history": [3]}', r"log_history\[0\]=3"),
        ('{"log_history": [{"loss": 1.0}]}', "frac_reward_zero_std"),
        ('{"log_history": [{"frac_reward_zero_std": 1.5}]}', "1.5"),
        ('{"log_history": [{"frac_reward_zero_std": NaN}]}', "nan"),
        ('{"log_history": [{"frac_reward_zero_std": 1, "step": -3}]}', "-3"),
        ('{"log_history": [{"frac_reward_zero_std": 1, "epoch": "x"}]}', "'x'"),
    ],
)
def test_other_files_are_refused(text, value, tmp_path):
    file = tmp_path / "trainer_state.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=value) as error:
        read_rollout_log(file)
    assert str(file) in str(error.value)


def test_a_missing_log_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(FileNotFoundError, match=str(path)):
            read_rollout_log(path)
