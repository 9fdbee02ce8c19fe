"""From rows of token ids to a batch: TRL's, or one without padding and repetitions, and what people said."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from trl.trainer.reward_trainer import DataCollatorForPreference

from .columns import OVERALL, PREPARED, ROW_COLUMN, TOKENIZED_PAIR
from .forest import ROW_MULTIPLE, pack
from .judgements import has_judgements, in_turn, ratings_by_rater, to_tensors
from .records import Comparison, Record, key_of, read_answers, read_feedback


ANSWERS = "answers"
"""In a batch: an integer from 0 for each sequence, equal for equal ones, of shape `(2 * P,)`."""
_OfRow = list[tuple[Comparison, float]]
"""The comparisons of a row that stand in the batch, with the weight of each."""
OF_ATTRIBUTES = "judgements_of_attributes"
"""In a batch: what was said about each attribute but the overall judgement, by its name."""
BY_RATER = "ratings_by_rater"
"""In a batch: the levels that each person gave, of shape `(2 * P, R, A)`; see
[`~disco_trl.data.judgements.ratings_by_rater`]."""


@dataclass
class DataCollatorForDiscoPreference(DataCollatorForPreference):
    """
    TRL's preference collator, with the row numbers and judgements, and with shared prefixes on request.

    The batch is that of [`~trl.trainer.reward_trainer.DataCollatorForPreference`] (`input_ids` and `attention_mask` of
    shape `(2 * P, L)`, chosen sides first, and `margin` of shape `(P,)`). With `share_prefixes` it is what
    [`~disco_trl.data.forest.pack`] makes of the same `2 * P` sequences in that order, for which the model returns the
    same outputs. P is the number of comparisons: one for a pair, and one for each pair of answers of a ranking. (A
    batch without prefix sharing holds an answer once for each of its comparisons.) It adds `answers`, which tells
    equal sequences, a `torch.LongTensor` of shape `(2 * P,)`, and where the examples have them `row_index`, of shape
    `(B,)`, and what [`~disco_trl.data.judgements.to_tensors`] makes of their judgements: the overall ones, and in a
    dict `judgements_of_attributes` those about each attribute of the model.

    Args:
        share_prefixes (`bool`, *optional*, defaults to `False`):
            Whether to put the batch into one row in which every shared prefix stands once. The model must have been
            made ready for it by `disco_trl.models.prefix_sharing.prepare`.
        weigh_by (`str`, *optional*, defaults to `"pair"`):
            As in [`DiscoRewardConfig`].
        likelihoods (`Mapping[str, dict]`, *optional*):
            What the model knows of how people answer, by attribute, `"overall"` included: settings of the
            [`~disco_trl.models.likelihood_head.LikelihoodHead`] of each. Without `rating_values` ratings are not read,
            and without `strength_levels` strengths are read as votes.
        pairs_per_row (`int`, *optional*):
            If set, each example stands for this many comparisons, some of them repeated with a part of their weight,
            so that the batches of all processes have the same size. (With prefix sharing, repetitions cost nothing.)
    """

    share_prefixes: bool = False
    weigh_by: str = "pair"
    likelihoods: Mapping[str, dict[str, Any]] = field(default_factory=lambda: {OVERALL: {}})
    pairs_per_row: int | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        records = [read_answers(example, PREPARED, read_feedback(example)) for example in examples]
        comparisons = self._comparisons(records, OVERALL)
        compared = [
            (record.answers, one) for record, of_row in zip(records, comparisons, strict=True) for one, _ in of_row
        ]
        sides = [[answers[one.first] for answers, one in compared], [answers[one.second] for answers, one in compared]]
        pairs = [dict(zip(TOKENIZED_PAIR, pair, strict=True)) for pair in zip(*sides, strict=True)]
        if "margin" in examples[0]:
            pairs = [pair | {"margin": one.margin} for pair, (_, one) in zip(pairs, compared, strict=True)]
        sequences = [*sides[0], *sides[1]]
        batch: dict[str, Any]
        if self.share_prefixes:
            batch = pack(sequences, self.pad_token_id, self.pad_to_multiple_of or ROW_MULTIPLE)
            if "margin" in examples[0]:
                batch["margin"] = torch.tensor([one.margin for _, one in compared], dtype=torch.float)
        else:
            batch = super().torch_call(pairs)
        batch[ANSWERS] = torch.tensor([key_of(sequence) for sequence in sequences])
        numbers = [int(example[ROW_COLUMN]) for example in examples] if ROW_COLUMN in examples[0] else None
        if has_judgements(examples[0]):
            batch |= self._judgements(records, comparisons, OVERALL, numbers)
            if others := [name for name in self.likelihoods if name != OVERALL]:
                batch[OF_ATTRIBUTES] = {
                    name: self._judgements(records, self._comparisons(records, name), name, numbers) for name in others
                }
                scales = {name: self.likelihoods[name].get("rating_values", ()) for name in others}
                batch[BY_RATER] = ratings_by_rater(records, comparisons, scales)
        if numbers is not None:
            batch[ROW_COLUMN] = torch.tensor(numbers)
        return batch

    def _comparisons(self, records: Sequence[Record], attribute: str) -> list[_OfRow]:
        """What stands in the batch of each record, with what was said about an attribute."""
        are_rated = "rating_values" in self.likelihoods[attribute]
        return [in_turn(record, self.weigh_by, are_rated, self.pairs_per_row, attribute) for record in records]

    def _judgements(
        self, records: Sequence[Record], comparisons: list[_OfRow], attribute: str, numbers: list[int] | None
    ) -> dict[str, Any]:
        """Tensors of what was said about an attribute."""
        known = self.likelihoods[attribute]
        scales = known.get("rating_values"), known.get("strength_levels")
        return to_tensors(records, comparisons, *scales, numbers, attribute, "tie_width" in known)
