"""Before anything of Hugging Face is imported: no network, no telemetry. On CI, the same inputs on each run."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported; child processes inherit it
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else tokenizers warn in each forked worker
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; several test processes share the cores

from hypothesis import HealthCheck, settings

# No deadline and no complaint of slowness: the first example of a test pays for imports, and machines differ.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
