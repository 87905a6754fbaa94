"""Checkpoints: what makes one complete, which one a run continues from, and at which step.

A checkpoint is the Trainer's folder with our `STATE_FILE` in it. It is written in this order:

    model, optimizer, random states  ──▶  STATE_FILE, which lists them  ──▶  trainer_state.json

So a checkpoint is complete if both of the last two can be read, tell of the same step, and every
file has the size and the checksum that were listed.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import xxhash
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from .files import STATE_FILE, load_tensors, save_tensors
from .pruner import DynamicPruner

# Below transformers' own logger, so that its `set_verbosity` and `log_level` hold for us as well.
logger = logging.get_logger(f"transformers.{__name__}")

_BLOCK_BYTES = 1 << 24


def content(folder: Path) -> dict[str, list]:
    """Map the name of each file of a checkpoint to [bytes, xxh3 checksum of 128 bits].

    `STATE_FILE`, which holds this list, and the Trainer's state, which is written later, are left
    out.

    Cost: reads all files, from the page cache if they were just written.
    """
    found: dict[str, list] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        listed = name not in (STATE_FILE, TRAINER_STATE_NAME) and not name.endswith(".tmp")
        if path.is_file() and listed:
            digest = xxhash.xxh3_128()
            with open(path, "rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
            found[name] = [path.stat().st_size, digest.hexdigest()]
    return found


def fault_of(folder: Path, *, stock: bool = False) -> str | None:
    """Say why a run cannot continue from a checkpoint; None if it can.

    Args:
        folder: The checkpoint.
        stock: Whether a checkpoint without our file will do.
    """
    try:
        step = json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"its {TRAINER_STATE_NAME} cannot be read ({error!r})"
    try:
        _, metadata = load_tensors(folder / STATE_FILE)
    except FileNotFoundError:
        if stock:
            return None
        return (
            f"it has no {STATE_FILE}, because a stock Trainer or save_only_model=True wrote it. To "
            "continue without scores, call train(..., stock_checkpoint=True)"
        )
    except ValueError as error:
        return str(error)
    if metadata["step"] != step:
        return (
            f"its {TRAINER_STATE_NAME} is of step {step}, its {STATE_FILE} is of step "
            f"{metadata['step']}"
        )
    return _damage(content(folder), metadata.get("files", {}))


def _damage(found: dict[str, list], listed: dict[str, list]) -> str | None:
    for name, written in listed.items():
        if name not in found:
            return f"its {name} is missing"
        if found[name] != written:
            return (
                f"its {name} is damaged: it has {found[name][0]} bytes of {written[0]}, or another "
                "checksum"
            )
    return None


def newest_complete(output_dir: str | os.PathLike[str], *, stock: bool = False) -> str | None:
    """The newest complete checkpoint in a folder, or None. Warns of newer ones that are skipped."""
    for folder in _newest_first(output_dir):
        fault = fault_of(folder, stock=stock)
        if fault is None:
            return str(folder)
        logger.warning("Skipping the checkpoint %s: %s.", folder, fault)
    return None


def _newest_first(output_dir: str | os.PathLike[str]) -> list[Path]:
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d+)", path.name):
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def complete_checkpoint(
    requested: str | os.PathLike[str] | bool,
    output_dir: str | os.PathLike[str],
    *,
    stock: bool = False,
) -> str:
    """The checkpoint to continue from.

    Args:
        requested: True for the newest complete one in `output_dir`, or a folder.
        output_dir: The run's folder.
        stock: Whether a checkpoint without our file will do.

    Raises:
        ValueError: If the named one is not complete, or if there is none.
    """
    if isinstance(requested, bool):
        newest = newest_complete(output_dir, stock=stock)
        if newest is not None:
            return newest
        found = _newest_first(output_dir)
        without_state = (str(folder) for folder in found if fault_of(folder, stock=True) is None)
        way_out = "start the run without resume_from_checkpoint"
        if usable := next(without_state, None):
            way_out = (
                f"to continue without scores from {usable}, which has no {STATE_FILE}, call "
                f"train(resume_from_checkpoint=True, stock_checkpoint=True). Or {way_out}"
            )
        raise ValueError(
            f"No checkpoint in {output_dir} is complete ({len(found)} found): {way_out}."
        )
    fault = fault_of(Path(requested), stock=stock)
    if fault is not None:
        raise ValueError(
            f"Cannot resume from {requested}: {fault}. Name another checkpoint, or pass "
            "resume_from_checkpoint=True for the newest complete one."
        )
    return str(requested)


def epoch_of(checkpoint: str | os.PathLike[str]) -> float:
    """How many epochs were trained when a complete checkpoint was written; may be fractional."""
    return json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())["epoch"]


def save(
    pruner: DynamicPruner, folder: str | os.PathLike[str], *, writes: bool, **now: Any
) -> None:
    """Write our file beside what the Trainer has saved so far. Collective.

    Args:
        pruner: The run's.
        folder: The checkpoint.
        writes: Whether this rank writes.
        now: `step` and `learning_rate`, as for [`DynamicPruner.state_dict`].
    """
    # Collective. When it returns, the other ranks have written their files.
    state = pruner.state_dict(**now)
    if not writes:
        return
    folder = Path(folder)
    # The one of an earlier run in the same folder must not make this checkpoint complete too early.
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    state["metadata"]["files"] = content(folder)
    save_tensors(folder / STATE_FILE, **state)


def resume(
    pruner: DynamicPruner,
    checkpoint: str | os.PathLike[str],
    state: TrainerState,
    *,
    restart_epoch: bool,
) -> tuple[int, int]:
    """Bring the pruner to where a checkpoint was written.

    Args:
        pruner: Of the run that continues.
        checkpoint: A complete one. Without our file, as the stock Trainer writes it, the table
            starts empty, an interrupted epoch starts again, and earlier epochs are charged as
            full-data epochs.
        state: The Trainer's, as read from the checkpoint.
        restart_epoch: Whether an interrupted epoch starts again from its first batch.

    Returns:
        (epoch, batches of it that each rank has trained).

    Raises:
        ValueError: If the checkpoint belongs to another run.
    """
    if not (Path(checkpoint) / STATE_FILE).exists():
        position = pruner.adopt(state.epoch or 0.0, state.global_step)
        logger.warning(
            "%s has no %s: the run continues from epoch %d without any score, and the %.4g epochs "
            "before it count as full-data epochs.",
            checkpoint,
            STATE_FILE,
            position[0],
            state.epoch,
        )
        return position
    epoch, batches = pruner.load(checkpoint)
    if restart_epoch:
        pruner.restart_epoch(state.global_step)
        return epoch, 0
    return epoch, batches
