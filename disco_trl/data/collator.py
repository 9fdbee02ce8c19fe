"""From rows of token sequences to a batch: TRL's, or one without padding and repetitions; and what was judged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.reward_trainer import DataCollatorForPreference

from .columns import RANKED_IDS, ROW_COLUMN, TOKENIZED_PAIR
from .forest import ROW_MULTIPLE, pack
from .judgements import has_judgements, ranked_pairs, to_tensors
from .values import as_list, is_missing


ANSWERS = "answers"
"""In a batch: an integer from 0 for each sequence, equal for equal ones, `[2 * P]`."""


@dataclass
class DataCollatorForDiscoPreference(DataCollatorForPreference):
    """
    TRL's preference collator, with the row numbers and judgements, and with prefixes shared if they are to be.

    The batch is that of [`~trl.trainer.reward_trainer.DataCollatorForPreference`] (`input_ids` and `attention_mask` of
    shape `[2 * P, L]`, chosen sides first, and `margin` of shape `[P]`), or with `share_prefixes` what
    `disco_trl.data.forest.pack` makes of the same `2 * P` sequences in that order, for which the model returns the
    same outputs. P is the number of examples, unless some are rankings, which stand for all pairs of their answers (a
    batch without prefix sharing holds an answer once for each of its pairs). It adds `answers`, which tells equal
    sequences, a `LongTensor` of shape `[2 * P]`; `row_index`, one of shape `[B]`, and what
    `disco_trl.data.judgements.to_tensors` makes of the examples, when they have it.

    Args:
        share_prefixes (`bool`, *optional*, defaults to `False`):
            Put the whole batch into one row in which every shared prefix stands once. The model must have been made
            ready for it by `disco_trl.models.prefix_sharing.prepare`.
        weigh_by (`str`, *optional*, defaults to `"pair"`):
            As in [`DiscoRewardConfig`].
        rating_values (sequence of `float`, *optional*):
            The ratings that the model knows, in order; without them ratings are not read.
        pairs_per_row (`int`, *optional*):
            If set, each example stands for this many pairs, some of them repeated with a part of their weight, so that
            the batches of all processes are of one size. (With prefix sharing repetitions cost nothing.)
    """

    share_prefixes: bool = False
    weigh_by: str = "pair"
    rating_values: Sequence[float] | None = None
    pairs_per_row: int | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        pairs = [pair for example in examples for pair in self._pairs(example)]
        sequences = [pair[side] for side in TOKENIZED_PAIR for pair in pairs]
        if self.share_prefixes:
            batch = pack(sequences, self.pad_token_id, self.pad_to_multiple_of or ROW_MULTIPLE)
            if "margin" in pairs[0]:
                batch["margin"] = torch.tensor([pair["margin"] for pair in pairs], dtype=torch.float)
        else:
            batch = super().torch_call(pairs)
        # (Python's hash of integers, and of tuples of them, is the same in all processes.)
        batch[ANSWERS] = torch.tensor([hash(tuple(sequence)) & (2**63 - 1) for sequence in sequences])
        if has_judgements(examples[0]):
            batch |= to_tensors(examples, self.weigh_by, self.rating_values, self.pairs_per_row)
        if ROW_COLUMN in examples[0]:
            batch[ROW_COLUMN] = torch.tensor([int(example[ROW_COLUMN]) for example in examples])
        return batch

    def _pairs(self, example: dict[str, Any]) -> list[dict[str, Any]]:
        """The pairs of token sequences that an example stands for, as TRL's collator takes them."""
        margin = {"margin": float(example["margin"])} if "margin" in example else {}
        if is_missing(example.get("ranks")):
            sides = [tuple(as_list(example[side]) for side in TOKENIZED_PAIR)]
        else:
            answers = [as_list(answer) for answer in as_list(example[RANKED_IDS])]
            sides = [(answers[better], answers[worse]) for better, worse in ranked_pairs(as_list(example["ranks"]))]
        count = self.pairs_per_row or len(sides)
        return [dict(zip(TOKENIZED_PAIR, sides[index % len(sides)], strict=True)) | margin for index in range(count)]
