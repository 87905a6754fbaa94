"""What a run hands on: the samples that it kept as a dataset, and to the Hub its scores and its model in timm's format.

(`trainer.push_to_hub()` uploads the model as transformers has it, with its card.) All is written to a folder first: an
upload that fails loses nothing.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import datasets
import jinja2
import numpy as np
import torch
from huggingface_hub import DatasetCard, DatasetCardData, HfApi, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from . import __version__, distributed
from .model_card import REPORT_FILE, _public, facts_of, hub_dataset, write_card
from .policies import check_count
from .pruner import DynamicPruner
from .sampler import SAMPLE_INDEX
from .scores import (
    LAST_OBSERVED,
    TIMES_KEPT,
    Column,
    SampleTable,
    Scores,
    _checksum,
    _each_once,
    _whole_or_not,
)
from .trainer import DynamicPruningMixin, dataset_fingerprint, uploading

SCORES_FILE = "scores.parquet"
_TEMPLATE = Path(__file__).with_name("dataset_card_template.md")


def kept_dataset(
    source: DynamicPruningMixin | DynamicPruner | SampleTable,
    dataset: datasets.Dataset,
    *,
    at_least: int | None = None,
) -> datasets.Dataset:
    """The samples that the last choice kept, or those that were kept at least so often, with their `sample_index`.

    Args:
        source: the trainer or pruner of a run; with `at_least` a table will do, such as [`load_scores_from_hub`] gives.
        dataset: what the run trained on, or another form of it (raw, tokenised) with its rows in the same order.
        at_least: number of choices that kept a sample, *optional*, defaults to the last choice alone.

    Returns:
        The rows in the order of the dataset, with one more column, `sample_index` (int64): where each was. No row is copied,
        unless the dataset is a selection itself.

    Raises:
        TypeError: for another kind of source or dataset.
        ValueError: for a dataset of another length or with a column `sample_index`, a run that made no choice, and where no
            sample was kept so often.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}: wanted is the datasets.Dataset that the run trained on."
        )
    pruner = None if isinstance(source, SampleTable) else _pruner_of(source)
    table, plan = (
        (cast(SampleTable, source), None) if pruner is None else (pruner.table, pruner._plan)
    )
    if len(dataset) != len(table):
        raise ValueError(
            f"The dataset has {len(dataset):,} samples, the run {len(table):,}: wanted is what it trained on, or another "
            "form of it with its rows in the same order."
        )
    if SAMPLE_INDEX in dataset.column_names:
        raise ValueError(f"The dataset has a column {SAMPLE_INDEX!r} already: rename or remove it.")
    if at_least is not None:
        check_count("at_least", at_least, 1)
        times = table[TIMES_KEPT.name]
        index = torch.nonzero(times >= at_least).squeeze(1)
        if len(index) == 0:
            raise ValueError(
                f"No sample was kept at_least={at_least} times: the most is {int(times.max())}."
            )
    elif plan is None:
        raise ValueError(
            f"A {type(source).__name__} {'counts choices alone' if pruner is None else 'made no choice yet'}: "
            "wanted is the trainer or the pruner of a run that chose, or at_least=."
        )
    else:
        index = plan.indices.sort().values
    # The column first: a selection would be copied when it gets one.
    return dataset.add_column(SAMPLE_INDEX, np.arange(len(dataset))).select(index.numpy())


