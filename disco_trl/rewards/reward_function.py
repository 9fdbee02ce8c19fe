"""What TRL calls for a reward: groups of equal prompts, transforms and metrics, whoever computes the distribution.

What flows: prompts and completions → location, scale and traits of each row → the same of all processes' rows, in the
order of the processes → groups of equal prompts → metrics and rewards → this process's own.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor

from ..distributions.reward_distribution import RewardDistribution, get_family
from ..distributions.transforms import Transform, group_members
from ..models.distributed import process_state


logger = logging.getLogger(__name__)

Content = str | list[dict[str, Any]]
"""A text, or a list of messages."""


class RewardFunction(ABC):
    """A TRL reward function with a distribution behind it: ``reward(prompts, completions, **columns) -> list[float]``.

    With several processes every process has to call it, as TRL's trainers do: rewards of equal prompts are compared
    across processes, in the order of the processes. For `"win_rate"` set ``scale_rewards="none"`` in GRPO: the default
    divides by the group's standard deviation, which undoes a bounded reward.

    Through TRL's `log_metric` it reports, beside the reward that TRL logs itself, over the batch of all processes:

    - ``location/mean``, ``scale/mean``;
    - ``within_noise``: the share of differences between siblings (answers to one prompt) that are smaller than the
      scale of their difference, so that a person might well see them the other way round.

    Each name begins with that of the reward function. Through `log_extra` it adds location and scale to the table of
    completions.

    Args:
        family: of the distributions.
        transform: what becomes of them.
        name: the name in TRL's logs; by default `disco_` and the transform. TRL mixes the logs of rewards of one name.

    Raises:
        ValueError: if the transform does not exist for the family.
    """

    def __init__(self, family: str, transform: Transform, name: str | None):
        self.family = get_family(family)
        self.transform = transform
        self.transform.check_family(family)
        self.__name__ = name or f"disco_{transform.name}"
        self._warned: set[str] = set()

    def distribution(
        self, prompts: Sequence[Content], completions: Sequence[Content], **columns: Any
    ) -> RewardDistribution:
        """The distributions of the rewards of this process's rows, `[B]`, float32 on the CPU.

        Args:
            prompts, completions: `B` texts or `B` lists of messages each.
            **columns: lists of `B`; `tools` and `chat_template_kwargs` are read.

        Raises:
            ValueError: if prompts and completions do not match; it names the row.
            FloatingPointError: if a reward is not finite; it names the row.
        """
        return self._rewards_and_traits(prompts, completions, columns)[0]

    def __call__(self, prompts: Sequence[Content], completions: Sequence[Content], **columns: Any) -> list[float]:
        """The transformed rewards of this process's rows, and metrics for TRL; see the class."""
        own, own_traits = self._rewards_and_traits(prompts, completions, columns)
        state = process_state()
        counts = gather(torch.tensor([len(own)], device=state.device)).tolist()
        keys = torch.tensor([prompt_key(prompt) for prompt in prompts], dtype=torch.long)
        rewards = own.map(lambda rows: _gather_rows(rows, counts))
        group = torch.unique(_gather_rows(keys, counts), return_inverse=True)[1]
        self._report(rewards, _gather_rows(own_traits, counts), group, **columns)
        if columns.get("log_extra") is not None:
            columns["log_extra"](f"{self.__name__}/location", own.location.tolist())
            columns["log_extra"](f"{self.__name__}/scale", own.scale.tolist())
        # Of all rows in every process: groups and draws then do not depend on how rows are spread over processes.
        first = sum(counts[: state.process_index])
        return self.transform(rewards, group)[first : first + len(own)].tolist()

    @abstractmethod
    def _rewards_and_traits(
        self, prompts: Sequence[Content], completions: Sequence[Content], columns: dict[str, Any]
    ) -> tuple[RewardDistribution, Tensor]:
        """Distributions `[B]` and, for `_report_shift`, any further numbers `[B, ...]` of each row, on the CPU."""

    def _report_shift(self, traits: Tensor) -> dict[str, Tensor]:
        """Metrics that compare a batch of all processes with the training rows, where these are known."""
        return {}

    def _report(self, rewards: RewardDistribution, traits: Tensor, group: Tensor, **columns: Any) -> None:
        """Log and warn about a batch of all processes."""
        if len(rewards) == 0:
            return
        members = group_members(group)
        metrics = {"location/mean": rewards.location.mean(), "scale/mean": rewards.scale.mean()}
        within_noise = [self._within_noise(rewards[rows]) for rows in members if len(rows) > 1]
        if within_noise:
            metrics["within_noise"] = torch.cat(within_noise).float().mean()
        if self.transform.needs_groups and any(len(rows) == 1 for rows in members):
            self._warn_once(
                "alone",
                "some prompts have one answer only in this batch, which has no siblings to win against: its win rate "
                "is set to 0.5. Raise num_generations, or use another transform",
            )
        metrics |= self._report_shift(traits)
        if columns.get("log_metric") is not None:
            for name, value in metrics.items():
                columns["log_metric"](f"{self.__name__}/{name}", value.item())

    def _within_noise(self, siblings: RewardDistribution) -> Tensor:
        """For each pair of siblings, whether their locations differ by less than the scale of their difference."""
        first, second = torch.combinations(torch.arange(len(siblings))).T
        difference = siblings.location[first] - siblings.location[second]
        return difference.abs() < self.family.difference_scale(siblings.scale[first], siblings.scale[second])

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned and process_state().is_main_process:
            logger.warning(f"{self.__name__}: {message}.")
        self._warned.add(what)


def prompt_key(prompt: Content) -> int:
    """A number of 63 bits that equal prompts share, in every process and run."""
    canonical = json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """The rows of all processes, in the order of the processes; `counts` says how many each has."""
    if len(counts) == 1:
        return rows
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = gather(padded.to(process_state().device)).cpu().split(max(counts))
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
