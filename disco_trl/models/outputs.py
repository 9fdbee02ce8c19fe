"""What a disco model's `forward` returns."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


# Fields of the output that are the stock model's own. transformers 5.24 calls `cache` what was `past_key_values`.
HANDED_ON = tuple({field.name for field in fields(SequenceClassifierOutputWithPast)} - {"loss", "logits"})
# Fields that a stock classifier does not have; `compute_metrics` gets the others.
OWN_OUTPUTS = ("scale", "raw_shape", "likelihood", "pooled_hidden_state")


@dataclass
class RewardModelOutput(SequenceClassifierOutputWithPast):
    """What a disco model returns: a stock classifier's fields and, after them, its own.

    `loss` is the mean squared error of the location, if `labels` were passed (as a stock one-label classifier does),
    and `logits` the location, `[B, 1]`.

    Attributes:
        scale: Tensor `[B, 1]`, positive.
        raw_shape: Tensor `[B, S]`, of a family with S shape parameters.
        likelihood: Tensor `[B, J]`, what the model has learned of how people answer, the same in each row.
        pooled_hidden_state: Tensor `[B, H]`, what the head saw of each row, without gradient.
    """

    scale: Tensor | None = None
    raw_shape: Tensor | None = None
    likelihood: Tensor | None = None
    pooled_hidden_state: Tensor | None = None
