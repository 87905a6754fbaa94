"""The tables of the studies in the README, from what recipes/compare.py wrote.

    python tests/studies.py    # renders recipes/results/studies/*/table*.md into the README

Between the markers `<!-- study NAME table -->` stands table.md of a study, between `<!-- study NAME table_0.3 -->` that of
the methods at this cost. No figure is written by hand; test_docs.py compares, and makes each summary anew from the reports.
"""

import re

from reliability import README, ROOT, put_into

STUDIES = ROOT / "recipes" / "results" / "studies"


def rendered(text):
    for words in re.findall(r"<!-- (study [\w. ]+) -->", text):
        _, name, table = words.split()
        text = put_into(text, (STUDIES / name / f"{table}.md").read_text().strip(), words)
    return text


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
