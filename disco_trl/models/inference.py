"""From tokens to rewards: through the model in batches of a bounded number of tokens.

Everything that scores (reward functions, files, servers, evaluation) comes through here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers.utils import logging

from ..data.forest import batches_by_unique_tokens, pack
from ..distributions.reward_distribution import RewardDistribution
from .modeling import DiscoRewardModel
from .prefix_sharing import prepare


logger = logging.get_logger(__name__)

TOKENS_PER_BATCH = 8192
"""Tokens in a batch, as many as are computed, if nobody says otherwise; a longer text is a batch of its own."""

BUSY_TOKENS = 1024
"""Tokens that keep a device about as busy as more do. From there on a text joins a batch only if it is nearly as long
as the longest: on two CPU cores that scores texts of mixed length 1.8 times as fast as filling the budget."""
NEARLY_AS_LONG = 0.8


def batches_by_tokens(sequences: Sequence[list[int]], tokens_per_batch: int) -> Iterator[list[int]]:
    """
    Indices of sequences in batches of similar length, whose size padded to the longest stays within a budget.

    The longest come first: memory runs out at once or not at all. A sequence above the budget is alone.
    """
    lengths = list(map(len, sequences))
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True):
        if batch:
            longest = lengths[batch[0]]
            is_full = (len(batch) + 1) * longest > tokens_per_batch
            is_busy = len(batch) * longest >= BUSY_TOKENS
            if is_full or (is_busy and lengths[index] < NEARLY_AS_LONG * longest):
                yield batch
                batch = []
        batch.append(index)
    if batch:
        yield batch


def _pad(sequences: list[list[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    rows = [torch.tensor(sequence) for sequence in sequences]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(row) for row in rows])
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
    }


def check_sequences(model: Any, sequences: Sequence[list[int]]) -> None:
    """
    Raise a `ValueError` if a model cannot read a sequence. It would end in an index that is out of range (on an
    accelerator in an assertion, which takes the process with it), in memory that is not there, or in a reward for
    positions that the model was never trained on.
    """
    known = vocabulary_size(model)
    positions = most_positions(model)
    for index, sequence in enumerate(sequences):
        if positions is not None and len(sequence) > positions:
            raise ValueError(
                f"sequence {index} has {len(sequence)} tokens, and the model has {positions} positions "
                "(max_position_embeddings in its config.json); leave it out, or cut the text yourself"
            )
        if known and not 0 <= min(sequence) <= max(sequence) < known:
            token = max(sequence) if min(sequence) >= 0 else min(sequence)
            raise ValueError(
                f"sequence {index} holds the token id {token}, and the model has the ids 0 to {known - 1}; tokenize "
                "with the model's own tokenizer"
            )


def vocabulary_size(model: Any) -> int:
    """How many token ids a model knows; 0 if that cannot be told."""
    embeddings = model.get_input_embeddings()
    # Not the weight's shape, where there is another way: FSDP and DeepSpeed leave a process a part of it.
    size = getattr(embeddings, "num_embeddings", None)
    return int(size or getattr(getattr(embeddings, "weight", None), "shape", [0])[0])


def most_positions(model: Any) -> int | None:
    """The longest text that a model can read, in tokens; None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or None


