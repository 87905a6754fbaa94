"""What a run hands on: the kept samples as a dataset, and on the Hub its scores or its timm model.

`trainer.push_to_hub()` uploads a model in transformers' format, with its card. Everything is
written to a folder first, so a failed upload loses nothing. Only the files that were written here
are uploaded, and they do not tell the folders of this machine.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
import torch
from huggingface_hub import DatasetCard, DatasetCardData, HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from . import __version__, distributed
from .checks import check_count
from .data_side import PrunedDataMixin, uploading
from .escape import Markdown, code_cell, hide_folders
from .files import PICTURE_FILE, REPORT_FILE, load_parquet, save_parquet
from .identity import dataset_fingerprint
from .model_card import (
    CARD_FILE,
    facts_of,
    fields_in_words,
    hub_dataset,
    metadata_text,
    published,
    render,
    save_card,
    write_card,
)
from .pruner import DynamicPruner
from .sampler import SAMPLE_INDEX
from .scores import Scores, fingerprints_fit
from .table import LAST_OBSERVED, TIMES_KEPT, SampleTable

SCORES_FILE = "scores.parquet"  # the Hub's viewer shows parquet, not safetensors
_TEMPLATE = Path(__file__).with_name("dataset_card_template.md")
# All that is uploaded.
_FILES_OF_SCORES = (CARD_FILE, REPORT_FILE, SCORES_FILE)
_FILES_OF_TIMM = (CARD_FILE, REPORT_FILE, PICTURE_FILE, "config.json", "model.safetensors")
# What a column holds that the policy does not remember, such as the labels for `min_per_class`.
_OTHER = "recorded beside the memory of the policy; NaN: never observed"
# Every card of ours has it. It tells our folder from one of the user.
_MARK = "<!-- hf_dynprune wrote this card"


def kept_dataset(
    source: PrunedDataMixin | DynamicPruner | SampleTable,
    dataset: datasets.Dataset,
    *,
    at_least: int | None = None,
) -> datasets.Dataset:
    """The samples that a run kept, with their `sample_index`.

    Args:
        source: the trainer or pruner of a run. With `at_least`, also a table, such as one that
            [`load_scores_from_hub`] returns.
        dataset: the training data of the run, or another form of them (raw, tokenised) with the
            rows in the same order.
        at_least: keep the samples that at least this many choices kept, *optional*, defaults to the
            samples of the last choice.

    Returns:
        The rows in the order of the dataset, with one more column, `sample_index` (int64), the row
        in `dataset`. No row is copied, unless the dataset is a selection itself.

    Raises:
        TypeError: If `source` or `dataset` has another type.
        ValueError: If the dataset has another length or has a column `sample_index`, if the run
            made no choice, or if no sample was kept that often.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}: expected the datasets.Dataset of the run."
        )
    table = source if isinstance(source, SampleTable) else _pruner_of(source).table
    if len(dataset) != len(table):
        raise ValueError(
            f"The dataset has {len(dataset):,} samples, the run {len(table):,}: expected the "
            "training data of the run, or another form of them with the rows in the same order."
        )
    if SAMPLE_INDEX in dataset.column_names:
        raise ValueError(f"The dataset has a column {SAMPLE_INDEX!r}: rename or remove it.")
    index = _last_choice(source) if at_least is None else _kept_often(table, at_least)
    # The column is added first, because adding it to a selection would copy the rows.
    return dataset.add_column(SAMPLE_INDEX, np.arange(len(dataset))).select(index.numpy())


def _kept_often(table: SampleTable, at_least: int) -> torch.Tensor:
    check_count("at_least", at_least, 1)
    times = table[TIMES_KEPT.name]
    index = torch.nonzero(times >= at_least).squeeze(1)
    if len(index) == 0:
        raise ValueError(
            f"No sample was kept at_least={at_least} times: the maximum is {int(times.max())}."
        )
    return index


def _last_choice(source: Any) -> torch.Tensor:
    plan = None if isinstance(source, SampleTable) else _pruner_of(source).plan
    if plan is None:
        why = "has no choice" if isinstance(source, SampleTable) else "has made no choice yet"
        raise ValueError(
            f"The {type(source).__name__} {why}: pass the trainer or pruner of a run that chose, "
            "or at_least=."
        )
    return plan.indices.sort().values