def push_scores_to_hub(
    source: DynamicPruningMixin | DynamicPruner | Scores,
    repo_id: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload scores",
) -> Any:
    """Uploads what is known of each sample as a dataset repository: one parquet file and a card.

    Of a run all columns of its table (`times_kept`, `last_observed`, the policy's own) and its report; of [`Scores`] the
    score. [`load_scores_from_hub`] reads it back and checks it; `datasets.load_dataset(repo_id)` shows the same rows.

    Args:
        source: the trainer or the pruner of a run, or scores that were made before one.
        repo_id: of the repository, which is made if need be.
        folder: what is uploaded is written here first, *optional*, defaults to `_scores` in the trainer's output folder,
            else to a folder with the repository's name.
        token, private, revision, commit_message: as in `huggingface_hub.upload_folder` and `create_repo`.

    Returns:
        huggingface_hub's `CommitInfo`; None on other ranks than the first, where nothing happens.

    Raises:
        TypeError: for another kind of source.
        RuntimeError: if the upload fails; the message says where the files lie, and how to go on.
    """
    if not isinstance(source, Scores):
        _pruner_of(source)
    if distributed.world()[0] != 0:
        return None
    if folder is None:
        output_dir = source.args.output_dir if isinstance(source, DynamicPruningMixin) else None
        folder = (
            Path(repo_id.rpartition("/")[2]) if output_dir is None else Path(output_dir) / "_scores"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(source, Scores):
        replace(source).save(
            folder / SCORES_FILE
        )  # the scores go on to know the file that they came from
        _card_of_scores(source, repo_id).save(folder / "README.md")
    else:
        pruner = _pruner_of(source)
        _save_table(
            folder / SCORES_FILE,
            pruner.table,
            {"fingerprint": pruner.fingerprint, "policy": pruner.report.policy},
        )
        pruner.report.save(folder / REPORT_FILE)
        trained_on = (
            hub_dataset(source.train_dataset) if isinstance(source, DynamicPruningMixin) else {}
        )
        _card_of_table(pruner, repo_id, trained_on).save(folder / "README.md")
    call = "push_scores_to_hub(...)"
    return _upload(
        folder,
        repo_id,
        "dataset",
        call,
        token=token,
        private=private,
        revision=revision,
        message=commit_message,
    )


def load_scores_from_hub(
    repo_id: str, *, dataset: Any = None, revision: str | None = None, token: str | None = None
) -> Scores | SampleTable:
    """Downloads what [`push_scores_to_hub`] uploaded, and checks it.

    Args:
        repo_id: of the dataset repository.
        dataset: that is to be pruned or selected from, *optional*: it must be the one that was scored, by N and fingerprint.
        revision, token: as in `huggingface_hub.hf_hub_download`.

    Returns:
        [`Scores`], for `StaticPruning(scores, keep_ratio=0.5)`, or the [`SampleTable`] of a run, for [`kept_dataset`]: as it
        was uploaded.

    Raises:
        FileNotFoundError: for a repository without scores; huggingface_hub's errors where there is none, or no connection.
        ValueError: for a damaged file, and for another dataset.
    """
    try:
        path = Path(
            hf_hub_download(
                repo_id, SCORES_FILE, repo_type="dataset", revision=revision, token=token
            )
        )
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(
            f"The dataset {repo_id} on the Hub has no {SCORES_FILE}: wanted is one that push_scores_to_hub uploaded."
        ) from error
    scores, fingerprint = _load(path)
    if dataset is not None:
        given, only_n = dataset_fingerprint(dataset), ("", f"{len(dataset)} samples")
        if len(dataset) != len(scores) or (
            given != fingerprint and given not in only_n and fingerprint not in only_n
        ):
            raise ValueError(
                f"{repo_id} is of the dataset {fingerprint or f'{len(scores)} samples'!r}, the given one is {given!r}: "
                "wanted is the dataset that was scored, with its columns and its rows in the same order."
            )
    return scores


def push_timm_to_hub(
    trainer: DynamicPruningMixin,
    repo_id: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    **card: Any,
) -> Any:
    """Uploads a trained timm model in timm's format, with card, report and picture: `timm.create_model("hf-hub:" + repo_id,
    pretrained=True)` loads it, and transformers does, too.

    Args:
        trainer: of a `TimmWrapperForImageClassification`, after `train()`.
        repo_id: of the repository, which is made if need be.
        folder: what is uploaded is written here first, *optional*, defaults to `_timm` in the output folder.
        token, private, revision, commit_message: as in `huggingface_hub.upload_folder` and `create_repo`.
        card: arguments of `trainer.create_model_card`.

    Returns:
        huggingface_hub's `CommitInfo`; None on other ranks than the first, where nothing happens.

    Raises:
        TypeError: for a model of another class.
        ValueError: before training.
        RuntimeError: if the upload fails; the message says where the files lie, and how to go on.
    """
    from .vision import save_timm

    if not _pruner_of(trainer).report.epochs:
        raise ValueError(
            "The trainer has not trained yet: call train() first, the card tells of the run."
        )
    if distributed.world()[0] != 0:
        return None
    folder = Path(folder) if folder is not None else Path(trainer.args.output_dir or ".") / "_timm"
    save_timm(cast(Any, trainer.model), folder)
    write_card(
        trainer,
        folder,
        **{"model_name": repo_id.rpartition("/")[2], **card},
        library_name="timm",
        repo_id=repo_id,
    )
    call = "push_timm_to_hub(...)"
    return _upload(
        folder,
        repo_id,
        "model",
        call,
        token=token,
        private=private,
        revision=revision,
        message=commit_message,
    )


# ---- helpers -------------------------------------------------------------------------------------


def _pruner_of(source: Any) -> DynamicPruner:
    pruner = getattr(source, "pruner", source)
    if not isinstance(pruner, DynamicPruner):
        raise TypeError(
            f"{type(source).__name__} holds nothing that is known of each sample: wanted is a DynamicPruningTrainer with "
            "pruning=, or a DynamicPruner."
        )
    return pruner


def _upload(
    folder: Path,
    repo_id: str,
    repo_type: str,
    call: str,
    *,
    token: str | None,
    private: bool | None,
    revision: str | None,
    message: str,
) -> Any:
    api = HfApi(token=token)
    with uploading(folder, repo_id, call, "--repo-type", repo_type):
        repo_id = api.create_repo(
            repo_id, repo_type=repo_type, private=private, exist_ok=True
        ).repo_id
        return api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            revision=revision,
            commit_message=message,
        )


