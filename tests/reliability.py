"""The record of reliability: what was tried, how often, what was promised, what happened.

    python tests/reliability.py    # recipes/results/reliability.json -> docs/reliability.md

Tests say what they tried through the fixture `reliability` (conftest.py), tests/torture.py through
`--write`. `make reliability` and `make torture` run them and this program. No number of the table
is written by hand.
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE, RECORD = ROOT / "docs" / "reliability.md", ROOT / "recipes" / "results" / "reliability.json"


class Row(NamedTuple):
    """What was tried and what was promised; the record fills in `{field}`."""

    tried: str
    promised: str


SAME_RUN = (
    "the same weights, scores, samples and learning rates, bit for bit, as the run that was never "
    "interrupted"
)

# In the order of the table.
ROWS = {
    "torture": Row(
        "training killed (SIGKILL) at a random moment, {in_checkpoint} times while a checkpoint "
        "was written, and resumed",
        f"{SAME_RUN}; only what came after the last checkpoint is lost",
    ),
    "resume": Row("resuming from every checkpoint of a run", SAME_RUN),
    "resume policies": Row("the same, each policy with its options", SAME_RUN),
    "resume workers": Row("the same, with loader workers", SAME_RUN),
    "resume ranks": Row("the same, on two processes, without and with loader workers", SAME_RUN),
    "files": Row(
        "a file of a checkpoint truncated, bit-flipped, emptied, foreign or missing",
        "skipped with a warning, or refused if it was named; never trained from",
    ),
    "refused": Row(
        "resuming with another policy, field, number of samples, dataset or global batch",
        "refused before anything is trained; the error names both values",
    ),
    "identity": Row(
        "datasets with other rows, labels, files or order; and the same data in another folder, "
        "format, process or with random augmentation",
        "other content has another identity, the same content the same one; reading changes "
        "neither the dataset nor a random state",
    ),
    "restoring": Row(
        "resuming from folders with unreadable files, folders in place of files, texts edited by "
        "hand and names that are no folders, and of models of which a part is not saved",
        "the run continues exactly, or an error says why it cannot; no weight is lost",
    ),
    "interrupted": Row(
        "runs ended by Ctrl-C, by an error, or epoch by epoch before their last batch",
        "the report counts what was trained; a resumed run is the uninterrupted one",
    ),
    "dying rank": Row(
        "one of two processes killed, or raising an error, in the middle of an epoch",
        "the whole run ends with an error within 60 s, and no process is left",
    ),
    "soak": Row(
        "epochs of one long run, checked against a slow reference in plain Python",
        "the right choice and scores in every epoch; memory and files do not grow, except for the "
        "report in the checkpoints",
    ),
    "ranks": Row(
        "2 and 3 processes against one with the larger batch",
        "the same samples in the same steps, and scores",
    ),
    "accumulation": Row(
        "batches accumulated against one big batch, six kinds of model",
        "the same weights and scores, to rounding",
    ),
    "tasks": Row(
        "kinds of model and task, trained with pruning", "each score is the loss of its own sample"
    ),
    "trainer options": Row(
        "save_only_model, save_total_limit, load_best_model_at_end, hub_strategy, "
        "auto_find_batch_size, hyperparameter_search, ignore_data_skip, early stopping, a push "
        "during the run",
        "they do what they do in the stock Trainer, and the scores stay right",
    ),
    "properties": Row(
        "random inputs drawn by Hypothesis",
        "the properties of policies, sampler, clock and report hold",
    ),
    "conformance": Row("checks of the contract that every policy keeps", "each policy keeps it"),
    "foreign texts": Row(
        "a name or text of somebody else in a report or in scores: Markdown, HTML, YAML, code, "
        "terminal escapes, surrogates",
        "cards and the terminal show it as it is; the structure of the card does not change",
    ),
    "foreign reports": Row(
        "a report file with a field that is missing or has a wrong value",
        "refused with the file and the field, by every command",
    ),
    "uploads": Row(
        "uploads with other files, links and folders in the way, and with names that are no "
        "repositories",
        "only files that were just written are uploaded; others are neither read nor changed",
    ),
    "scores": Row(
        "scores, files of scores and policy arguments with wrong values",
        "refused with the value, and with the file if there is one",
    ),
    "memory": Row(
        "the bytes that a causal language model keeps for its losses",
        "no second copy of the logits",
    ),
}


def check_key(key):
    if key not in ROWS:
        raise ValueError(
            f"There is no row {key!r} in tests/reliability.py; the rows are "
            f"{', '.join(map(repr, ROWS))}."
        )


def read(path=RECORD):
    """key -> {"tried": n, "failed": m, ...}; an error for a key that has no row."""
    record = json.loads(Path(path).read_text())
    for key in record:
        check_key(key)
    return record


def merge(path, rows):
    """Put the rows into the file, in place of those of the same keys; whole or not at all."""
    path = Path(path)
    record = {**(read(path) if path.exists() else {}), **rows}
    for key in record:
        check_key(key)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(
        json.dumps({key: record[key] for key in ROWS if key in record}, indent=1) + "\n"
    )
    os.replace(temporary, path)


def happened(failed):
    return (
        "held each time"
        if failed == 0
        else f"**failed {failed:,} time{'s' if failed > 1 else ''}**"
    )


def render(record):
    """The table, with the rows that the record has."""
    for key in record:
        check_key(key)
    lines = [
        "| what was tried | how often | promised | what happened |",
        "| --- | ---: | --- | --- |",
    ]
    for key, (tried, promised) in ROWS.items():
        if key in record:
            row = record[key]
            cells = (tried.format(**row), f"{row['tried']:,}", promised, happened(row["failed"]))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def put_into(text, table, name="reliability"):
    """The text with the table between the markers of that name."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    changed, found = re.subn(
        f"{start}\n.*?{end}", lambda _: f"{start}\n{table}\n{end}", text, flags=re.DOTALL
    )
    if found != 1:
        raise ValueError(f"Expected one {start} ... {end}; the page has {found}.")
    return changed


if __name__ == "__main__":
    record = read()
    PAGE.write_text(put_into(PAGE.read_text(), render(record)))
    missing = ", ".join(key for key in ROWS if key not in record) or "none"
    print(f"{len(record)} rows rendered into {PAGE.relative_to(ROOT)}; not tried yet: {missing}")
