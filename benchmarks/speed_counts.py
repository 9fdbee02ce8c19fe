"""What `benchmark.py` counts: pairs, tokens and floating-point operations. Nothing here is timed."""

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

# Dense bfloat16 FLOP/s by the vendors' data sheets; the first name that the device's name contains.
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
    """Pairs of a Hub dataset, folder or file: those that TRL's length filter keeps and whose sides differ."""
    rows = choose_split(load_preferences(dataset, argument="--dataset"), split, "--dataset")
    tokenized = (tokenize_answers(row, tokenizer) for row in tqdm(rows, desc="tokenizing", unit="pair", leave=False))
    pairs = ((chosen, rejected) for chosen, rejected in tokenized)
    limit = max_length or float("inf")
    return [pair for pair in pairs if max(map(len, pair)) <= limit and pair[0] != pair[1]]


def synthetic_pairs(
    number: int, length: int, prompt_share: float, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[Pair]:
    """
    Pairs of random tokens, both sides of a pair equally long. Their lengths lie between a half and one and a half of
    `length`, evenly apart (where those of random pairs lie on average), and `prompt_share` of a side is the prompt.
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
    """Tokens of pairs, each `[N]`: of the two sides, and of what both begin with."""

    chosen: np.ndarray
    rejected: np.ndarray
    shared: np.ndarray

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "PairLengths":
        """Measure pairs."""
        columns = [(len(chosen), len(rejected), common_prefix(chosen, rejected)) for chosen, rejected in pairs]
        return cls(*np.array(columns, dtype=np.int64).reshape(-1, 3).T)

    def __getitem__(self, rows: list[int]) -> "PairLengths":
        """Those of some pairs."""
        return PairLengths(self.chosen[rows], self.rejected[rows], self.shared[rows])

    @property
    def unique(self) -> int:
        """Tokens with each pair's prompt counted once: what has to be computed at least."""
        return int((self.chosen + self.rejected - self.shared).sum())

    @property
    def repeated(self) -> int:
        """Tokens of the prompts once more."""
        return int(self.shared.sum())

    @property
    def padded(self) -> int:
        """Tokens of one batch of both sides of all these pairs, padded to the longest."""
        return int(2 * len(self.chosen) * max(self.chosen.max(), self.rejected.max()))


# Batches


def choose_batches(
    batches: list[list[int]], lengths: PairLengths, number: int, seed: int, draws: int = 1000
) -> list[list[int]]:
    """
    A few batches that stand for an epoch: of many random draws, the one whose mean tokens of a pair, both unique and
    padded, come nearest to the epoch's.
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
    """
    Those of a training step in the backbone's weight matrices: 2 for each weight forward, 2 backward to the
    activations, and 2 more for the gradient of a weight that is trained. Hence 6 N when everything is trained and
    about 4 N under LoRA. Embeddings are looked up and not multiplied. What activation checkpointing computes again
    does not count.
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
    """
    Those of a training step in attention, over the unique tokens of pairs: in each layer 12 times the width of all
    heads for each key that a token sees (2 products of 2, and twice that backward), the causal half alone.
    """
    config = config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers

    def keys(length: np.ndarray, window: int | None) -> np.ndarray:
        # 1 + 2 + ... up to the window, and the window from there on.
        ramp = length if window is None else np.minimum(length, window)
        return ramp * (ramp + 1) // 2 + (length - ramp) * (window or 0)

    total = 0
    for layer_type in layer_types:
        window = config.sliding_window if layer_type == "sliding_attention" else None
        seen = keys(lengths.chosen, window) + keys(lengths.rejected, window) - keys(lengths.shared, window)
        total += 12 * width * int(seen.sum())
    return total


def peak_flops(dtype: str) -> float | None:
    """FLOP/s that this machine's GPU could do at most, where its name is known and it computes in bfloat16."""
    if not torch.cuda.is_available() or dtype == "float32":
        return None
    name = torch.cuda.get_device_name()
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
