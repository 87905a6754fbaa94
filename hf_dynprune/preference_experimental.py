"""The ORPOTrainer and the CPOTrainer of `trl.experimental` with `pruning=`.

trl may change them in any release, and says so when they are imported. Apart from `preference.py`,
so that the import of that file does not.
"""

from collections.abc import Mapping
from typing import Any

from .checks import missing
from .preference import PreferencePruningMixin

try:
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
except ImportError as error:
    raise missing("hf_dynprune.preference_experimental", "trl", "llm", error) from error

# The names of trl that this file leans on, private or not documented. Reason for each:
SEAMS = {
    "ORPOTrainer.compute_loss": "averages one number for each pair, and the cross-entropy over the "
    "tokens of the chosen completions; so does the CPOTrainer",
    "ORPOTrainer._stored_metrics": "what trl adds to the next log; a scoring pass must not add to "
    "it",
    "ORPOTrainer.aux_loss_enabled": "whether the loss contains the router's",
}


class _Pairs(PreferencePruningMixin):
    _logged = ("_stored_metrics",)

    def _rows_in(self, inputs: Mapping[str, Any]) -> int:
        return len(inputs["chosen_labels"])


class DynamicPruningORPOTrainer(_Pairs, ORPOTrainer):
    """trl's ORPOTrainer with one new argument, `pruning=`; see [`PreferencePruningMixin`].

    A sample is a pair. trl's loss has a cross-entropy that is a mean over the tokens of a batch. It
    is trained as it is. The signal `"loss"` of a pair takes the mean over its own tokens instead,
    so it does not depend on the batch.
    """


class DynamicPruningCPOTrainer(_Pairs, CPOTrainer):
    """trl's CPOTrainer (CPO, SimPO) with one new argument, `pruning=`.

    See [`DynamicPruningORPOTrainer`]: with `cpo_alpha` the loss has the same cross-entropy.
    """
