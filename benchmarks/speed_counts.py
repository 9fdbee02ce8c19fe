"""Pairs, tokens and floating-point operations that `benchmarks.speed` counts. Nothing here is timed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from disco_trl.data.files import choose_split, load_preferences
from disco_trl.data.forest import common_prefix
from disco_trl.data.tokenization import tokenize_answers


Pair = tuple[list[int], list[int]]
"""Token ids of the chosen and of the rejected side."""

# Dense bfloat16 FLOP/s from the vendors' data sheets. The first name that is part of the device's name counts, so that
# longer names come first.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 990e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


# Pairs


def load_pairs(dataset: str, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> list[Pair]:
    """Loads tokenized pairs. Those that TRL's length filter drops, and those whose sides are equal, are left out.

    Args:
        dataset (`str`):
            Hub id, folder or file of preference pairs.
        split (`str`):
            Name of the split.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        max_length (`int` or `None`):
            Maximum number of tokens of a side.

    Returns:
        `list[Pair]`: Token ids of both sides of each pair.
    """
    rows = choose_split(load_preferences(dataset, argument="--dataset"), split, "--dataset")
    tokenized = (tokenize_answers(row, tokenizer) for row in tqdm(rows, desc="tokenizing", unit="pair", leave=False))
    pairs = ((chosen, rejected) for chosen, rejected in tokenized)
    limit = max_length or float("inf")
    return [pair for pair in pairs if max(map(len, pair)) <= limit and pair[0] != pair[1]]


def synthetic_pairs(
    number: int, length: int, prompt_share: float, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[Pair]:
    """Creates pairs of random tokens, both sides of a pair equally long.

    Lengths lie between 0.5 and 1.5 times `length` at equal distances, which are the expected order statistics of
    uniform lengths.

    Args:
        number (`int`):
            Number of pairs.
        length (`int`):
            Mean number of tokens of a side.
        prompt_share (`float`):
            Share of a side that is the prompt.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer whose ordinary tokens are drawn.
        seed (`int`):
            Seed of the draws.

    Returns:
        `list[Pair]`: Token ids of both sides of each pair.
    """
    rng = np.random.default_rng(seed)
    words = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    pairs = []
    for place in range(1, number + 1):
        total = max(round(length * (0.5 + place / (number + 1))), 2)
        prompt = min(round(prompt_share * total), total - 1)
        chosen, rejected = rng.choice(words, total), rng.choice(words, total)
        rejected[:prompt] = chosen[:prompt]
        while rejected[prompt] == chosen[prompt]:
            rejected[prompt] = rng.choice(words)
        pairs.append((chosen.tolist(), rejected.tolist()))
    return pairs


@dataclass(frozen=True)
class PairLengths:
    """Numbers of tokens of pairs, each of shape `(N,)`: of both sides, and of their common prefix."""

    chosen: np.ndarray
    rejected: np.ndarray
    shared: np.ndarray

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "PairLengths":
        """Measures pairs."""
        columns = [(len(chosen), len(rejected), common_prefix(chosen, rejected)) for chosen, rejected in pairs]
        return cls(*np.array(columns, dtype=np.int64).reshape(-1, 3).T)

    def __getitem__(self, rows: list[int]) -> "PairLengths":
        """Lengths of a selection of pairs."""
        return PairLengths(self.chosen[rows], self.rejected[rows], self.shared[rows])

    @property
    def unique(self) -> int:
        """Tokens with each pair's prompt counted once: the least that has to be computed."""
        return int((self.chosen + self.rejected - self.shared).sum())

    @property
    def repeated(self) -> int:
        """Tokens of the prompts, which are computed a second time without prefix sharing."""
        return int(self.shared.sum())

    @property
    def padded(self) -> int:
        """Tokens of one batch of both sides of all pairs, padded to the longest."""
        return int(2 * len(self.chosen) * max(self.chosen.max(), self.rejected.max()))


# Batches


def choose_batches(
    batches: list[list[int]], lengths: PairLengths, number: int, seed: int, draws: int = 1000
) -> list[list[int]]:
    """Chooses a few batches that represent an epoch: of many random draws, the one whose mean numbers of unique and of
    padded tokens per pair come closest to the epoch's.

    Args:
        batches (`list[list[int]]`):
            Pairs of each batch of the epoch.
        lengths ([`PairLengths`]):
            Lengths of all pairs.
        number (`int`):
            Number of batches to choose.
        seed (`int`):
            Seed of the draws.
        draws (`int`, *optional*, defaults to `1000`):
            Number of random draws.

    Returns:
        `list[list[int]]`: The chosen batches.

    Raises:
        `ValueError`: If the epoch has fewer batches than `number`.
    """
    if number > len(batches):
        raise ValueError(f"an epoch has {len(batches)} full batches, fewer than the {number} asked for; lower --steps")
    counts = np.array([(len(batch), lengths[batch].unique, lengths[batch].padded) for batch in batches], dtype=float)
    target = counts[:, 1:].sum(axis=0) / counts[:, 0].sum()
    rng = np.random.default_rng(seed)
    candidates = [rng.choice(len(batches), number, replace=False) for _ in range(draws)]

    def distance(rows: np.ndarray) -> float:
        mean = counts[rows, 1:].sum(axis=0) / counts[rows, 0].sum()
        return float(np.abs(mean / target - 1).sum())

    return [batches[row] for row in min(candidates, key=distance)]


# Floating-point operations


def matmul_flops_per_token(model: Any) -> int:
    """FLOP of a training step in the weight matrices of the backbone, per token.

    A weight takes 2 in the forward pass, 2 for the gradient of the activations, and 2 more for its own gradient if it
    is trained. The total is 6 N if everything is trained and about 4 N under LoRA. Embeddings are looked up, not
    multiplied. Recomputation by activation checkpointing does not count.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model whose trainable parameters have `requires_grad`.

    Returns:
        `int`: FLOP per token.
    """
    model = model.get_base_model() if is_peft_model(model) else model
    backbone = getattr(model, model.base_model_prefix)
    total = 0
    for module in backbone.modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 2:
                total += (6 if parameter.requires_grad else 4) * parameter.numel()
    return total


def attention_flops(config: Any, lengths: PairLengths) -> int:
    """FLOP of a training step in attention over the unique tokens of pairs.

    In each layer it is 12 times the width of all heads for each key that a token attends to (2 matrix products of 2
    each, and twice that in the backward pass), of which only the causal half counts.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Config of the model.
        lengths ([`PairLengths`]):
            Lengths of the pairs.

    Returns:
        `int`: FLOP.
    """
    config = config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers

    def keys(length: np.ndarray, window: int | None) -> np.ndarray:
        # 1 + 2 + ... up to the window, and the size of the window for every later token.
        ramp = length if window is None else np.minimum(length, window)
        return ramp * (ramp + 1) // 2 + (length - ramp) * (window or 0)

    total = 0
    for layer_type in layer_types:
        window = config.sliding_window if layer_type == "sliding_attention" else None
        seen = keys(lengths.chosen, window) + keys(lengths.rejected, window) - keys(lengths.shared, window)
        total += 12 * width * int(seen.sum())
    return total


def peak_flops(dtype: str) -> float | None:
    """Peak FLOP/s of this machine's GPU, if its name is known and the computation is in bfloat16."""
    if not torch.cuda.is_available() or dtype == "float32":
        return None
    name = torch.cuda.get_device_name()
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