def _save_table(path: Path, table: SampleTable, about: Mapping[str, Any]) -> None:
    """As parquet: `sample_index` and the table's columns, with a checksum and `about` (JSON) in the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, columns = json.dumps(about, sort_keys=True), table.state_dict()
    arrow = pa.table(
        {
            SAMPLE_INDEX: np.arange(len(table)),
            **{name: column.numpy() for name, column in columns.items()},
        }
    )
    arrow = arrow.replace_schema_metadata({"hf_dynprune": text, "sha256": _checksum(columns, text)})
    with _whole_or_not(path) as temporary:
        pq.write_table(arrow, temporary)


def _load(path: Path) -> tuple[Scores | SampleTable, str]:
    """What is in the file, checked, and the fingerprint of the dataset that it is of."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        arrow = pq.read_table(path)
        if TIMES_KEPT.name not in arrow.column_names:
            scores = Scores.load(path)
            return scores, scores.fingerprint
        # Copies: what arrow lends cannot be written to.
        columns = {name: torch.tensor(arrow[name].to_numpy()) for name in arrow.column_names}
        text, checksum = (
            arrow.schema.metadata[key].decode() for key in (b"hf_dynprune", b"sha256")
        )
        fingerprint = json.loads(text)["fingerprint"]
        order = _each_once(columns.pop(SAMPLE_INDEX), path).argsort()
    except (pa.ArrowException, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no table of hf_dynprune, or is damaged ({error!r}): upload it again."
        ) from error
    columns = {name: column[order] for name, column in columns.items()}
    if checksum != _checksum(columns, text):
        raise ValueError(
            f"{path} is damaged: its checksum does not match. Upload it again, or name another revision."
        )
    every = (TIMES_KEPT.name, LAST_OBSERVED.name)
    table = SampleTable(
        len(order),
        [Column(name, column.dtype) for name, column in columns.items() if name not in every],
    )
    table.load_state_dict(columns)
    return table, fingerprint


# ---- cards ---------------------------------------------------------------------------------------


def _card_of_scores(scores: Scores, repo_id: str) -> DatasetCard:
    said = {
        key: _public(scores.provenance[key])
        for key in ("runs", "epochs", "seeds", "model")
        if key in scores.provenance
    }
    return _card(
        repo_id,
        len(scores),
        scores.fingerprint,
        tags=["static-data-pruning", scores.method],
        block={"method": scores.method},
        columns={"score": f"`{scores.method}`; high is hard"},
        scores=scores,
        said=said,
    )


def _card_of_table(
    pruner: DynamicPruner, repo_id: str, trained_on: Mapping[str, str]
) -> DatasetCard:
    own = [column.name for column in pruner.policy.columns]
    every = {
        TIMES_KEPT.name: "how many choices kept it",
        LAST_OBSERVED.name: "epoch of its last observation, from 0; -1: never",
    }
    about = f"kept by `{pruner.policy.name}` for its choices; NaN: nothing was observed"
    facts = facts_of(pruner.report)
    return _card(
        repo_id,
        len(pruner.table),
        pruner.fingerprint,
        tags=["dynamic-data-pruning", pruner.policy.name],
        block={"policy": facts["policy"]},
        columns={name: every.get(name, about) for name in pruner.table.columns},
        trained_on=trained_on,
        facts=facts,
        fields=", ".join(
            f"`{name}={value!r}`" for name, value in facts["policy"].items() if name != "name"
        ),
        column=next((name for name in own if pruner.table[name].is_floating_point()), None),
    )


def _card(
    repo_id: str,
    n: int,
    fingerprint: str,
    *,
    tags: Sequence[str],
    block: Mapping[str, Any],
    **words: Any,
) -> DatasetCard:
    name, fingerprint = repo_id.rpartition("/")[2], fingerprint or f"{n} samples"
    data = DatasetCardData(
        pretty_name=name,
        tags=list(tags),
        configs=[{"config_name": "default", "data_files": SCORES_FILE}],
    )
    data["hf_dynprune"] = {"version": __version__, "fingerprint": fingerprint, **block}
    jinja = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    text = jinja.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=data.to_yaml(), name=name, repo_id=repo_id, n=n, fingerprint=fingerprint, **words
    )
    return DatasetCard(text)
