"""`disco_trl.models.inference`: scoring in batches against scoring one by one."""

import pytest
import torch
from tiny_models import DECODERS, edited_copy, tiny_config
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from disco_trl import DiscoReward, DiscoRewardModel
from disco_trl.models import inference
from disco_trl.models.inference import batches_by_tokens, score
from disco_trl.models.upgrade import upgrade


SEQUENCES = [[7, 8, 9, 10, 2], [5, 2], [11, 12, 13, 2], [6, 2], [30, 31, 32, 33, 34, 35, 2]]


def test_scoring_in_batches_equals_scoring_one_by_one(tiny_llama_dir):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1)
    rewards = score(model, SEQUENCES, tokens_per_batch=8)
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([ids])).logits[:, 0] for ids in SEQUENCES])
    torch.testing.assert_close(rewards.location, expected)


def test_a_scalar_reward_model_is_read_as_bradley_terry(tiny_llama_dir):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1)
    rewards = score(model, SEQUENCES)
    other = score(model, SEQUENCES[::-1])
    expected = torch.nn.functional.logsigmoid(rewards.location - other.location)
    torch.testing.assert_close(rewards.log_prob_greater(other), expected)


def test_a_disco_model_is_scored_with_its_scale_and_family(tiny_llama_dir):
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir, reward_family="cauchy")
    torch.manual_seed(0)
    torch.nn.init.normal_(model.scale_head.weight)
    model.train()
    rewards = score(model, SEQUENCES, tokens_per_batch=8)
    assert model.training  # as it was
    assert rewards.family == "cauchy"
    assert rewards.scale.unique().numel() == len(SEQUENCES)
    with torch.no_grad():
        for index, ids in enumerate(SEQUENCES):
            expected = model.eval().reward_distribution(input_ids=torch.tensor([ids]))
            torch.testing.assert_close(rewards.location[index], expected.location[0])
            torch.testing.assert_close(rewards.scale[index], expected.scale[0])


PROMPT = [7, 8, 9, 10, 11]
FORESTS = {
    # A system prompt of two tokens; under it a prompt of three with four answers of two, and one of four with two.
    "answers": (
        [[5, 6, *PROMPT[:3], last, 2] for last in (20, 21, 22, 23)]
        + [[5, 6, 30, 31, 32, 33, last, 2] for last in (20, 21)],
        2 + (3 + 4 * 2) + (4 + 2 * 2),
    ),
    "a conversation at each turn": ([PROMPT, [*PROMPT, 12, 13], [*PROMPT, 12, 13, 14, 15, 16]], 10),
    "the same twice": ([PROMPT, [20, 21], PROMPT], 7),
}


@pytest.mark.parametrize("case", FORESTS)
def test_what_sequences_share_goes_through_the_model_once(case, tiny_llama_dir):
    sequences, unique_tokens = FORESTS[case]
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.scale_head.weight)
    with torch.no_grad():
        expected = [model.reward_distribution(input_ids=torch.tensor([ids])) for ids in sequences]
    score(model, sequences)  # from the first time on it is known that the model can share
    shapes = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: shapes.append(output.shape[:2]))

    rewards = score(model, sequences)

    assert shapes == [(1, -(-unique_tokens // 64) * 64)]  # one row, filled up to a multiple of 64
    torch.testing.assert_close(rewards.location, torch.cat([reward.location for reward in expected]))
    torch.testing.assert_close(rewards.scale, torch.cat([reward.scale for reward in expected]))


def test_a_model_that_cannot_share_prefixes_is_padded_and_told_of_once(disco_dir, caplog, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    logging.warning_once.cache_clear()
    model = DiscoRewardModel.from_pretrained(disco_dir("bert"))
    for _ in range(2):
        rewards = score(model, SEQUENCES)
    with torch.no_grad():
        expected = torch.cat([model.eval()(torch.tensor([ids])).logits[:, 0] for ids in SEQUENCES])
    torch.testing.assert_close(rewards.location, expected)
    assert caplog.text.count("not a disco model on a decoder") == 1


@pytest.mark.parametrize("architecture", DECODERS)
def test_nothing_is_kept_for_tokens_that_never_come(architecture, monkeypatch):
    """A decoder returns the keys and values of all layers unless it is told not to."""
    stock = AutoModelForSequenceClassification.from_config(tiny_config(architecture, num_labels=1)).eval()
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6]])}

    def is_cached(output) -> bool:
        return any(output.get(name) is not None for name in ("past_key_values", "cache"))

    outputs = []
    stock.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        assert is_cached(stock(**batch))
        outputs.clear()
        score(stock, SEQUENCES)
        model = upgrade(stock)
        model.reward_distribution(**batch)
        monkeypatch.setattr(inference, "prepare", lambda model: "it is to be padded")
        score(model, SEQUENCES)
    assert len(outputs) >= 3
    assert not any(map(is_cached, outputs))


def test_scoring_without_a_pad_token_is_an_error(tiny_llama_dir):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token_id is None"):
        score(model, SEQUENCES)


@pytest.mark.parametrize("wrong", [-1, 393, 100_000])
def test_a_pad_token_that_the_model_does_not_know_is_named(wrong, tiny_llama_dir):
    """It would be an index out of range, or a row of zeros from the end of the embeddings."""
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir)
    model.config.pad_token_id = wrong
    message = f"the padding token has the id {wrong}, and the model has the ids 0 to 392"
    with pytest.raises(ValueError, match=message):
        score(model, SEQUENCES)
    with pytest.raises(ValueError, match=message):
        DiscoReward(model, AutoTokenizer.from_pretrained(tiny_llama_dir))


def test_a_checkpoint_whose_pad_token_is_beyond_its_vocabulary(tiny_llama_dir, tmp_path):
    path = edited_copy(tiny_llama_dir, tmp_path / "odd", config={"pad_token_id": 393})
    with pytest.raises(ValueError, match=r"odd: its configuration .* set pad_token_id in config\.json"):
        DiscoRewardModel.from_pretrained(path)


def test_batches_keep_to_their_budget():
    # Longest first; 5 + one of 7 would pad to 14 of 12 allowed. The text of 20 exceeds it and is alone.
    assert list(batches_by_tokens([[0] * length for length in (2, 7, 20, 5, 4, 3)], 12)) == [[2], [1], [3, 4], [5, 0]]
    assert list(batches_by_tokens([], 12)) == []


def test_large_batches_are_of_similar_length():
    # Four of 300 are 1,200 tokens, enough to keep a device busy. 240 is 0.8 of 300 and still joins them, 239 does not,
    # and neither does it hold up those below it, which are too few to keep anything busy.
    sequences = [[0] * length for length in (300, 300, 300, 300, 240, 239, 10)]
    assert list(batches_by_tokens(sequences, 8192)) == [[0, 1, 2, 3, 4], [5, 6]]


def test_an_empty_sequence_is_an_error(tiny_llama_dir):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1)
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        score(model, [[5, 2], []])