@torch.no_grad()
def run_in_batches(
    model: Any,
    sequences: Sequence[list[int]],
    tokens_per_batch: int = TOKENS_PER_BATCH,
    description: str | None = None,
) -> Iterator[tuple[list[int], Any]]:
    """
    Run a model over token sequences, in evaluation mode and without gradients.

    Args:
        model: a disco model, or any sequence classifier with one label; with or without a PEFT adapter.
        sequences: lists of token ids, none of them empty.
        tokens_per_batch: tokens in a batch: different ones where the model can share prefixes (see
            `disco_trl.models.prefix_sharing`), else with padding.
        description: what a progress bar says; there is none without.

    Yields:
        Indices of the batch's sequences, and the model's output for them in that order.

    Raises:
        ValueError: if `model.config.pad_token_id` is not set, without which no classifier finds the last token, or if
            a sequence is empty, longer than the model has positions for, or holds a token that the model has not.
    """
    pad_token_id = model.config.get_text_config().pad_token_id
    if pad_token_id is None:
        raise ValueError("model.config.pad_token_id is None; set it to the tokenizer's pad_token_id")
    if [] in sequences:
        raise ValueError(f"sequence {sequences.index([])} is empty: there is no last token to read a reward at")
    check_sequences(model, sequences)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        refusal = prepare(model)
        shares_prefixes = refusal is None
        if not shares_prefixes and hasattr(model.config, "disco"):  # no news of a plain classifier
            logger.warning_once(f"{model.config.name_or_path}: prefixes are not shared in scoring: {refusal}")
        divide = batches_by_unique_tokens if shares_prefixes else batches_by_tokens
        collate: Any = pack if shares_prefixes else _pad
        with logging.tqdm(total=len(sequences), desc=description, unit="text", disable=description is None) as bar:
            for indices in divide(sequences, tokens_per_batch):
                batch = collate([sequences[index] for index in indices], pad_token_id)
                yield indices, model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
                bar.update(len(indices))
    finally:
        for module in training:
            module.training = True


def score(
    model: Any,
    sequences: Sequence[list[int]],
    tokens_per_batch: int = TOKENS_PER_BATCH,
    description: str | None = None,
) -> RewardDistribution:
    """
    Rewards of token sequences; arguments and errors are those of `run_in_batches`.

    Returns:
        `RewardDistribution` with location and scale of shape `[N]`, float32 on the CPU, in the order of `sequences`.
        Of a model without a scale: the logistic family with every scale at 1/√2, which is Bradley–Terry.
    """
    inner = model.get_base_model() if is_peft_model(model) else model
    order: list[int] = []
    parts = [] if sequences else [RewardDistribution(torch.empty(0), torch.empty(0), "logistic")]
    for indices, output in run_in_batches(model, sequences, tokens_per_batch, description):
        if getattr(output, "scale", None) is None:
            location = output.logits.squeeze(-1)
            rewards = RewardDistribution(location, torch.full_like(location, 1 / math.sqrt(2)), "logistic")
        else:
            rewards = inner.rewards_of(output)
        parts.append(rewards.map(lambda tensor: tensor.float().cpu()))
        order += indices
    return RewardDistribution.cat(parts)[torch.tensor(order, dtype=torch.long).argsort()]


def load_trained(path: str, **kwargs: Any) -> Any:
    """A reward model to score with and not to train, in evaluation mode.

    A scalar reward model, which has no scale, is read as Bradley–Terry, with a warning: the logistic family with every
    scale at 1/√2.

    Args:
        path, **kwargs: as for `DiscoRewardModel.from_pretrained`.

    Raises:
        ValueError: as `DiscoRewardModel.from_pretrained` does, and if it is a language model without a reward head.
    """
    model = DiscoRewardModel.from_pretrained(path, **kwargs).eval()
    inner = model.get_base_model() if is_peft_model(model) else model
    # (An adapter brings the head that its base has not, or does not load.)
    if inner is model and inner.head_name in inner.newly_initialized:
        raise ValueError(
            f"{path} is a language model without a reward head: its rewards would be random. Train one with "
            "`disco-trl train`, or name a trained reward model"
        )
    scale = inner.scale_head
    # An adapter may have brought the scale that its base has not.
    if f"{inner.head_name}.scale" in inner.newly_initialized and scale.fixed_scale is None and not scale.weight.any():
        logger.warning(f"{path} has no scale and is read as Bradley–Terry: every scale is 1/√2.")
        inner._convert_heads({"reward_family": "logistic", "fixed_scale": 2**-0.5})
    return model
