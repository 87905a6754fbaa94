"""Engines that split a model over the ranks: FSDP2 and DeepSpeed, in real processes that use gloo.

Each is compared with DDP. The DeepSpeed tests run where DeepSpeed can be imported, with
`DS_ACCELERATOR=cpu`; its first run compiles for some minutes.
"""

import signal
from pathlib import Path

import pytest
import torch
from engines import SCENARIOS, SCORED_AT_ONCE, TRAINED, is_labelled
from hypothesis import example, given, settings
from hypothesis import strategies as st
from programs import torchrun
from tiny import trainer, vit
from transformers.distributed import DistributedConfig

from hf_dynprune import UCB, DynamicPruningTrainer
from hf_dynprune.checkpoints import content, fault_of, newest_complete
from hf_dynprune.files import STATE_FILE, save_json, save_tensors

# Older versions of transformers cannot split a model over data while they load it.
HAS_FSDP2 = hasattr(DistributedConfig, "dp_size")
needs_fsdp2 = pytest.mark.skipif(not HAS_FSDP2, reason="DistributedConfig has no fsdp_size")
NAMES = [scenario.__name__ for scenario in TRAINED]
ZERO = [engine for engine in SCENARIOS if engine.startswith("zero")]
PROGRAM = Path(__file__).parent / "engines.py"


