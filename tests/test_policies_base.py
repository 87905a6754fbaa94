"""The contract of the policies: plans, choices, fields, names, and what follows from them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from choosing import INF, NAN, assert_refused, choice_of, plan_of, table_of

from hf_dynprune.policies import (
    IES,
    KAKURENBO,
    POLICIES,
    UCB,
    Choice,
    EpochPlan,
    EpsilonGreedy,
    FullData,
    InfoBatch,
    KeepsShare,
    LossProportional,
    OrderDP,
    PruningPolicy,
    RandomPruning,
    ScoredPolicy,
    SeTa,
    StaticPruning,
    make_policy,
)
from hf_dynprune.schedule import RunShape
from hf_dynprune.table import Last, Memories, SampleTable

# ---- plans ---------------------------------------------------------------------------------------


def test_plan_holds_what_it_was_given():
    plan = EpochPlan(torch.tensor([4, 1]), torch.tensor([1.0, 2.0]), 0.5)
    plan.check(5)
    assert len(plan) == 2
    assert plan.indices.tolist() == [4, 1]
    assert EpochPlan(torch.tensor([0])).weights is None
    assert EpochPlan(torch.tensor([0])).lr_scale == 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.lr_scale = 1.0


@pytest.mark.parametrize(
    ("indices", "found"),
    [
        (torch.tensor([0, 1], dtype=torch.int32), r"int32.*\(2,\)"),
        (torch.tensor([0.0, 1.0]), r"float32.*\(2,\)"),
        (torch.tensor([True, False]), r"bool.*\(2,\)"),
        (torch.tensor([[0, 1]]), r"\(1, 2\)"),
        (torch.tensor(3), r"\(\)"),
    ],
)
def test_plan_refuses_other_indices(indices, found):
    with pytest.raises(TypeError, match=found):
        EpochPlan(indices)


def test_plan_refuses_to_keep_nothing():
    with pytest.raises(ValueError, match="0 samples"):
        EpochPlan(torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        (torch.ones(3), r"\(3,\).*\(2,\)"),
        (torch.ones(2, 1), r"\(2, 1\)"),
        (torch.ones(2, dtype=torch.float64), "float64"),
        *[(torch.tensor([1.0, bad]), "weights") for bad in (0.0, -1.0, NAN, INF)],
    ],
)
def test_plan_refuses_other_weights(weights, found):
    with pytest.raises(ValueError, match=found):
        EpochPlan(torch.tensor([0, 1]), weights)


@pytest.mark.parametrize("lr_scale", [0.0, -1.0, NAN, INF])
def test_plan_refuses_other_lr_scale(lr_scale):
    with pytest.raises(ValueError, match=f"lr_scale={lr_scale}"):
        EpochPlan(torch.tensor([0]), lr_scale=lr_scale)


@pytest.mark.parametrize(
    ("indices", "wrong"),
    [([0, 5], "5"), ([-1, 0], "-1"), ([-1, 7], "-1"), ([0, 3, 3], "3 indices.* 2 ")],
)
def test_check_of_a_plan(indices, wrong):
    with pytest.raises(ValueError, match=wrong):
        EpochPlan(torch.tensor(indices)).check(5)


def test_a_plan_in_any_order_is_checked():
    EpochPlan(torch.tensor([3, 0, 2])).check(4)
    EpochPlan(torch.tensor([0, 2, 3])).check(4)
    for wrong in ([0, 2, 2], [2, 0, 2]):
        with pytest.raises(ValueError, match=r"3 indices.* 2 "):
            EpochPlan(torch.tensor(wrong)).check(4)


# ---- choices -------------------------------------------------------------------------------------


def test_a_choice_knows_the_run():
    policy = RandomPruning(0.3)
    choice = choice_of(policy, SampleTable(10), epoch=2, progress=0.5)
    assert (choice.n, choice.size, choice.epoch, choice.progress) == (10, 3, 2, 0.5)
    assert choice.shape.samples == 10
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.size = 4


def test_the_score_of_a_choice_without_scores_is_an_error():
    with pytest.raises(RuntimeError, match="ScoredPolicy"):
        _ = choice_of(RandomPruning(), SampleTable(3)).score
    scores = torch.ones(3)
    assert choice_of(UCB(), table_of(UCB(), {}, 3), scores).score is scores


def test_the_size_of_a_choice_is_n_if_it_depends_on_the_data():
    assert choice_of(IES(), table_of(IES(), {}, 7)).size == 7


# ---- fields --------------------------------------------------------------------------------------


BAD = [
    *[(RandomPruning, "keep_ratio", v, ValueError) for v in (0, 0.0, -0.1, 1.5, NAN, INF)],
    *[(RandomPruning, "keep_ratio", v, TypeError) for v in ("0.3", True, None)],
    *[(UCB, "period", v, ValueError) for v in (0, -1)],
    *[(UCB, "period", v, TypeError) for v in (1.5, 2.0, True, "2", None)],
    *[(FullData, "first", v, ValueError) for v in (-1,)],
    *[(UCB, "first", v, TypeError) for v in (0.5, False, None)],
    *[(RandomPruning, "last", v, ValueError) for v in (-0.1, 1.1, NAN, INF, 10)],
    *[(UCB, "last", v, TypeError) for v in ("0.1", None, True)],
    *[(UCB, "max_age", v, ValueError) for v in (0, -1)],
    *[(UCB, "max_age", v, TypeError) for v in (1.5, True, "3")],
    *[(UCB, "exclude_hardest", v, ValueError) for v in (1, 1.0, -0.1, NAN, INF)],
    *[(UCB, "exclude_hardest", v, TypeError) for v in (None, "0.1", True)],
    *[(UCB, "exclude_ramp", v, TypeError) for v in (0.5, "ab", (0.1,), (0, True), (0, "1"))],
    *[
        (UCB, "exclude_ramp", v, ValueError)
        for v in ((0.5, 0.5), (0.6, 0.2), (-0.1, 1), (0.0, 1.1), (NAN, 1.0), (0.0, INF))
    ],
    (UCB, "exclude_ramp", (0.0, 1.0), ValueError),  # without exclude_hardest
    *[(UCB, "max_weight", v, ValueError) for v in (0, -1.0, NAN, INF)],
    *[(UCB, "max_weight", v, TypeError) for v in ("2", True)],
    *[(UCB, "min_per_class", v, ValueError) for v in (-1,)],
    *[(UCB, "min_per_class", v, TypeError) for v in (0.5, True, None)],
    *[(cls, "scoring", v, ValueError) for cls in (UCB, InfoBatch) for v in ("some", None, 1)],
    *[(UCB, "scoring_mode", v, ValueError) for v in ("some", 1)],
    *[(RandomPruning, "scoring", v, ValueError) for v in ("all", "dropped")],  # it has no scores
]


@pytest.mark.parametrize(("cls", "name", "value", "error"), BAD)
def test_bad_value_is_named(cls, name, value, error):
    assert_refused(cls, name, value, error)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (UCB, {"keep_ratio": 1}),
        (
            UCB,
            {
                "keep_ratio": 1.0,
                "c": 0,
                "decay": 1,
                "epsilon": 1,
                "last": 1,
                "first": 0,
                "period": 1,
            },
        ),
        (
            EpsilonGreedy,
            {
                "epsilon": 0,
                "decay": 1e-3,
                "last": 0,
                "exclude_hardest": 0,
                "max_age": 1,
                "max_weight": 1e-3,
            },
        ),
        (
            RandomPruning,
            {
                "keep_ratio": 1e-9,
                "first": 100,
                "period": 1000,
                "max_age": None,
                "exclude_hardest": 0.0,
            },
        ),
        (FullData, {"last": 1.0, "max_weight": 2}),
    ],
)
def test_values_at_the_limits_are_fine(cls, settings):
    assert dataclasses.asdict(cls(**settings)).items() >= settings.items()


@pytest.mark.parametrize(
    ("cls", "guard", "value"),
    [(RandomPruning, "max_age", 3), (FullData, "max_age", 3), (FullData, "exclude_hardest", 0.1)],
)
def test_guards_of_scores_need_scores(cls, guard, value):
    with pytest.raises(ValueError, match=rf"{guard}={value}.*{cls.__name__}"):
        cls(**{guard: value})


def test_policy_is_frozen_and_equal_by_value():
    policy = UCB(keep_ratio=0.3)
    assert policy == UCB(keep_ratio=0.3)
    assert policy != UCB(keep_ratio=0.3, period=2)
    assert hash(policy) == hash(UCB(keep_ratio=0.3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.keep_ratio = 0.5


def test_base_fields_are_keyword_only():
    assert UCB(0.3).keep_ratio == 0.3
    assert RandomPruning(0.3, False).replacement is False
    with pytest.raises(TypeError):
        FullData(2)


def test_abstract_policy_cannot_be_made():
    for cls in (PruningPolicy, ScoredPolicy, KeepsShare):
        with pytest.raises(TypeError, match=cls.__name__):
            cls()


@pytest.mark.parametrize(
    ("name", "value"),
    [("keep_ratio", np.float32(0.5)), ("keep_ratio", np.float64(0.5)), ("period", np.int64(2))],
)
def test_numbers_of_numpy_are_refused_at_once_or_can_be_saved(name, value):
    try:
        policy = UCB(**{name: value})
    except TypeError:
        return
    assert make_policy(**json.loads(json.dumps(policy.to_dict()))) == policy


# ---- what the authors ran ------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [RandomPruning, EpsilonGreedy, UCB])
def test_paper_like_has_period_10(cls):
    assert cls.paper_like() == cls(period=10)
    assert cls.paper_like(period=3, last=0.5) == cls(period=3, last=0.5)


def test_settings_of_the_authors_are_read_from_the_class():
    assert OrderDP.paper_like() == OrderDP(0.3, draw_ratio=0.8)
    assert SeTa.paper_like(period=2) == SeTa(prune_ratio=0.1, groups=5, window=0.9, period=2)


@pytest.mark.parametrize("cls", [FullData, LossProportional, InfoBatch, KAKURENBO, IES])
def test_what_the_authors_ran_is_the_default(cls):
    assert cls.paper_like() == cls()
    assert cls.paper_like(period=3) == cls(period=3)


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("full", FullData()),
        ("random", RandomPruning()),
        ("epsilon-greedy", EpsilonGreedy()),
        ("epsilon_greedy", EpsilonGreedy()),
        ("Epsilon-Greedy", EpsilonGreedy()),
        ("ucb", UCB()),
        ("UCB", UCB()),
    ],
)
def test_make_policy(name, policy):
    assert make_policy(name) == policy


def test_make_policy_takes_fields():
    assert make_policy("ucb", keep_ratio=0.3, last=0.1) == UCB(keep_ratio=0.3, last=0.1)
    with pytest.raises(ValueError, match="keep_ratio=3"):
        make_policy("ucb", keep_ratio=3)


@pytest.mark.parametrize(
    ("name", "near"),
    [("ucbb", "ucb"), ("UBC", "ucb"), ("epsilon", "epsilon-greedy"), ("ramdom", "random")],
)
def test_unknown_policy_suggests_the_near_ones(name, near):
    with pytest.raises(ValueError, match=f"'{name}'.*'{near}'.*\\?.*'full', 'random'"):
        make_policy(name)


def test_unknown_policy_far_from_all_lists_the_names():
    with pytest.raises(ValueError, match=r"'xyz'.*'full', 'random', 'epsilon-greedy', 'ucb'"):
        make_policy("xyz")


@pytest.mark.parametrize("name", [None, 3, UCB])
def test_name_of_a_policy_is_text(name):
    with pytest.raises(TypeError, match="'full', 'random'"):
        make_policy(name)


def test_unknown_field_suggests_the_near_ones():
    with pytest.raises(ValueError, match=r"'ucb'.*'keepratio'.*'keep_ratio'.*period"):
        make_policy("ucb", keepratio=0.3)
    with pytest.raises(ValueError, match=r"'full'.*'keep_ratio'"):
        make_policy("full", keep_ratio=0.3)


@pytest.mark.parametrize(
    "policy",
    [
        FullData(first=2),
        RandomPruning(0.3, replacement=False, period=10),
        EpsilonGreedy(0.7, epsilon=0.2, max_age=3, exclude_hardest=0.01, max_weight=4.0),
        RandomPruning(0.7, exclude_hardest=0.2, exclude_ramp=[0, 0.5], scoring="all"),
        UCB(0.1, c=0.5, bonus="std", signal="margin", last=0.125),
        LossProportional(0.3, alpha=0.5, decay=1),
        OrderDP(0.3),
        InfoBatch(),
        InfoBatch(keep_ratio=0.3, last=0.0),
        SeTa(0.1, groups=5, window=0.9, annealing=0),
        KAKURENBO(0.4, scoring="all"),
        IES(2e-3, scoring="dropped", max_age=3),
    ],
)
def test_to_dict_is_json_and_comes_back(policy):
    text = json.dumps(policy.to_dict())
    assert json.loads(text) == policy.to_dict()
    again = make_policy(**json.loads(text))
    assert again == policy
    assert hash(again) == hash(policy)
    assert policy.to_dict()["name"] == policy.name
    assert POLICIES[policy.name] is type(policy)


def test_a_users_policy_is_named_by_its_class():
    @dataclasses.dataclass(frozen=True)
    class Mine(FullData):
        pass

    @dataclasses.dataclass(frozen=True)
    class Named(FullData):
        name = "named"

    assert Mine().name == Mine.name == "Mine"
    assert Mine().to_dict()["name"] == "Mine"
    assert Named().to_dict()["name"] == "named"
    assert FullData.name == "full"


def test_names_are_those_of_the_classes():
    assert all(cls.name == name for name, cls in POLICIES.items())


def test_a_policy_is_shown_as_one_writes_it():
    assert str(UCB()) == "UCB(keep_ratio=0.5)"
    assert str(UCB(0.3, c=2.0, last=0.1)) == "UCB(last=0.1, keep_ratio=0.3, c=2.0)"
    assert str(FullData()) == "FullData()"
    assert UCB(0.3).given == {"keep_ratio": 0.3}


# ---- what follows from a policy ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "signals"),
    [
        (FullData(), ()),
        (RandomPruning(), ()),
        (UCB(signal="margin"), ("margin",)),
        (KAKURENBO(), ("loss", "correct", "confidence")),
        (StaticPruning(keep="random"), ()),
    ],
)
def test_signals_are_those_of_the_memory(policy, signals):
    assert policy.signals == policy.memory.signals == signals


@dataclasses.dataclass(frozen=True)
class Weighing(FullData):
    weighs = True


@dataclasses.dataclass(frozen=True)
class Remembering(FullData):
    @property
    def memory(self):
        return Last("margin")


@pytest.mark.parametrize(
    ("policy", "needs"),
    [
        (FullData(), False),
        (RandomPruning(0.3, first=1, last=0.1), False),
        (RandomPruning(0.3, min_per_class=1), True),  # it needs the labels
        (StaticPruning(keep="random"), False),
        (Weighing(), True),
        (Remembering(), True),
        *[(cls(), True) for cls in (UCB, LossProportional, InfoBatch, SeTa, KAKURENBO, IES)],
    ],
)
def test_who_needs_the_losses_of_samples(policy, needs):
    assert policy.needs_loss is needs


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({"scoring": "all"}, "eval"),
        ({"scoring": "dropped"}, "train"),
        ({"scoring": "all", "scoring_mode": "train"}, "train"),
        ({"scoring": "dropped", "scoring_mode": "eval"}, "eval"),
    ],
)
def test_mode_of_scoring_passes(settings, mode):
    assert UCB(**settings).mode_of_scoring == mode


@pytest.mark.parametrize(
    ("policy", "num_epochs", "expected"),
    [
        (UCB(0.3), 3, True),  # 3 choices of 30 samples
        (UCB(0.3), 4, False),
        (UCB(0.3, period=2), 6, True),
        (UCB(0.3, period=2), 7, False),
        (UCB(0.3, first=1), 3, False),  # all samples have a score when the first choice is made
        (UCB(0.3, scoring="all"), 3, False),
        (UCB(0.3, scoring="dropped"), 3, False),
        (OrderDP(0.5), 2, True),
        (RandomPruning(0.3), 3, False),  # it has no scores
        (InfoBatch(), 1, False),  # its size is not known
        (InfoBatch(keep_ratio=0.3), 3, True),
    ],
)
def test_a_run_in_which_every_choice_is_a_first_look(policy, num_epochs, expected):
    shape = RunShape(100, batch_size=10, num_epochs=num_epochs)
    assert policy.looks_once(shape, num_epochs) is expected


@pytest.mark.parametrize(
    ("policy", "share"),
    [
        (KAKURENBO(0.4), (0.6, 1.0)),
        (InfoBatch(prune_ratio=0.5), (0.6, 0.9)),
        (InfoBatch(prune_ratio=0.0), (1.0, 1.0)),
        (SeTa(prune_ratio=0.2), (0.36, 0.6)),
        (IES(), (0.54, 0.88)),
        (Weighing(), (0.01, 1.0)),  # the default: from one sample to all
    ],
)
def test_expected_share(policy, share):
    assert policy.expected_share(100) == pytest.approx(share)


def test_a_policy_of_two_mixins_has_the_fields_of_both():
    """As the classes of the core that have scores and a keep_ratio, in either order."""

    @dataclasses.dataclass(frozen=True)
    class Mine(ScoredPolicy, KeepsShare):
        memory = Memories(Last("loss"))

        def score(self, table):
            return table["loss"]

        def plan(self, choice):
            assert isinstance(choice, Choice)
            return EpochPlan(choice.score.topk(choice.size).indices)

    assert Mine(0.4).planned_size(10, 0, 0.0) == 4
    assert sorted(plan_of(Mine(0.4), [1.0, 5.0, 3.0, 2.0, 4.0]).indices.tolist()) == [1, 4]
    assert Mine(exclude_hardest=0.1).keep_ratio == 0.5