def push_scores_to_hub(
    source: PrunedDataMixin | DynamicPruner | Scores,
    repo_id: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload scores",
) -> Any:
    """Upload what is known of each sample as a dataset repository: a parquet file and a card.

    For a run these are all columns of its table (`times_kept`, `last_observed` and those of its
    policy) and its report, for [`Scores`] the score. [`load_scores_from_hub`] reads and checks the
    file. `datasets.load_dataset(repo_id)` shows the same rows.

    Args:
        source: the trainer or pruner of a run, or scores that were made before one.
        repo_id: the repository. It is created if it does not exist.
        folder: the files are written here first: a new or empty folder, or one of an earlier call.
            *Optional*, defaults to `_scores` in the trainer's output folder, else to a temporary
            folder, which is removed after the upload. Other files in it are never uploaded.
        token, private, revision, commit_message: as in `huggingface_hub.upload_folder` and
            `create_repo`.

    Returns:
        huggingface_hub's `CommitInfo`; None on other ranks than the first, which do nothing.

    Raises:
        TypeError: If `source` has another type.
        ValueError: If `repo_id` is not the name of a repository, or if the folder holds other
            files. Nothing is written then.
        RuntimeError: If the upload fails. The message says where the files are and how to continue.
    """
    pruner = None if isinstance(source, Scores) else _pruner_of(source)
    _check_repo_id(repo_id)
    if distributed.world()[0] != 0:
        return None
    run = getattr(source, "args", None) if isinstance(source, PrunedDataMixin) else None
    if folder is None and run is not None and run.output_dir:
        folder = Path(run.output_dir) / "_scores"
    with _folder_of_scores(folder) as made:
        _write_scores(source, pruner, repo_id, made)
    where = _Where(repo_id, "dataset", token, private, revision)
    commit = _upload(made, _FILES_OF_SCORES, where, commit_message, "push_scores_to_hub(...)")
    if folder is None:
        shutil.rmtree(made)
    return commit


