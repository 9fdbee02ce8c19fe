"""Inference: from token ids to rewards, in batches with a bounded number of tokens.

Whatever scores (reward functions, data sets, servers, evaluation) uses this module.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers.utils import logging

from ..data.forest import batches_by_unique_tokens, pack
from ..distributions.reward_distribution import RewardDistribution
from .distributed import is_main_process
from .loading import CheckpointKind, load_reward_model
from .modeling import disco_class
from .outputs import overall
from .prefix_sharing import prepare
from .reward_view import RewardsByAttribute, RewardView


logger = logging.get_logger(__name__)

# Default number of tokens in a batch, counted as they are computed. A longer text is a batch of its own.
TOKENS_PER_BATCH = 8192
# With this many tokens a device is about as busy as with more. Beyond it a text joins a batch only if it has at least
# this share of the length of the longest: on two CPU cores, texts of mixed length are scored 1.8 times as fast as in
# batches that fill the budget.
BUSY_TOKENS = 1024
NEARLY_AS_LONG = 0.8


def batches_by_tokens(sequences: Sequence[list[int]], tokens_per_batch: int) -> Iterator[list[int]]:
    """
    Divide sequences into batches of similar length whose padded size stays within a budget.

    The longest sequences come first, so that memory runs out in the first batch or not at all.

    Args:
        sequences (`Sequence[list[int]]`):
            Token ids.
        tokens_per_batch (`int`):
            Largest number of tokens in a batch, padding included. A longer sequence is a batch of its own.

    Yields:
        `list[int]`: Indices of the sequences of a batch.
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
    Check that a model can read all sequences.

    Without the check an unknown token ends in an index error (on an accelerator in an assertion that ends the
    process), and a text that is too long in a lack of memory, or in a reward for positions that the model was never
    trained on.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        sequences (`Sequence[list[int]]`):
            Token ids.

    Raises:
        `ValueError`: If a sequence is longer than the model has positions for, or holds an unknown token id.
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


def check_pad_token(model: Any, pad_token_id: int | None) -> None:
    """
    Check that batches can be padded with a token.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        pad_token_id (`int` or `None`):
            Id of the token. Transformers' pooling finds the last token of a text by it.

    Raises:
        `ValueError`: If there is none, or the model has no embedding of it.
    """
    if pad_token_id is None:
        raise ValueError("model.config.pad_token_id is None; set it to the tokenizer's pad_token_id")
    known = vocabulary_size(model)
    if not 0 <= pad_token_id < (known or math.inf):
        ids = f"the ids 0 to {known - 1}" if known else "ids from 0"
        raise ValueError(
            f"the padding token has the id {pad_token_id}, and the model has {ids}: set the tokenizer's pad_token and "
            "the config's pad_token_id to a token of the model, such as the end of text; or, before training, call "
            "model.resize_token_embeddings(len(tokenizer))"
        )


def vocabulary_size(model: Any) -> int:
    """Number of token ids that a model knows, or 0 if it cannot be found out."""
    embeddings = model.get_input_embeddings()
    # The shape of the weight is the last resort, because FSDP and DeepSpeed leave each process a part of it.
    size = getattr(embeddings, "num_embeddings", None)
    return int(size or getattr(getattr(embeddings, "weight", None), "shape", [0])[0])


