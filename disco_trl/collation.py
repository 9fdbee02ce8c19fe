"""From pairs of token sequences to a batch: TRL's, or one without its padding and repetitions."""

from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.reward_trainer import DataCollatorForPreference

from .data import ROW_COLUMN, as_list
from .forest import ROW_MULTIPLE, pack


@dataclass
class DataCollatorForDiscoPreference(DataCollatorForPreference):
    """
    TRL's preference collator, with the row numbers, and with prefixes shared if they are to be.

    The batch is that of [`~trl.trainer.reward_trainer.DataCollatorForPreference`] (`input_ids` and `attention_mask` of
    shape `[2 * B, L]`, chosen sides first, and `margin` of shape `[B]`), or with `share_prefixes` what
    `disco_trl.forest.pack` makes of the same `2 * B` sequences in that order, for which the model returns the
    same outputs. To either it adds `row_index`, a `LongTensor` of shape `[B]`, when the examples have it.

    Args:
        share_prefixes (`bool`, *optional*, defaults to `False`):
            Put the whole batch into one row in which every shared prefix stands once. The model must have been made
            ready for it by `disco_trl.prefix_sharing.prepare`.
    """

    share_prefixes: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if self.share_prefixes:
            sides = [[as_list(example[side]) for example in examples] for side in ("chosen_ids", "rejected_ids")]
            batch = pack([*sides[0], *sides[1]], self.pad_token_id, self.pad_to_multiple_of or ROW_MULTIPLE)
            if "margin" in examples[0]:
                batch["margin"] = torch.tensor([example["margin"] for example in examples], dtype=torch.float)
        else:
            batch = super().torch_call(examples)
        if ROW_COLUMN in examples[0]:
            batch[ROW_COLUMN] = torch.tensor([int(example[ROW_COLUMN]) for example in examples])
        return batch
