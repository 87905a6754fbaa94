"""The model card of trl's trainers when they are pruned."""

from typing import Any, cast

from .data_side import CardMixin
from .pruner import DynamicPruner

# The names of trl that this file leans on, private or not documented. Reason for each:
SEAMS = {
    "SFTTrainer._tag_names": "the tags of trl's own card; all trainers of trl have them",
    "SFTTrainer.create_model_card": "has other arguments than the Trainer's, and is called before "
    "each checkpoint",
}


class TrlCardMixin(CardMixin):
    """Writes our card with trl's arguments and tags. Without a run the card is trl's."""

    def create_model_card(  # type: ignore[override]  # trl's has other arguments
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **words: Any,
    ) -> None:
        """Write the card.

        Takes trl's arguments, and for a pruned run those of `Trainer.create_model_card` by name.
        """
        if not self._has_record():
            return super().create_model_card(model_name, dataset_name, tags, **words)
        # trl writes a card before each checkpoint, in the middle of an epoch.
        cast(DynamicPruner, self.pruner).update_record(step=self.state.global_step)
        given = [tags] if isinstance(tags, str) else tags or []
        words = {"dataset": dataset_name, **words, "tags": [*given, *cast(Any, self)._tag_names]}
        super().create_model_card(model_name=model_name, **words)
