"""The best of several answers to each prompt, by transformed reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..distributions.reward_distribution import RewardDistribution
from .disco_reward import DiscoReward
from .reward_function import Content


@dataclass(frozen=True)
class Best:
    """The best of the answers to one prompt, and what all of them are worth.

    Attributes:
        index: position of the best answer.
        candidate: that answer.
        rewards: Tensor `[N]`, the transformed rewards of all.
        distribution: their locations and scales, `[N]`.
    """

    index: int
    candidate: Content
    rewards: Tensor
    distribution: RewardDistribution


def best_of_n(
    prompts: Sequence[Content],
    candidates: Sequence[Sequence[Content]],
    transform: str = "mean",
    *,
    model: Any,
    processing_class: PreTrainedTokenizerBase | None = None,
    columns: dict[str, Sequence[Any]] | None = None,
    **options: Any,
) -> list[Best]:
    """The best answer to each prompt, by transformed reward.

    Args:
        prompts: `P` texts or lists of messages.
        candidates: for each prompt its answers, at least one, of the prompt's kind.
        transform, model, processing_class, **options: as for `DiscoReward`.
        columns: `tools` and `chat_template_kwargs`, `P` of each.

    Returns:
        A `Best` for each prompt; of equal rewards the first wins.

    Raises:
        ValueError: if a prompt has no candidates (it names the row), and as `DiscoReward` does.
    """
    if len(prompts) != len(candidates):
        raise ValueError(f"{len(prompts)} prompts but {len(candidates)} lists of candidates; they go together by row")
    for row, answers in enumerate(candidates):
        if isinstance(answers, str) or not answers:
            raise ValueError(f"row {row}: candidates must be a list of at least one answer, got {answers!r}")
    reward = DiscoReward(model, processing_class, transform, **options)
    counts = [len(answers) for answers in candidates]
    distribution = reward.distribution(
        [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)],
        [answer for answers in candidates for answer in answers],
        **{
            name: [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
            for name, values in (columns or {}).items()
        },
    )
    group = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(counts, dtype=torch.long))
    rewards = reward.transform(distribution, group)
    return [
        Best(best, answers[best], rewards[rows], distribution[rows])
        for answers, rows in zip(candidates, torch.arange(len(rewards)).split(counts), strict=True)
        for best in [int(rewards[rows].argmax())]
    ]
