"""Base class of TRL reward functions: groups of equal prompts, transforms and metrics, independent of where the
distribution is computed.

What flows: prompts and completions → location, scale and traits of each row → the rows of all processes, in the order
of the processes → groups of equal prompts → metrics and rewards → the rewards of this process's rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather
from torch import Tensor

from ..data.contents import without_nulls
from ..data.tokenization import Content
from ..distributions.reward_distribution import RewardDistribution, get_family
from ..distributions.transforms import Transform, group_members
from ..models.distributed import process_state


logger = logging.getLogger(__name__)


class Scored(NamedTuple):
    """What a reward function has found out about B answers, on the CPU.

    Attributes:
        rewards ([`RewardDistribution`]):
            Their rewards, of shape `(B,)`.
        traits (`torch.Tensor` of shape `(B, ...)`):
            What is compared with the training data.
        locations (`dict[str, torch.Tensor]`):
            Their locations, of shape `(B,)`, for each attribute that the model knows.
    """

    rewards: RewardDistribution
    traits: Tensor
    locations: dict[str, Tensor]

    def map(self, function: Callable[[Tensor], Tensor]) -> Scored:
        """Applies a function to each tensor."""
        locations = {name: function(location) for name, location in self.locations.items()}
        return Scored(self.rewards.map(function), function(self.traits), locations)


class RewardFunction(ABC):
    """TRL reward function with a distribution behind it: `reward(prompts, completions, **columns) -> list[float]`.

    In a distributed run every process has to call it, as TRL's trainers do, because the answers to one prompt are
    compared across processes. For the transform `"win_rate"` set `scale_rewards="none"` in GRPO: the default divides
    rewards by the standard deviation of their group, which undoes a bounded reward.

    In addition to the reward, which TRL logs itself, these metrics are reported through TRL's `log_metric`, computed
    over the batch of all processes:

    - `location/mean` and `scale/mean`: the mean location and the mean scale, in units of the reward.
    - `within_noise`: the share of pairs of siblings (answers to the same prompt) whose locations differ by less than
      the scale of their difference. A person could easily rank such a pair the other way round.
    - `location/mean/NAME`: the mean location for each attribute that the model knows, whichever reward is taken.
    - `below_minimum`: the share of answers that fail the `minimum`, if there is one.

    Metric names are prefixed with the name of the reward function. Location and scale are added to the table of
    completions through `log_extra`.

    Args:
        family (`str`):
            Name of the family of the distributions.
        transform ([`~disco_trl.distributions.transforms.Transform`]):
            Transform that maps each distribution to a reward.
        name (`str` or `None`):
            Name in TRL's logs. If `None`, `disco_` followed by the name of the transform. TRL merges the logs of
            reward functions of the same name.

    Raises:
        `ValueError`: If the transform is undefined for the family.
    """

    def __init__(self, family: str, transform: Transform, name: str | None):
        self.family = get_family(family)
        self.transform = transform
        # An undefined reward (a certainty equivalent of Cauchy) is an error now, not after the first rollout.
        self.transform.check_family(family)
        self.__name__ = name or f"disco_{transform.name}"
        self._warned: set[str] = set()

    def distribution(
        self, prompts: Sequence[Content], completions: Sequence[Content], **columns: Any
    ) -> RewardDistribution:
        """Distributions of the rewards of this process's rows.

        Args:
            prompts (`Sequence`):
                `B` texts or `B` lists of messages.
            completions (`Sequence`):
                `B` texts or `B` lists of messages, of the same kind as `prompts`.
            **columns:
                Lists of `B` values. `tools` and `chat_template_kwargs` are read, the others are ignored.

        Returns:
            [`RewardDistribution`]: Rewards of shape `(B,)`, float32 on the CPU.

        Raises:
            `ValueError`: If prompts and completions do not match. The message contains the row.
            `FloatingPointError`: If a reward is not finite. The message contains the row.
        """
        return self._score(prompts, completions, columns).rewards

    def __call__(self, prompts: Sequence[Content], completions: Sequence[Content], **columns: Any) -> list[float]:
        """Transformed rewards of this process's rows. TRL's trainers call this method.

        Args:
            prompts (`Sequence`):
                `B` texts or `B` lists of messages.
            completions (`Sequence`):
                `B` texts or `B` lists of messages, of the same kind as `prompts`.
            **columns:
                Columns of the dataset, lists of `B` values, and the callbacks `log_metric` and `log_extra` of TRL. The
                `chat_template_kwargs` in the config of the trainer that calls hold for every row, as on TRL's own
                path, unless the row's own say otherwise.

        Returns:
            `list[float]`: `B` rewards.

        Raises:
            `ValueError` or `FloatingPointError`: As in [`~RewardFunction.distribution`].
        """
        columns = _with_template_arguments_of_trainer(columns, len(prompts))
        scored = self._score(prompts, completions, columns)
        own = scored.rewards
        state = process_state()
        counts = gather(torch.tensor([len(own)], device=state.device)).tolist()
        keys = torch.tensor([prompt_key(prompt) for prompt in prompts], dtype=torch.long)
        everywhere = scored.map(lambda rows: _gather_rows(rows, counts))
        group = torch.unique(_gather_rows(keys, counts), return_inverse=True)[1]
        self._report(everywhere, group, **columns)
        if columns.get("log_extra") is not None:
            columns["log_extra"](f"{self.__name__}/location", own.location.tolist())
            columns["log_extra"](f"{self.__name__}/scale", own.scale.tolist())
        # Every process transforms the rows of all processes and keeps its own. Groups and draws of `"sample"` then do
        # not depend on how the rows are distributed.
        first = sum(counts[: state.process_index])
        return self.transform(everywhere.rewards, group)[first : first + len(own)].tolist()

    @abstractmethod
    def _score(self, prompts: Sequence[Content], completions: Sequence[Content], columns: dict[str, Any]) -> Scored:
        """Rewards of `B` answers and, for `_report_shift`, their traits."""

    def _report_shift(self, traits: Tensor) -> dict[str, Tensor]:
        """Metrics that compare the batch of all processes with the training data, where the model has statistics of
        it.
        """
        return {}

    def _report(self, scored: Scored, group: Tensor, **columns: Any) -> None:
        """Logs metrics of the batch of all processes, and warns about it."""
        rewards = scored.rewards
        if len(rewards) == 0:
            return  # The means of nothing would be logged as NaN.
        members = group_members(group)
        metrics = {"location/mean": rewards.location.mean(), "scale/mean": rewards.scale.mean()}
        metrics |= {f"location/mean/{name}": location.mean() for name, location in scored.locations.items()}
        if rewards.cap is not None:
            metrics["below_minimum"] = rewards.cap.isfinite().float().mean()
        within_noise = [self._within_noise(rewards[rows]) for rows in members if len(rows) > 1]
        if within_noise:
            metrics["within_noise"] = torch.cat(within_noise).float().mean()
        if self.transform.needs_groups and any(len(rows) == 1 for rows in members):
            self._warn_once(
                "alone",
                "some prompts have one answer only in this batch, which has no siblings to win against: its win rate "
                "is set to 0.5. Raise num_generations, or use another transform",
            )
        metrics |= self._report_shift(scored.traits)
        if columns.get("log_metric") is not None:
            for name, value in metrics.items():
                columns["log_metric"](f"{self.__name__}/{name}", value.item())

    def _within_noise(self, siblings: RewardDistribution) -> Tensor:
        """For each pair of siblings, whether their locations differ by less than the scale of their difference."""
        first, second = torch.combinations(torch.arange(len(siblings))).T
        difference = siblings.location[first] - siblings.location[second]
        return difference.abs() < self.family.difference_scale(siblings.scale[first], siblings.scale[second])

    def _warn_once(self, what: str, message: str) -> None:
        # Every process remembers the warning, and only the main one logs it.
        if what not in self._warned and process_state().is_main_process:
            logger.warning(f"{self.__name__}: {message}.")
        self._warned.add(what)


def _with_template_arguments_of_trainer(columns: dict[str, Any], rows: int) -> dict[str, Any]:
    """The columns, in which each row has the `chat_template_kwargs` of the trainer's config beside its own."""
    # TRL hands a reward function no arguments of its own, but `log_metric` is a method of the trainer.
    trainer = getattr(columns.get("log_metric"), "__self__", None)
    given = getattr(trainer, "chat_template_kwargs", None)
    if not given:
        return columns
    own = columns.get("chat_template_kwargs")
    own = [None] * rows if own is None else own
    return {**columns, "chat_template_kwargs": [{**given, **without_nulls(of_row or {})} for of_row in own]}


def prompt_key(prompt: Content) -> int:
    """Hashes a prompt. Python's own `hash` differs between processes, so that it cannot identify a group across them.

    Args:
        prompt (`str` or `list[dict]`):
            Text or list of messages. The order of a message's keys does not matter.

    Returns:
        `int`: Non-negative 63-bit key that equal prompts share in every process and run.
    """
    canonical = json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) >> 1  # 63 bits fit a signed int64 tensor.


def _gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """The rows of all processes in the order of the processes, where `counts` has the number of rows of each."""
    if len(counts) == 1:
        return rows
    # `gather` requires tensors of one shape, and the processes may have different numbers of rows.
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = gather(padded.to(process_state().device)).cpu().split(max(counts))
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
