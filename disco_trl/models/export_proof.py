"""
The proof of an export: what the written files give is compared with what their source gives.

Rewards are those of sample texts, one by one and in a padded batch. In float32 arithmetic, with the weights as rounded
to the dtype of the files, all outputs have to agree within [`TOLERANCE`].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.tokenization import tokenize
from .inference import run_in_batches
from .plain_logits import ENTRY, from_attribute_logits, from_two_logits


# Largest difference that verification accepts: of locations relative to max(1, |μ|), and of log σ. The order of
# additions in float32 accounts for about 1e-6, and merging an adapter for about 1e-5.
TOLERANCE = 1e-4

SAMPLE_TEXTS = (
    "Yes.",
    "The capital of France is Paris.",
    "I did not like the film at all, but my sister, who has seen it twice, says that it grows on you: 8/10?",
    "def add(a, b):\n    return a + b  # works for strings, too",
    "Ich weiß es nicht… 申し訳ありませんが、わかりません。 🙂",
    "To learn the piano, practise a little every day. " * 6,
)


class ProofError(RuntimeError):
    """Error for written files that do not give the rewards of their source."""


class SampleRewards(NamedTuple):
    """
    K rewards of each of N texts that were scored alone and then in one batch.

    Attributes:
        location (`torch.Tensor` of shape `(2N, K)`):
            Their locations.
        log_scale (`torch.Tensor` of shape `(2N, K)`, *optional*):
            The logs of their scales, where there are any.
    """

    location: Tensor
    log_scale: Tensor | None


class Differences(NamedTuple):
    """The largest difference of locations, and of log scales where both sides have them."""

    location: float
    log_scale: float | None


def sample_sequences(tokenizer: PreTrainedTokenizerBase, source: Any) -> list[list[int]]:
    """
    Tokenize the sample texts, the last two as a conversation if the tokenizer has a chat template.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        source ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, whose positions limit the texts.

    Returns:
        `list[list[int]]`: Token ids.
    """
    contents: list[Any] = list(SAMPLE_TEXTS)
    if tokenizer.chat_template is not None:
        roles = ("user", "assistant")
        contents[-1] = [{"role": role, "content": text} for role, text in zip(roles, SAMPLE_TEXTS[-2:], strict=True)]
    # Where a text is cut does not matter for a comparison. The 8 are for RoBERTa, which counts positions from the id
    # of its padding token.
    limit = getattr(source.config, "max_position_embeddings", None) or 4096
    return [tokenize(tokenizer, content)[: max(limit - 8, 1)] for content in contents]


def _read(model: Any, output: Any, to: str) -> SampleRewards:
    """The rewards in an output, of a disco model those that a file of this kind holds."""
    logits = output.logits.float()
    if getattr(output, "scale", None) is not None:
        parts = output.by_attribute()
        parts = {"attributes": parts[1:], "disco": parts}.get(to, parts[:1])
        location, scale = (
            torch.cat([getattr(part, name).float() for part in parts], dim=-1) for name in ("location", "scale")
        )
        return SampleRewards(location, scale.log())
    if to == "scalar":
        return SampleRewards(logits, None)
    convert: Any = from_attribute_logits if to == "attributes" else from_two_logits
    rewards = convert(logits, getattr(model.config, ENTRY))
    rows = len(logits)
    return SampleRewards(rewards.location.reshape(rows, -1), rewards.scale.reshape(rows, -1).log())


def sample_rewards(model: Any, sequences: list[list[int]], to: str) -> SampleRewards:
    """
    Compute the rewards of texts, one by one and then in one batch.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The source, or the model that was written.
        sequences (`list[list[int]]`):
            Token ids of the N texts.
        to (`str`):
            What is written: it says how many rewards there are.

    Returns:
        [`SampleRewards`]: The rewards.
    """
    places: list[int] = []
    found = []
    for start, tokens_per_batch in ((0, 1), (len(sequences), sum(map(len, sequences)) * len(sequences))):
        for indices, output in run_in_batches(model, sequences, tokens_per_batch):
            # The order of the batches depends on whether the model shares prefixes.
            places += [start + index for index in indices]
            found.append(_read(model, output, to))
    order = torch.tensor(places).argsort()
    log_scales = [rewards.log_scale for rewards in found if rewards.log_scale is not None]
    location = torch.cat([rewards.location for rewards in found])[order]
    return SampleRewards(location, torch.cat(log_scales)[order] if log_scales else None)


def differences(rewards: SampleRewards, expected: SampleRewards, relative: bool = True) -> Differences:
    """
    Compare rewards.

    Args:
        rewards, expected ([`SampleRewards`]):
            Rewards of the same texts.
        relative (`bool`, *optional*, defaults to `True`):
            Whether differences of locations are divided by max(1, |μ|).

    Returns:
        [`Differences`]: The largest ones.
    """
    difference = (rewards.location - expected.location).abs()
    if relative:
        difference /= expected.location.abs().clamp_min(1)
    log_scale = None
    if rewards.log_scale is not None and expected.log_scale is not None:
        log_scale = (rewards.log_scale - expected.log_scale).abs().max().item()
    return Differences(difference.max().item(), log_scale)


def compare(what: str, rewards: SampleRewards, expected: SampleRewards) -> Differences:
    """
    Compare rewards, and raise an error if they are not the same.

    Args:
        what (`str`):
            What gave the rewards, for the error.
        rewards, expected ([`SampleRewards`]):
            Rewards of the same texts.

    Returns:
        [`Differences`]: The largest ones.

    Raises:
        [`ProofError`]: If they exceed [`TOLERANCE`].
    """
    found = differences(rewards, expected)
    # `not ... <=` also fails for nan.
    for name, difference in (("locations", found.location), ("log scales", found.log_scale)):
        if difference is not None and not difference <= TOLERANCE:
            raise ProofError(
                f"{what} does not give the rewards of its source: {name} differ by up to {difference:.2g}, and "
                f"{TOLERANCE:.0e} is allowed; nothing was written"
            )
    return found
