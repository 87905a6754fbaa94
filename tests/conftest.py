"""Settings made before anything of Hugging Face is imported: no network, no telemetry.

On CI, Hypothesis draws the same inputs on each run. With RELIABILITY=FILE the session notes there
what its tests tried (see reliability.py).
"""

import gc
import logging
import os
import sys
from importlib import import_module
from pathlib import Path

# Read once, when huggingface_hub is imported. Child processes inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # or importing trl.experimental warns
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or tokenizers warn in each forked worker
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; several test processes share the cores

import pytest
from hypothesis import HealthCheck, settings
from programs import share_server
from reliability import check_key, merge

# No limit on time: the first example of a test pays for imports, and machines differ.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "ci", settings.get_profile("local"), derandomize=True, database=None, print_blob=True
)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def caplog(caplog, monkeypatch):
    """pytest's `caplog`, which listens at the root logger.

    The logger of transformers, and ours below it, do not propagate to the root by themselves.
    """
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


@pytest.fixture
def reliability(request):
    """A function: `reliability("resume", 12)` notes that this test tried that row 12 times.

    If the test fails, all of them count as failed.
    """

    def tried(row, count=1):
        check_key(row)
        if not (isinstance(count, int) and count >= 1):
            raise ValueError(
                f"reliability({row!r}, {count!r}): the count is a whole number of at least 1."
            )
        request.node.user_properties.append(("reliability", [row, count]))

    return tried


class Recorder:
    """Adds up what the tests of a session tried, and writes it to a file.

    With pytest-xdist it works on the controller.
    """

    def __init__(self, path):
        self.path, self.counts, self.failed = path, {}, set()

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)
        # Each phase reports all that was tried so far, so the last one counts.
        tried = [value for name, value in report.user_properties if name == "reliability"]
        if tried:
            self.counts[report.nodeid] = tried

    def pytest_sessionfinish(self):
        rows = {}
        for test, tried in self.counts.items():
            for key, count in tried:
                row = rows.setdefault(key, {"tried": 0, "failed": 0})
                row["tried"] += count
                row["failed"] += count if test in self.failed else 0
        if rows:
            merge(self.path, rows)


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        return  # workers report to the controller, and use its server
    path = os.environ.get("RELIABILITY")
    if path:
        config.pluginmanager.register(Recorder(Path(path).absolute()), "reliability")
    if config.getoption("numprocesses", None):
        share_server()


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    # Looking for garbage takes a third of the collection. What was imported stays, and each run of
    # a Trainer collects garbage first: it need not look there.
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture
def recipe(monkeypatch):
    """A function: `recipe("causal_lm")` is the module. With options its `main` has run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "recipes"))

    def load(name, *options):
        module = import_module(name)
        if options:
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
            module.main()
        return module

    return load
