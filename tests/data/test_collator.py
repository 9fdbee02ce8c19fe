"""The batch of `disco_trl.data.collator` without prefix sharing, against TRL's."""

import pytest
import torch
from trl.trainer.reward_trainer import DataCollatorForPreference

from disco_trl.data.collator import ANSWERS, DataCollatorForDiscoPreference
from disco_trl.data.columns import ROW_COLUMN


def test_collator_adds_row_numbers_and_answers_and_nothing_else():
    examples = [
        {"chosen_ids": [1, 2, 3], "rejected_ids": [4, 5], "margin": 0.5},
        {"chosen_ids": [6, 7], "rejected_ids": [8], "margin": 0.0},
    ]
    trl_batch = DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=4)(examples)
    collator = DataCollatorForDiscoPreference(pad_token_id=0, pad_to_multiple_of=4)
    numbered_batch = collator([{**example, ROW_COLUMN: row} for example, row in zip(examples, [7, 3], strict=True)])
    row_index = numbered_batch.pop(ROW_COLUMN)
    assert row_index.dtype == torch.int64
    assert row_index.tolist() == [7, 3]
    for batch in (numbered_batch, collator(examples)):
        del batch[ANSWERS]
        assert batch.keys() == trl_batch.keys() == {"input_ids", "attention_mask", "margin"}
        for name, tensor in trl_batch.items():
            assert torch.equal(batch[name], tensor)


def test_equal_answers_are_told():
    examples = [{"chosen_ids": [1, 2, 3], "rejected_ids": [4, 5]}, {"chosen_ids": [4, 5], "rejected_ids": [1, 2]}]
    for share_prefixes in (False, True):
        answers = DataCollatorForDiscoPreference(pad_token_id=0, share_prefixes=share_prefixes)(examples)[ANSWERS]
        assert answers.dtype == torch.int64
        assert answers.min() >= 0
        # Chosen sides first
        assert (answers[:, None] == answers).int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_strengths_are_counted_in_a_batch_and_a_bad_one_is_named_by_its_row():
    ids = {"chosen_ids": [1, 2, 3], "rejected_ids": [4, 5]}
    examples = [
        {**ids, "preference_strength": [2, -1], ROW_COLUMN: 7},
        {**ids, "preference_strength": 0, ROW_COLUMN: 3},
    ]
    for share_prefixes in (False, True):
        known: dict = {"overall": {"strength_levels": 2, "tie_width": None}}
        collator = DataCollatorForDiscoPreference(pad_token_id=0, share_prefixes=share_prefixes, likelihoods=known)
        batch = collator(examples)
        assert batch["strength_counts"].tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
        assert batch["strength_counts"].dtype == batch["judgements"].dtype == torch.float32
        # Wins, losses, ties
        assert batch["judgements"][:, :3].tolist() == [[1, 1, 0], [0, 0, 1]]
        with pytest.raises(ValueError, match=r"row 3, column 'preference_strength': the strength 3 is beyond the 2"):
            collator([examples[0], {**examples[1], "preference_strength": 3}])
        del known["overall"]["tie_width"]
        with pytest.raises(ValueError, match=r"row 3, column 'tie': it is a tie, but there is no tie width"):
            collator(examples)
