"""From rows of token ids to a batch for a policy: TRL's, what people said, and the same sequences as a forest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from .columns import JUDGEMENT_COLUMNS, PREPARED, ROW_COLUMN, SCALES
from .forest import ROW_MULTIPLE, grow_forest, to_row
from .judgements import in_turn, to_tensors
from .records import read_answers, read_feedback


@dataclass
class DataCollatorForDiscoDPO(DataCollatorForPreference):
    """
    TRL's collator of DPO, with the judgements of the rows, and with shared prefixes on request.

    The batch is that of [`~trl.trainer.dpo_trainer.DataCollatorForPreference`], in which P pairs are `2 * P` padded
    sequences, chosen sides first. If the examples have judgements, `judgements` and `strength_counts` are added, as
    [`~disco_trl.data.judgements.to_tensors`] returns them; if they have scales, `scales`, of shape `(2 * P,)`; and if
    they are numbered, `row_index`, of shape `(P,)`. With `share_prefixes`, the same sequences are added as a forest,
    after their truncation:

    - `forest_ids` and `forest_positions`, of shape `(1, T)`, and `nodes`: `input_ids`, `position_ids` and `nodes` of
      [`~disco_trl.data.forest.to_row`];
    - `places`, of shape `(N,)`: the place in the row of the token before each answer token, whose state predicts it,
      in the order of the sequences and of their tokens; and `targets`, of the same shape, the answer tokens;
    - `ends`, of shape `(2 * P,)`: the place of the last token of each sequence.

    Args:
        share_prefixes (`bool`, *optional*, defaults to `False`):
            Whether to add the forest. The model must take it, see [`~disco_trl.models.policy.run_on_forests`].
        weigh_by (`str`, *optional*, defaults to `"pair"`):
            As in [`DiscoDPOConfig`].
        likelihood (`Mapping[str, Any]`, *optional*):
            What is known of how people answer: settings of the
            [`~disco_trl.models.likelihood_head.LikelihoodHead`]. Without `strength_levels` strengths are read as
            votes.
    """

    share_prefixes: bool = False
    weigh_by: str = "pair"
    likelihood: Mapping[str, Any] = field(default_factory=dict)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        numbers = [int(example[ROW_COLUMN]) for example in examples] if ROW_COLUMN in examples[0] else None
        if numbers is not None:
            batch[ROW_COLUMN] = torch.tensor(numbers)
        if examples[0].keys() & {*JUDGEMENT_COLUMNS}:
            records = [read_answers(example, PREPARED, read_feedback(example)) for example in examples]
            comparisons = [in_turn(record, self.weigh_by) for record in records]
            levels, reads_ties = self.likelihood.get("strength_levels"), "tie_width" in self.likelihood
            batch |= to_tensors(records, comparisons, None, levels, numbers, reads_ties=reads_ties)
        if examples[0].keys() >= {*SCALES}:
            batch["scales"] = torch.tensor([float(example[name]) for name in SCALES for example in examples])
        if self.share_prefixes:
            batch |= self._forest(batch)
        return batch

    def _forest(self, batch: dict[str, Any]) -> dict[str, Any]:
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        sequences = [ids[:length].tolist() for ids, length in zip(batch["input_ids"], lengths, strict=True)]
        # Every token counts, also where the padding token is the end-of-text token.
        forest = grow_forest(sequences, pad_token_id=None)
        places, targets, ends = [], [], []
        for number, is_answer in enumerate(batch["completion_mask"].tolist()):
            of_sequence = forest.places(number)
            ends.append(of_sequence[-1])
            answer = [at for at in range(1, len(of_sequence)) if is_answer[at]]
            places += [of_sequence[at - 1] for at in answer]
            targets += [sequences[number][at] for at in answer]
        row = to_row(forest, self.pad_token_id, self.pad_to_multiple_of or ROW_MULTIPLE)
        return {
            "forest_ids": row["input_ids"],
            "forest_positions": row["position_ids"],
            "nodes": row["nodes"],
            "places": torch.tensor(places),
            "targets": torch.tensor(targets),
            "ends": torch.tensor(ends),
        }
