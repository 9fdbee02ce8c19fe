"""Best of N: the answer with the highest transformed reward, for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.tokenization import Content
from ..distributions.reward_distribution import RewardDistribution
from .disco_reward import DiscoReward


@dataclass(frozen=True)
class Best:
    """Best answer to one prompt, with the rewards of all its candidates.

    Attributes:
        index (`int`):
            Position of the best answer among the candidates.
        candidate (`str` or `list[dict]`):
            The best answer.
        rewards (`torch.Tensor` of shape `(N,)`):
            Transformed rewards of all candidates.
        distribution ([`RewardDistribution`]):
            Distributions of the rewards of all candidates, of shape `(N,)`.
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
    """Selects the best answer to each prompt by its transformed reward.

    Args:
        prompts (`Sequence`):
            `P` texts or `P` lists of messages.
        candidates (`Sequence[Sequence]`):
            For each prompt a non-empty list of answers, of the same kind as the prompt.
        transform (`str`, *optional*, defaults to `"mean"`):
            Name of the transform, see [`DiscoReward`].
        model (`str`, `os.PathLike`, [`DiscoRewardModel`] or [`~peft.PeftModel`]):
            Reward model, see [`DiscoReward`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*, defaults to `None`):
            Tokenizer of the training, see [`DiscoReward`].
        columns (`dict[str, Sequence]`, *optional*, defaults to `None`):
            `tools` and `chat_template_kwargs`, `P` values of each.
        **options:
            Further arguments of [`DiscoReward`].

    Returns:
        `list[Best]`: One [`Best`] for each prompt. Of equal rewards the first wins.

    Raises:
        `ValueError`: If a prompt has no candidates (the message contains the row), and in the cases of
        [`DiscoReward`].
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
    # Groups are the rows and not equal prompts: a prompt that occurs twice is two tasks with candidates of their own.
    group = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(counts, dtype=torch.long))
    rewards = reward.transform(distribution, group)
    return [
        Best(best, answers[best], rewards[rows], distribution[rows])
        for answers, rows in zip(candidates, torch.arange(len(rewards)).split(counts), strict=True)
        for best in [int(rewards[rows].argmax())]
    ]