def most_positions(model: Any) -> int | None:
    """Number of positions of a model, which is its longest text in tokens, or `None` if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or None


@torch.no_grad()
def run_in_batches(
    model: Any,
    sequences: Sequence[list[int]],
    tokens_per_batch: int = TOKENS_PER_BATCH,
    description: str | None = None,
) -> Iterator[tuple[list[int], Any]]:
    """
    Run a model on token sequences, in evaluation mode and without gradients.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A disco model, or any sequence classifier with one label.
        sequences (`Sequence[list[int]]`):
            Token ids. No sequence may be empty.
        tokens_per_batch (`int`, *optional*, defaults to `8192`):
            Number of tokens in a batch. A model that can share prefixes (see `disco_trl.models.prefix_sharing`) is
            given that many different tokens, any other model that many with padding.
        description (`str`, *optional*):
            Text of a progress bar. By default none is shown.

    Yields:
        `tuple` of `list[int]` and [`~transformers.utils.ModelOutput`]: Indices of the sequences of a batch, and the
        output of the model for them in that order.

    Raises:
        `ValueError`: If `model.config.pad_token_id` is not set or unknown to the model, without which no classifier
            finds the last token; or if a sequence is empty, longer than the model has positions for, or holds an
            unknown token id.
    """
    pad_token_id = model.config.get_text_config().pad_token_id
    check_pad_token(model, pad_token_id)
    if [] in sequences:
        raise ValueError(f"sequence {sequences.index([])} is empty: there is no last token to read a reward at")
    check_sequences(model, sequences)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        refusal = prepare(model)
        shares_prefixes = refusal is None
        # Of a plain classifier nobody expects it.
        if not shares_prefixes and hasattr(model.config, "disco") and is_main_process():
            logger.warning_once(f"{model.config.name_or_path}: prefixes are not shared in scoring: {refusal}")
        divide = batches_by_unique_tokens if shares_prefixes else batches_by_tokens
        collate: Any = pack if shares_prefixes else _pad
        # A stock classifier would keep the keys and values of all layers, as if the text were to be continued.
        inner = model.get_base_model() if is_peft_model(model) else model
        options = {"use_cache": False} if "use_cache" in inspect.signature(inner.forward).parameters else {}
        with logging.tqdm(total=len(sequences), desc=description, unit="text", disable=description is None) as bar:
            for indices in divide(sequences, tokens_per_batch):
                batch = collate([sequences[index] for index in indices], pad_token_id)
                yield indices, model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, **options)
                bar.update(len(indices))
    finally:
        for module in training:
            module.training = True


def score_by_attribute(
    model: Any,
    sequences: Sequence[list[int]],
    tokens_per_batch: int = TOKENS_PER_BATCH,
    description: str | None = None,
) -> RewardsByAttribute:
    """
    Compute all rewards of token sequences: overall, and for each attribute that the model knows.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in [`run_in_batches`].
        sequences (`Sequence[list[int]]`):
            As in [`run_in_batches`].
        tokens_per_batch (`int`, *optional*, defaults to `8192`):
            As in [`run_in_batches`].
        description (`str`, *optional*):
            As in [`run_in_batches`].

    Returns:
        [`~disco_trl.models.reward_view.RewardsByAttribute`]: N rewards, in float32 on the CPU, in the order of
        `sequences`. A model without a scale gives the logistic family with every scale at 1/√2, which is
        Bradley–Terry.

    Raises:
        `ValueError`: As in [`run_in_batches`].
    """
    inner = model.get_base_model() if is_peft_model(model) else model
    if not sequences and hasattr(model.config, "disco"):
        return RewardsByAttribute.of_nothing(inner).to("cpu", torch.float32)
    order: list[int] = []
    nothing = RewardDistribution(torch.empty(0), torch.empty(0), "logistic")
    parts = [] if sequences else [RewardsByAttribute(nothing)]
    for indices, output in run_in_batches(model, sequences, tokens_per_batch, description):
        if getattr(output, "scale", None) is None:
            location = overall(output.logits)
            scale = torch.full_like(location, 1 / math.sqrt(2))
            rewards = RewardsByAttribute(RewardDistribution(location, scale, "logistic"))
        else:
            rewards = RewardsByAttribute.of_output(inner, output)
        parts.append(rewards.to("cpu", torch.float32))
        order += indices
    return RewardsByAttribute.cat(parts)[torch.tensor(order, dtype=torch.long).argsort()]


def score(
    model: Any,
    sequences: Sequence[list[int]],
    tokens_per_batch: int = TOKENS_PER_BATCH,
    description: str | None = None,
    view: RewardView | None = None,
) -> RewardDistribution:
    """
    Compute the rewards of token sequences.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in [`run_in_batches`].
        sequences (`Sequence[list[int]]`):
            As in [`run_in_batches`].
        tokens_per_batch (`int`, *optional*, defaults to `8192`):
            As in [`run_in_batches`].
        description (`str`, *optional*):
            As in [`run_in_batches`].
        view ([`~disco_trl.models.reward_view.RewardView`], *optional*):
            Which rewards, of a model that knows several attributes. By default the overall ones.

    Returns:
        [`~disco_trl.RewardDistribution`]: Location and scale of shape `(N,)`, otherwise as in
        [`score_by_attribute`].

    Raises:
        `ValueError`: As in [`run_in_batches`] and [`~disco_trl.models.reward_view.RewardView.read`].
    """
    rewards = score_by_attribute(model, sequences, tokens_per_batch, description)
    return (view or RewardView()).read(model, rewards)


def load_trained(path: str, **kwargs: Any) -> Any:
    """
    Load a reward model for scoring, in evaluation mode.

    A scalar reward model, which has no scale, is read as Bradley–Terry (the logistic family with every scale at 1/√2),
    and a warning is logged.

    Args:
        path (`str`):
            Hub id or directory of a reward model or a PEFT adapter.
        **kwargs:
            Arguments of [`~disco_trl.DiscoRewardModel.from_pretrained`].

    Returns:
        [`~disco_trl.DiscoRewardModel`] or [`~peft.PeftModel`]: The model.

    Raises:
        `ValueError`: As in [`~disco_trl.DiscoRewardModel.from_pretrained`], and if `path` is a language model, which
            has no reward head.
    """
    model, kind = load_reward_model(path, disco_class, **kwargs)
    if kind is CheckpointKind.BASE:
        raise ValueError(
            f"{path} is a language model without a reward head: its rewards would be random. Train one with "
            "`disco-trl train`, or name a trained reward model"
        )
    inner = model.get_base_model() if is_peft_model(model) else model
    if kind is CheckpointKind.SCALAR and inner.scale_head.fixed_scale is None:
        logger.warning(f"{path} has no scale and is read as Bradley–Terry: every scale is 1/√2.")
        inner.convert_heads({"reward_family": "logistic", "fixed_scale": 2**-0.5})
    return model.eval()
