"""Checkpoints: what makes one complete, which one a run continues from, and at which step.

A checkpoint is the Trainer's folder with our `STATE_FILE` in it. It is written in this order:

    model, optimizer, random states  ──▶  STATE_FILE, which lists them  ──▶  trainer_state.json

So a checkpoint is complete if both of the last two can be read, tell of the same step, and every
file has the size and the checksum that were listed. Texts that a person may edit, such as
config.json, may differ. Of a checkpoint above 16 GiB a checksum covers pieces of the large files.
"""

import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from .files import STATE_FILE, load_json, load_tensors, save_tensors
from .pruner import DynamicPruner

# Below transformers' own logger, so that its `set_verbosity` and `log_level` hold for us as well.
logger = logging.get_logger(f"transformers.{__name__}")

_BLOCK_BYTES = 1 << 24
# Rank 0 reads this much of a checkpoint, or all of it if it is smaller. The other ranks wait
# meanwhile: for a terabyte of shards longer than their timeout.
_READ_BYTES = 1 << 34
_PIECE_BYTES = 1 << 20
_TEXTS = {".json", ".txt", ".jinja"}
_NOT_LISTED = {".tmp", ".md"}


def content(folder: Path, *, read_bytes: int = _READ_BYTES) -> dict[str, list]:
    """Map the name of each file of a checkpoint to [bytes, xxh3 checksum of 128 bits].

    `STATE_FILE`, which holds this list, and the Trainer's state, which is written later, are left
    out. So are notes in Markdown.

    If the files have more than `read_bytes` together, the large ones have a third entry: of how
    many pieces of 1 MiB the checksum is. They are evenly spaced; the first and the last MiB are two
    of them. Such a checksum finds a file that was cut or written in part. It may miss a change of a
    single byte.

    Args:
        folder: The checkpoint.
        read_bytes: How much is read, except that a file is read whole up to 2 MiB.

    Cost: reads so much, from the page cache if the files were just written.
    """
    paths = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        listed = name not in (STATE_FILE, TRAINER_STATE_NAME) and path.suffix not in _NOT_LISTED
        if path.is_file() and listed:
            paths[name] = path
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    share = _share(sizes.values(), read_bytes)
    pieces = max(2, share // _PIECE_BYTES)
    whole = max(share, pieces * _PIECE_BYTES)  # up to this size a file is read whole
    return {
        name: _size_and_checksum(path, pieces if sizes[name] > whole else None)
        for name, path in paths.items()
    }


def _share(sizes: Iterable[int], total: int) -> int:
    """The largest s for which sum(min(size, s)) <= total; the largest size if all fit."""
    ordered, left = sorted(sizes), total
    for place, size in enumerate(ordered):
        share = left // (len(ordered) - place)
        if size > share:
            return share
        left -= size
    return max(ordered, default=0)


def _size_and_checksum(path: Path, pieces: int | None = None) -> list:
    """[bytes, checksum] of a file, or [bytes, checksum of so many pieces, pieces]."""
    digest, size = xxhash.xxh3_128(), path.stat().st_size
    with open(path, "rb") as file:
        if pieces is not None:
            for number in range(pieces):
                file.seek(max(0, number * (size - _PIECE_BYTES) // (pieces - 1)))
                digest.update(file.read(_PIECE_BYTES))
            return [size, digest.hexdigest(), pieces]
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return [size, digest.hexdigest()]


def fault_of(folder: Path, *, stock: bool = False) -> str | None:
    """Say why a run cannot continue from a checkpoint; None if it can.

    Args:
        folder: The checkpoint.
        stock: Whether a checkpoint without our file will do.
    """
    try:
        step = load_json(folder / TRAINER_STATE_NAME)["global_step"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"its {TRAINER_STATE_NAME} cannot be read ({error!r})"
    try:
        if not os.path.lexists(folder / STATE_FILE):
            return _fault_of_stock(folder, stock)
        if not (folder / STATE_FILE).is_file():
            return f"its {STATE_FILE} is not a file"
        _, metadata = load_tensors(folder / STATE_FILE)
        if metadata.get("step") != step:
            return (
                f"its {TRAINER_STATE_NAME} is of step {step}, its {STATE_FILE} is of step "
                f"{metadata.get('step')}"
            )
        return _damage(folder, metadata.get("files", {}))
    except ValueError as error:
        return str(error)
    except OSError as error:  # of the disk or of the rights
        return f"a file of it cannot be read ({error})"


def _fault_of_stock(folder: Path, stock: bool) -> str | None:
    """The fault of a checkpoint without our file, whose checksums nobody noted."""
    if not stock:
        return (
            f"it has no {STATE_FILE}, because a stock Trainer or save_only_model=True wrote it. To "
            "continue without scores, call train(..., stock_checkpoint=True)"
        )
    for path in sorted(folder.iterdir()):
        if path.suffix in _FORMATS and not _FORMATS[path.suffix](path):
            return f"its {path.name} is damaged or cannot be read"
    return None


def _is_safetensors(path: Path) -> bool:
    """Whether the header can be read and the file has the length that it states."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


# How to see that a file of a stock checkpoint is whole. torch.save writes a zip file.
_FORMATS = {
    ".safetensors": _is_safetensors,
    **dict.fromkeys((".pt", ".pth", ".bin"), zipfile.is_zipfile),
}


def _is_text(name: str) -> bool:
    """Whether a file is a text that a person may edit, such as config.json, and no state."""
    return not name.endswith(".index.json") and Path(name).suffix in _TEXTS


def _damage(folder: Path, listed: Mapping[str, list]) -> str | None:
    """The first damage of the files that were listed, or None.

    Resuming reads no number from a text, so a text may have changed. It must be one.
    """
    for name, written in listed.items():
        path = folder / name
        if not path.is_file():
            return f"its {name} is {'not a file' if os.path.lexists(path) else 'missing'}"
        try:
            found = _size_and_checksum(path, *written[2:])
            if found == written:
                continue
            if _is_text(name) and path.suffix == ".json":
                load_json(path)
            elif _is_text(name):
                path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            return f"its {name} is damaged or cannot be read ({error})"
        if not _is_text(name):
            return (
                f"its {name} is damaged: it has {found[0]} bytes of {written[0]}, or another "
                "checksum"
            )
        logger.warning("%s was changed after the checkpoint was written.", path)
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
        TypeError: If `requested` is neither True nor a path.
        ValueError: If the named one is not complete, or if there is none.
    """
    if not isinstance(requested, bool | str | os.PathLike):
        raise TypeError(
            f"resume_from_checkpoint={requested!r} is neither True nor the folder of a checkpoint, "
            f"such as {str(Path(output_dir) / 'checkpoint-500')!r}."
        )
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
        inside = _newest_first(requested)
        if inside:
            fault += f". It is a folder of {len(inside)} checkpoints, the newest is {inside[0]}"
        raise ValueError(
            f"Cannot resume from {requested}: {fault}. Name another checkpoint, or pass "
            "resume_from_checkpoint=True for the newest complete one."
        )
    return str(requested)


def epoch_of(checkpoint: str | os.PathLike[str]) -> float:
    """How many epochs were trained when a complete checkpoint was written; may be fractional."""
    return load_json(Path(checkpoint) / TRAINER_STATE_NAME)["epoch"]


def save(
    pruner: DynamicPruner, folder: str | os.PathLike[str], *, writes: bool, **now: Any
) -> None:
    """Write our file beside what the Trainer has saved so far. Collective.

    Args:
        pruner: The run's.
        folder: The checkpoint.
        writes: Whether this rank writes.
        now: `step`, `learning_rate` and `epoch_over`, as for [`DynamicPruner.state_dict`].
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
