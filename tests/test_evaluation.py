"""`disco_trl.evaluation`: metrics against arithmetic by hand, tokenization against TRL's, scoring in batches."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from disco_trl import DiscoRewardModel
from disco_trl.evaluation import (
    accuracy,
    brier_score,
    calibration_error,
    centrality,
    negative_log_likelihood,
    pair_metrics,
    reliability_curve,
    score,
    spearman,
    tokenize,
    tokenize_pair,
)


# Pairs to figures


def test_accuracy_counts_ties_as_half():
    # right, wrong, tie, right: (1 + 0 + 1/2 + 1) / 4
    assert accuracy([1.0, -2.0, 0.0, 0.5]) == 0.625


def test_negative_log_likelihood_is_in_nats():
    # -(log 1/2 + log 1/4) / 2 = (log 2 + 2 log 2) / 2
    assert negative_log_likelihood(np.log([0.5, 0.25])) == pytest.approx(1.5 * math.log(2))


def test_brier_score():
    # ((1 - 0.8)² + (1 - 0.4)²) / 2 = (0.04 + 0.36) / 2
    assert brier_score([0.8, 0.4]) == pytest.approx(0.2)


def test_reliability_curve_turns_pairs_round_and_fills_bins_evenly():
    # NumPy's generator at seed 0 draws 0.64, 0.27, 0.04, 0.02: all pairs but the first turn round.
    #   predicted for the first side: 0.9 0.4 0.3 0.2     it won: yes no no no
    #   in two bins, sorted: (0.2, 0.3) none won, (0.4, 0.9) one won
    curve = reliability_curve([0.9, 0.6, 0.7, 0.8], bins=2, seed=0)
    assert curve.predicted == pytest.approx([0.25, 0.65])
    assert curve.observed == pytest.approx([0.0, 0.5])
    assert curve.count.tolist() == [2, 2]
    # (2 · |0 - 0.25| + 2 · |0.5 - 0.65|) / 4
    assert calibration_error([0.9, 0.6, 0.7, 0.8], bins=2, seed=0) == pytest.approx(0.2)


def test_reliability_curve_of_fewer_pairs_than_bins():
    assert reliability_curve([0.9, 0.6], bins=15).count.tolist() == [1, 1]


def votes(sharpness: float, n: int = 30_000) -> np.ndarray:
    """P(chosen ≻ rejected) as forecast by sigmoid(sharpness · Δ) where the truth is sigmoid(Δ) and Δ ~ N(0, 2²)."""
    generator = np.random.default_rng(1)
    margin = generator.normal(scale=2, size=n)
    first_wins = generator.random(n) < 1 / (1 + np.exp(-margin))
    return 1 / (1 + np.exp(-sharpness * np.where(first_wins, margin, -margin)))


def test_calibrated_forecasts_have_almost_no_calibration_error():
    # What remains is chance: the mean of |share - probability| in bins of 2,000 pairs is about 0.007.
    assert calibration_error(votes(sharpness=1)) < 0.012


def test_calibration_error_of_overconfident_forecasts_is_that_of_the_formula():
    # E |sigmoid(3Δ) - sigmoid(Δ)| for Δ ~ N(0, 2²), integrated on a fine grid; both sides of 0 lie in different bins.
    margin = np.linspace(-14, 14, 100_001)
    density = np.exp(-(margin**2) / 8)
    gap = np.abs(1 / (1 + np.exp(-3 * margin)) - 1 / (1 + np.exp(-margin)))
    expected = (gap * density).sum() / density.sum()
    assert expected > 0.1
    assert calibration_error(votes(sharpness=3)) == pytest.approx(expected, abs=0.01)


def test_pair_metrics():
    metrics = pair_metrics(np.log([0.8, 0.4]), [1.0, -0.5])
    assert metrics["accuracy"] == 0.5
    assert metrics["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    assert metrics["brier"] == pytest.approx(0.2)
    assert metrics["calibration_error"] == calibration_error([0.8, 0.4])


# Texts to figures


def test_spearman():
    # Σd² = 0 + 1 + 1 + 0 = 2: 1 - 6 · 2 / (4 · (16 - 1))
    assert spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)


def test_spearman_gives_ties_their_mean_rank():
    # ranks 1 2.5 2.5 4 and 1 2 3 4, less their mean 2.5: (2.25 + 2.25) / √(4.5 · 5)
    assert spearman([0, 7, 7, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(22.5))


def test_spearman_of_a_constant_is_nan():
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_centrality():
    # the median is 1
    assert centrality([0.0, 1.0, 5.0]).tolist() == [-1.0, 0.0, -4.0]


# Tokens to rewards

TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
LAYOUTS = {
    "text": {"chosen": "The film is good.", "rejected": "The film is bad."},
    "text that ends already": {"chosen": "Good.<|im_end|>", "rejected": "Bad."},
    "text with a prompt": {"prompt": "How is the film? ", "chosen": "Good.", "rejected": "Bad."},
    "messages": {
        "chosen": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Good."}],
        "rejected": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Bad."}],
    },
    "messages with a prompt": {
        "prompt": [{"role": "user", "content": "How?"}],
        "chosen": [{"role": "assistant", "content": "Good."}],
        "rejected": [{"role": "assistant", "content": "Bad."}],
    },
    "messages with tools": {
        "prompt": [{"role": "user", "content": "How?"}],
        "chosen": [{"role": "assistant", "content": "Good."}],
        "rejected": [{"role": "assistant", "content": "Bad."}],
        "tools": [TOOL],
    },
    "tokens": {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 8]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_are_tokenized_as_trl_does(layout, tiny_llama_dir, tiny_tokenizer, tmp_path):
    row = LAYOUTS[layout]
    trainer = RewardTrainer(
        model=tiny_llama_dir,
        args=RewardConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list([row]),
        processing_class=tiny_tokenizer,
    )
    (expected,) = trainer.train_dataset
    assert tokenize_pair(row, tiny_tokenizer) == (expected["chosen_ids"], expected["rejected_ids"])


def test_long_texts_are_not_truncated(tiny_tokenizer):
    tiny_tokenizer.model_max_length = 8
    assert len(tokenize(tiny_tokenizer, "The film is good. " * 20)) > 100


SEQUENCES = [[7, 8, 9, 10, 2], [5, 2], [11, 12, 13, 2], [6, 2], [30, 31, 32, 33, 34, 35, 2]]


def test_scoring_in_batches_equals_scoring_one_by_one(tiny_llama_dir):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1)
    rewards = score(model, SEQUENCES, batch_size=2)
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
    rewards = score(model, SEQUENCES, batch_size=2)
    assert model.training  # as it was
    assert rewards.family == "cauchy"
    assert rewards.scale.unique().numel() == len(SEQUENCES)
    with torch.no_grad():
        for index, ids in enumerate(SEQUENCES):
            expected = model.eval().reward_distribution(input_ids=torch.tensor([ids]))
            torch.testing.assert_close(rewards.location[index], expected.location[0])
            torch.testing.assert_close(rewards.scale[index], expected.scale[0])


def test_scoring_without_a_pad_token_is_an_error(tiny_llama_dir):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token_id is None"):
        score(model, SEQUENCES)