@contextmanager
def _folder_of_scores(folder: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Yield the folder, or a temporary one, which is removed if writing to it fails."""
    if folder is not None:
        yield _own_folder(Path(folder), _FILES_OF_SCORES)
        return
    made = Path(tempfile.mkdtemp(prefix="hf_dynprune-"))
    try:
        yield made
    except BaseException:
        shutil.rmtree(made)
        raise


def _write_scores(source: Any, pruner: DynamicPruner | None, repo_id: str, folder: Path) -> None:
    """Write card, scores and report. The card comes first: it marks the folder as ours."""
    if pruner is None:
        save_card(_card_of_scores(source, repo_id), folder / CARD_FILE)
        # A copy is saved, so that the scores still know the file they came from.
        copy = replace(source, provenance=hide_folders(source.provenance))
        copy.save(folder / SCORES_FILE)
        return
    # A pruner has no dataset.
    trained_on = hub_dataset(getattr(source, "train_dataset", None))
    save_card(_card_of_table(pruner, repo_id, trained_on), folder / CARD_FILE)
    report = published(pruner.report)
    about = {"fingerprint": pruner.fingerprint, "policy": report.policy}
    save_parquet(folder / SCORES_FILE, pruner.table.state_dict(), about)
    report.save(folder / REPORT_FILE)


def load_scores_from_hub(
    repo_id: str, *, dataset: Any = None, revision: str | None = None, token: str | None = None
) -> Scores | SampleTable:
    """Download and check what [`push_scores_to_hub`] uploaded.

    Args:
        repo_id: the dataset repository.
        dataset: the data to prune or to select from, *optional*. They must be the data that were
            scored: N and the fingerprint are compared.
        revision, token: as in `huggingface_hub.hf_hub_download`.

    Returns:
        What was uploaded: [`Scores`], for `StaticPruning(scores, keep_ratio=0.5)`, or the
        [`SampleTable`] of a run, for [`kept_dataset`].

    Raises:
        FileNotFoundError: If the repository has no scores. If there is no repository or no
            connection, huggingface_hub's errors.
        ValueError: If `repo_id` is not the name of a repository, or if the file is damaged or is of
            another dataset.
    """
    _check_repo_id(repo_id)
    try:
        path = hf_hub_download(
            repo_id, SCORES_FILE, repo_type="dataset", revision=revision, token=token
        )
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(
            f"The dataset {repo_id} on the Hub has no {SCORES_FILE}: expected a repository of "
            "push_scores_to_hub."
        ) from error
    columns, about = load_parquet(path)
    fingerprint = about.get("fingerprint", "")
    if not isinstance(fingerprint, str):
        raise ValueError(f"{repo_id} has the fingerprint {fingerprint!r}: expected a text.")
    try:
        is_table = TIMES_KEPT.name in columns
        scores = SampleTable.from_columns(columns) if is_table else Scores.load(path)
    except ValueError as error:
        raise ValueError(f"The dataset {repo_id} on the Hub: {error}") from error
    if dataset is not None:
        given, n = dataset_fingerprint(dataset), len(dataset)
        if n != len(scores) or not fingerprints_fit(given, fingerprint, n):
            raise ValueError(
                f"{repo_id} is of the dataset {fingerprint or f'{len(scores)} samples'!r}, the "
                f"given one is {given!r}: expected the dataset that was scored, with the same "
                "columns and with its rows in the same order."
            )
    return scores


def push_timm_to_hub(
    trainer: PrunedDataMixin,
    repo_id: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    **card: Any,
) -> Any:
    """Upload a trained timm model in timm's format, with card, report and picture.

    `timm.create_model("hf-hub:" + repo_id, pretrained=True)` loads it. transformers loads it, too.

    Args:
        trainer: a trainer of a `TimmWrapperForImageClassification`, after `train()`.
        repo_id: the repository. It is created if it does not exist.
        folder: the files are written here first: a new or empty folder, or one of an earlier call.
            *Optional*, defaults to `_timm` in the output folder. Other files in it are never
            uploaded.
        token, private, revision, commit_message: as in `huggingface_hub.upload_folder` and
            `create_repo`.
        card: arguments of `trainer.create_model_card`.

    Returns:
        huggingface_hub's `CommitInfo`; None on other ranks than the first, which do nothing.

    Raises:
        TypeError: If the model has another class.
        ValueError: If the trainer has not trained yet, if `repo_id` is not the name of a
            repository, or if the folder holds other files.
        RuntimeError: If the upload fails. The message says where the files are and how to continue.
    """
    from .vision import save_timm

    if not _pruner_of(trainer).report.epochs:
        raise ValueError("The trainer has not trained yet: call train() first.")
    _check_repo_id(repo_id)
    if distributed.world()[0] != 0:
        return None
    folder = _own_folder(
        Path(folder or Path(trainer.args.output_dir or ".") / "_timm"), _FILES_OF_TIMM
    )
    save_timm(cast(Any, trainer.model), folder)
    card = {"model_name": repo_id.rpartition("/")[2], **card}
    write_card(trainer, folder, **card, library_name="timm", repo_id=repo_id)
    where = _Where(repo_id, "model", token, private, revision)
    return _upload(folder, _FILES_OF_TIMM, where, commit_message, "push_timm_to_hub(...)")


# ---- helpers -------------------------------------------------------------------------------------


def _pruner_of(source: Any) -> DynamicPruner:
    pruner = getattr(source, "pruner", source)
    if not isinstance(pruner, DynamicPruner):
        raise TypeError(
            f"A {type(source).__name__} knows nothing of single samples: expected a "
            "DynamicPruningTrainer with pruning=, or a DynamicPruner."
        )
    return pruner


class _Where(NamedTuple):
    """A repository, and how it is reached."""

    repo_id: str
    repo_type: str
    token: str | None
    private: bool | None
    revision: str | None


def _check_repo_id(repo_id: Any) -> None:
    """Raise TypeError or ValueError for what cannot be the name of a repository, such as ".."."""
    if not isinstance(repo_id, str):
        raise TypeError(f"repo_id={repo_id!r} is not a name: expected a str such as 'user/name'.")
    message = (
        f"repo_id={repo_id!r} is not the name of a repository: expected 'user/name', with letters, "
        "digits, '-', '_' and '.'."
    )
    # Lower versions of huggingface_hub let letters of other alphabets and a last newline pass.
    if not (repo_id.isascii() and repo_id.isprintable()):
        raise ValueError(message)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(message) from error


def _own_folder(folder: Path, names: Sequence[str]) -> Path:
    """Make the folder. ValueError if it holds what an earlier call did not write."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {entry.name: entry for entry in os.scandir(folder)}
    foreign = sorted(
        name
        for name, entry in entries.items()
        if name not in names or not entry.is_file(follow_symlinks=False)
    )
    card = folder / CARD_FILE
    if entries and not foreign and not (card.is_file() and _MARK in _start_of(card)):
        foreign = sorted(entries)
    if foreign:
        more = " ..." if len(foreign) > 3 else ""
        raise ValueError(
            f"The folder {folder} holds {', '.join(map(repr, foreign[:3]))}{more}, which no "
            "earlier upload wrote: pass a new or empty folder, `folder=`."
        )
    return folder


def _start_of(card: Path) -> str:
    """The start of a file, in which a card of ours has its mark."""
    with open(card, encoding="utf-8", errors="replace") as file:
        return file.read(100_000)


def _upload(folder: Path, names: Sequence[str], where: _Where, message: str, call: str) -> Any:
    """Upload the files of these names."""
    api, kind = HfApi(token=where.token), where.repo_type
    only = [option for name in names for option in ("--include", name)]
    with uploading(folder, where.repo_id, call, "--repo-type", kind, *only):
        made = api.create_repo(where.repo_id, repo_type=kind, private=where.private, exist_ok=True)
        return api.upload_folder(
            repo_id=made.repo_id,
            repo_type=kind,
            folder_path=folder,
            allow_patterns=list(names),
            revision=where.revision,
            commit_message=message,
        )


# ---- cards ---------------------------------------------------------------------------------------


def _card_of_scores(scores: Scores, repo_id: str) -> DatasetCard:
    known = ("runs", "epochs", "seeds", "model")
    made = {key: scores.provenance[key] for key in known if key in scores.provenance}
    return _card(
        repo_id,
        len(scores),
        scores.fingerprint,
        tags=["static-data-pruning", scores.method],
        block={"method": scores.method},
        columns={"score": Markdown(f"the {code_cell(scores.method)} score; high is hard")},
        scores=scores,
        made=hide_folders(made),
    )


def _card_of_table(
    pruner: DynamicPruner, repo_id: str, trained_on: Mapping[str, str]
) -> DatasetCard:
    own = [column.name for column in pruner.policy.memory.columns]
    columns = {
        **dict.fromkeys(
            own, Markdown(f"memory of {code_cell(pruner.policy.name)}; NaN: never observed")
        ),
        TIMES_KEPT.name: "number of choices that kept the sample",
        LAST_OBSERVED.name: "epoch of the last observation, counted from 0; -1: never observed",
    }
    floats = [name for name in own if pruner.table[name].is_floating_point()]
    facts = facts_of(pruner.report)
    return _card(
        repo_id,
        len(pruner.table),
        pruner.fingerprint,
        tags=["dynamic-data-pruning", pruner.policy.name],
        block={"policy": facts["policy"]},
        columns={name: columns.get(name, _OTHER) for name in pruner.table.columns},
        trained_on=trained_on,
        facts=facts,
        fields=Markdown(fields_in_words(facts["policy"])),
        column=next(iter(floats), None),
    )


def _card(
    repo_id: str,
    n: int,
    fingerprint: str,
    *,
    tags: Sequence[str],
    block: Mapping[str, Any],
    scores: Scores | None = None,
    trained_on: Mapping[str, str] | None = None,
    **values: Any,
) -> DatasetCard:
    name, fingerprint = repo_id.rpartition("/")[2], fingerprint or f"{n} samples"
    data = DatasetCardData(
        pretty_name=name,
        tags=list(tags),
        configs=[{"config_name": "default", "data_files": SCORES_FILE}],
    )
    data["hf_dynprune"] = {"version": __version__, "fingerprint": fingerprint, **block}
    about = {"name": name, "repo_id": repo_id, "n": n, "fingerprint": fingerprint}
    values = {**about, "scores": scores, "trained_on": trained_on, **values}
    return DatasetCard(render(_TEMPLATE, card_data=metadata_text(data), **values))
