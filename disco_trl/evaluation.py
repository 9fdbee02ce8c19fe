"""How good is a reward model on pairs that it has not seen, and how honest is its error bar?

Two stations. First tokens become rewards: `tokenize`, `tokenize_pair` and `score` run a model over texts or pairs, the
way that training saw them. Then arrays become figures: every metric is a pure function of NumPy arrays, one number a
pair or one a text, whichever model they come from.

A plain scalar reward model is read as Bradley–Terry, that is the logistic family with every scale at 1/√2, so that
`RewardDistribution.log_prob_greater` serves both.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .distributions import RewardDistribution


# Tokens to rewards


def tokenize(
    processing_class: PreTrainedTokenizerBase, content: str | list[dict[str, Any]], **chat_template_kwargs: Any
) -> list[int]:
    """
    Token ids of a text, or of a conversation, as TRL's `RewardTrainer` makes them.

    A text gets the end-of-text token unless it ends with it; a conversation goes through the chat template. Nothing is
    ever truncated: a reward is read at the last token, and a text without its end is another text.
    """
    encoded: Any
    if isinstance(content, str):
        eos_token = processing_class.eos_token
        encoded = processing_class(text=content if content.endswith(eos_token) else content + eos_token)
    else:
        encoded = processing_class.apply_chat_template(
            content, tokenize=True, return_dict=True, **chat_template_kwargs
        )
    return encoded["input_ids"]


def tokenize_pair(example: dict[str, Any], processing_class: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """
    Token ids of the chosen and of the rejected side of a row of a preference dataset, of any type that TRL documents:
    plain text or messages, with or without a `prompt`, `tools` or `chat_template_kwargs`, or tokenized already.
    """
    if "chosen_ids" in example:
        return example["chosen_ids"], example["rejected_ids"]
    tools = example.get("tools")
    chat_template_kwargs = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(example.get("chat_template_kwargs") or {}),
    }
    sides = []
    for side in ("chosen", "rejected"):
        content = example["prompt"] + example[side] if "prompt" in example else example[side]
        sides.append(tokenize(processing_class, content, **chat_template_kwargs))
    return sides[0], sides[1]


@torch.no_grad()
def score(
    model: Any, sequences: Sequence[list[int]], batch_size: int = 32, description: str = "Scoring"
) -> RewardDistribution:
    """
    Rewards of token sequences, in batches of similar length, with a progress bar.

    Args:
        model: a disco model, or any sequence classifier with one label; with or without a PEFT adapter.
        sequences: `N` lists of token ids.
        batch_size: sequences in a batch.
        description: what the progress bar says.

    Returns:
        `RewardDistribution` with location and scale of shape `[N]`, float32 on the CPU, in the order of `sequences`.
        Of a model without a scale: the logistic family with every scale at 1/√2, which is Bradley–Terry.

    Raises:
        ValueError: if `model.config.pad_token_id` is not set, without which no classifier finds the last token.
    """
    pad_token_id = model.config.get_text_config().pad_token_id
    if pad_token_id is None:
        raise ValueError("model.config.pad_token_id is None; set it to the tokenizer's pad_token_id")
    by_length = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    location = torch.empty(len(sequences))
    scale = torch.full_like(location, 1 / math.sqrt(2))
    family = "logistic"

    was_training = model.training
    model.eval()
    try:
        with logging.tqdm(total=len(sequences), desc=description, unit="text") as progress:
            # The longest first: memory runs out at once or not at all.
            for start in range(len(sequences), 0, -batch_size):
                indices = by_length[max(start - batch_size, 0) : start]
                rows = [torch.tensor(sequences[index]) for index in indices]
                input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
                lengths = torch.tensor([len(row) for row in rows])
                attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
                output = model(input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device))
                location[indices] = output.logits.squeeze(-1).float().cpu()
                if getattr(output, "scale", None) is not None:
                    scale[indices] = output.scale.squeeze(-1).float().cpu()
                    family = model.config.disco["reward_family"]
                progress.update(len(indices))
    finally:
        model.train(was_training)
    return RewardDistribution(location, scale, family)


# Pairs to figures


def accuracy(margin: ArrayLike) -> float:
    """Share of pairs whose chosen side has the higher reward, ties by half; `margin` `[N]` is chosen less rejected."""
    return float(np.mean((np.sign(np.asarray(margin, dtype=float)) + 1) / 2))


def negative_log_likelihood(log_prob: ArrayLike) -> float:
    """Mean of −log P(chosen ≻ rejected) in nats, from `log_prob` `[N]`. Without knowledge it is log 2 = 0.693."""
    return float(-np.mean(np.asarray(log_prob, dtype=float)))


def brier_score(prob: ArrayLike) -> float:
    """Mean squared error of P(chosen ≻ rejected), `prob` `[N]`, as a forecast. Without knowledge it is 0.25."""
    return float(np.mean((1 - np.asarray(prob, dtype=float)) ** 2))


@dataclass(frozen=True)
class ReliabilityCurve:
    """Pairs in bins of equal mass, by the probability that was predicted for them; each field is an array `[bins]`."""

    predicted: np.ndarray  # mean predicted probability that the first side wins
    observed: np.ndarray  # share of the bin in which it did
    count: np.ndarray  # pairs in the bin


def reliability_curve(prob: ArrayLike, bins: int = 15, seed: int = 0) -> ReliabilityCurve:
    """
    Predicted against observed frequency.

    The chosen side always wins, so that P(chosen ≻ rejected) has nothing to be calibrated against. Hence each pair
    gets a random orientation first.

    Args:
        prob: P(chosen ≻ rejected), `[N]`.
        bins: bins of equal mass; fewer than asked for if there are fewer pairs.
        seed: seed of the orientations.
    """
    prob = np.asarray(prob, dtype=float)
    flipped = np.random.default_rng(seed).random(len(prob)) < 0.5
    predicted = np.where(flipped, 1 - prob, prob)
    order = np.argsort(predicted, kind="stable")
    members = np.array_split(order, min(bins, len(prob)))
    return ReliabilityCurve(
        predicted=np.array([predicted[bin_].mean() for bin_ in members]),
        observed=np.array([(~flipped[bin_]).mean() for bin_ in members]),
        count=np.array([len(bin_) for bin_ in members]),
    )


def calibration_error(prob: ArrayLike, bins: int = 15, seed: int = 0) -> float:
    """
    Expected calibration error: the mean over pairs of |observed − predicted| in their bin of the `reliability_curve`.

    Perfect forecasts score above 0 as well, by chance: about 0.3/√(N / bins), which is 0.007 at 30,000 pairs.
    """
    curve = reliability_curve(prob, bins, seed)
    return float(np.average(np.abs(curve.observed - curve.predicted), weights=curve.count))


def pair_metrics(log_prob: ArrayLike, margin: ArrayLike) -> dict[str, float]:
    """
    The metrics of held-out pairs.

    Args:
        log_prob: log P(chosen ≻ rejected), `[N]`, in nats.
        margin: location of chosen minus location of rejected, `[N]`.
    """
    prob = np.exp(np.asarray(log_prob, dtype=float))
    return {
        "accuracy": accuracy(margin),
        "nll": negative_log_likelihood(log_prob),
        "brier": brier_score(prob),
        "calibration_error": calibration_error(prob),
    }


# Texts to figures, where people's own ratings of each text are known


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation of `a` `[N]` and `b` `[N]`, ties at their mean rank; nan if either is constant."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        if len(counts) == 1:
            return math.nan
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def centrality(location: ArrayLike) -> np.ndarray:
    """
    −|μ − median(μ)|, `[N]`: the baseline that any claim about learned scales must beat.

    People disagree least about extreme texts (and a bounded rating leaves them no room to), so that this alone, with
    no scale learned, ranks with their standard deviation.
    """
    location = np.asarray(location, dtype=float)
    return -np.abs(location - np.median(location))