def seen_in(folder, ranks, engine, scenario):
    """What each rank of a launch saw."""
    values = []
    for rank in range(ranks):
        value = torch.load(folder / f"rank{rank}.pt", weights_only=False)[engine, scenario]
        if isinstance(value, str):
            pytest.fail(f"rank {rank}:\n{value}")
        values.append(value)
    return values


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A function (number of ranks, engine, scenario) -> what each rank saw.

    DDP and both FSDP2 share a launch, and so do all stages of DeepSpeed.
    """
    seen = {}

    def results(ranks, engine, scenario):
        fsdp2 = ["fsdp2"] if HAS_FSDP2 else []
        engines = ZERO if engine in ZERO else ["ddp", *fsdp2, "accelerate"]
        key = ranks, engines[0]
        if key not in seen:
            folder = tmp_path_factory.mktemp(f"engines{ranks}")
            done = torchrun(PROGRAM, folder, *engines, ranks=ranks)
            assert done.returncode == 0, done.stdout + done.stderr
            seen[key] = folder
        return seen_in(seen[key], ranks, engine, scenario)

    return results


def is_like(expected, found):
    """Equal, but for the rounding of floats."""
    if isinstance(expected, dict):
        return expected.keys() == found.keys() and all(
            is_like(value, found[name]) for name, value in expected.items()
        )
    if isinstance(expected, list):
        return len(expected) == len(found) and all(map(is_like, expected, found))
    if isinstance(expected, float):
        return found == pytest.approx(expected, rel=1e-3, abs=1e-6, nan_ok=True)
    return expected == found


def assert_same(expected, found):
    """The same run on one rank: samples and steps exactly, numbers to rounding."""
    assert found["batches"] == expected["batches"]
    assert found["learning rates"] == expected["learning rates"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-6)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=5e-5)
    for name, column in expected["table"].items():
        close = {} if column.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found["table"][name], column, equal_nan=True, **close)
    for outcome in (expected, found):  # FSDP2 loads its model, so it has a name
        outcome["report"].get("provenance", {}).pop("model", None)
    assert is_like(expected["report"], found["report"])


def test_the_scenarios_are_uneven(launched):
    """What they are for: ranks that need other numbers of passes, and compare other batches."""
    accumulated = launched(2, "ddp", "accumulated")
    dropped = accumulated[0]["report"]["epochs"][2]["scoring_passes"]
    shares = [len(range(rank, dropped, 2)) for rank in (0, 1)]
    assert -(-shares[0] // SCORED_AT_ONCE) > -(-shares[1] // SCORED_AT_ONCE)
    labelled = [
        [any(map(is_labelled, batch)) for batch in of_rank["batches"]]
        for of_rank in launched(2, "ddp", "tokens")
    ]
    compared = [pair for number, pair in enumerate(zip(*labelled, strict=True)) if number < 4]
    assert (True, False) in compared or (False, True) in compared


FSDP2 = [pytest.param("fsdp2", marks=needs_fsdp2), "accelerate"]


@pytest.mark.parametrize("engine", FSDP2)
@pytest.mark.parametrize(("count", "scenario"), [*((2, name) for name in NAMES), (3, "plain")])
def test_a_model_split_by_fsdp2_trains_what_ddp_trains(count, scenario, engine, launched):
    ddp, fsdp2 = launched(count, "ddp", scenario), launched(count, engine, scenario)
    for expected, found in zip(ddp, fsdp2, strict=True):
        assert (expected["split"], found["split"]) == (False, True)
        assert not any("FSDP" in text for text in expected["warned"])
        assert any("FSDP" in text and "Not verified" in text for text in found["warned"])
        assert_same(expected, found)


@pytest.mark.parametrize("scenario", NAMES)
@pytest.mark.parametrize("engine", ZERO)
def test_deepspeed_trains_what_ddp_trains(engine, scenario, launched):
    pytest.importorskip("deepspeed")
    ddp, zero = launched(2, "ddp", scenario), launched(2, engine, scenario)
    for expected, found in zip(ddp, zero, strict=True):
        assert found["split"]
        assert any("DeepSpeed" in text and "Not verified" in text for text in found["warned"])
        assert_same(expected, found)


def assert_identical(whole, part):
    """Bit for bit, also the report."""
    assert all(weight.numel() for weight in whole["weights"].values())
    for kind in ("weights", "table"):
        assert whole[kind].keys() == part[kind].keys()
        for name, values in whole[kind].items():
            assert torch.equal(values.nan_to_num(7), part[kind][name].nan_to_num(7))
    assert part["learning rates"] == whole["learning rates"]
    assert part["report"] == whole["report"]


RESUMED = [("accelerate", "resumed"), ("accelerate", "resumed_from_full")]
RESUMED += [(engine, "resumed") for engine in ZERO]


@pytest.mark.parametrize(("engine", "scenario"), RESUMED)
def test_a_split_model_resumes_bit_for_bit(engine, scenario, launched):
    """The checkpoints hold a part of the weights and of the optimizer for each rank, or all."""
    if engine in ZERO:
        pytest.importorskip("deepspeed")
    for runs in launched(2, engine, scenario):
        whole = runs.pop(0)
        assert len(runs) == 2
        for part in runs.values():
            assert_identical(whole, part)


@pytest.mark.parametrize("engine", ["accelerate", "zero3"])
def test_a_killed_rank_ends_the_run_of_a_split_model(engine, launched, tmp_path):
    """The other rank waits for it in the middle of a pass. What was saved before can be resumed."""
    if engine in ZERO:
        pytest.importorskip("deepspeed")
    undisturbed = launched(2, engine, "resumed")
    done = torchrun(PROGRAM, tmp_path, f"{engine}/killed", ranks=2)
    # Either the other rank is killed with it, or it notices first that the connection is gone.
    assert done.returncode in (-signal.SIGKILL, 1), done.stdout + done.stderr
    assert not (tmp_path / "rank1.pt").exists()  # which a rank writes at the end
    assert Path(newest_complete(tmp_path / engine / "killed")).name == "checkpoint-3"
    done = torchrun(PROGRAM, tmp_path, f"{engine}/continued", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    resumed = seen_in(tmp_path, 2, engine, "continued")
    for runs, (step, part) in zip(undisturbed, resumed, strict=True):
        assert step == 3
        assert_identical(runs[0], part)


@pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
def test_ranks_that_share_a_batch_are_refused(name, tmp_path):
    """On CPUs accelerate makes no such groups, so the trainer is told the size of one."""
    grouped = type("Grouped", (DynamicPruningTrainer,), {f"get_{name}": lambda self: 2})
    with pytest.raises(ValueError, match=f"{name}=2"):
        trainer(tmp_path, cls=grouped, pruning=UCB(0.5))
    trainer(tmp_path, cls=grouped)


@needs_fsdp2
def test_a_pipeline_is_refused(tmp_path):
    model = vit()
    model.config.distributed_config = DistributedConfig(pp_size=2)
    with pytest.raises(ValueError, match="pp_size=2"):
        trainer(tmp_path, model=model, pruning=UCB(0.5))


def test_tensor_parallelism_of_deepspeed_is_refused(launched):
    pytest.importorskip("deepspeed")
    for (error,) in launched(2, "zero3", "refused"):
        assert error.startswith("ValueError")
        assert "tp_size=2" in error


@needs_fsdp2
def test_a_split_model_keeps_the_name_of_its_class(launched):
    """A BartForCausalLM has labels that are not shifted, unlike other causal models."""
    for before, after, is_own in launched(2, "fsdp2", "names"):
        assert not is_own
        assert before == after
        assert before[0] == "tokens"


# ---- checkpoints of many gigabytes ---------------------------------------------------------------

MIB = 1 << 20


def write(folder, files):
    """Files of these sizes; sparse, so they may be large."""
    for name, size in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "wb") as file:
            file.truncate(size)


def checkpoint(folder, files, **options):
    """A complete checkpoint with files of these sizes."""
    write(folder, files)
    listed = content(folder, **options)
    save_tensors(folder / STATE_FILE, {}, {"step": 3, "files": listed})
    save_json(folder / "trainer_state.json", {"global_step": 3})
    return listed


def change(path, place):
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"x")


def test_of_a_terabyte_only_a_bounded_part_is_read(tmp_path):
    """Read whole, it would take hours."""
    shards = {f"global_step3/rank_{rank}.pt": 1 << 39 for rank in (0, 1)}
    files = {**shards, "scheduler.pt": 1000, "latest": 11}
    listed = checkpoint(tmp_path, files, read_bytes=8 * MIB)
    assert [entry[0] for entry in listed.values()] == [files[name] for name in listed]
    assert {name: entry[2:] for name, entry in listed.items()} == {
        **{name: [3] for name in shards},  # pieces of a MiB: what is left of 8 for each shard
        "scheduler.pt": [],
        "latest": [],
    }
    assert fault_of(tmp_path) is None
    shard = tmp_path / "global_step3" / "rank_1.pt"
    for place in (0, (1 << 39) - 1, 1 << 38):  # the pieces are at both ends and in the middle
        change(shard, place)
        assert "rank_1.pt" in fault_of(tmp_path)
        checkpoint(tmp_path, shards, read_bytes=8 * MIB)
        assert fault_of(tmp_path) is None
    with open(shard, "r+b") as file:
        file.truncate((1 << 39) - 1)
    assert "rank_1.pt" in fault_of(tmp_path)


def test_a_checkpoint_of_usual_size_is_read_whole(tmp_path):
    listed = checkpoint(tmp_path, {"optimizer.pt": 5 * MIB, "rng_state.pth": 0})
    assert all(len(entry) == 2 for entry in listed.values())
    change(tmp_path / "optimizer.pt", 3 * MIB + 7)
    assert "optimizer.pt" in fault_of(tmp_path)


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(0, 6 * MIB), max_size=4), budget=st.integers(0, 20 * MIB))
@example(sizes=[2 * MIB + 1], budget=2 * MIB + 1)
def test_what_is_read_stays_within_the_bound(sizes, budget, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    write(folder, {f"{i}.pt": size for i, size in enumerate(sizes)})
    listed = content(folder, read_bytes=budget)
    read = sum(entry[2] * MIB if entry[2:] else entry[0] for entry in listed.values())
    assert read <= max(budget, 2 * MIB * len(sizes))
    if sum(sizes) <= budget:
        assert read == sum(sizes)
