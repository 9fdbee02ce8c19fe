"""Token sequences as a forest in one row: what they share from the front stands there once, and nothing is padded.

Two answers to one prompt share the prompt, K answers share it K times over, and a conversation that is scored at each
turn shares all that went before. In the forest each node is a run of tokens, and a sequence is the path from a root to
the node where it ends. The nodes stand one after another in a row; a token's position is its place in its own
sequence:

    sequences       forest           row
    a b c d         a b ── c d       token     a b c d e f
    a b e f             └─ e f       position  0 1 2 3 2 3

How a model runs such a row is the business of `disco_trl.models.prefix_sharing`.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


# Rows are filled up to a multiple of this. On CPUs a bfloat16 matrix product is compiled for each number of rows that
# it meets, which takes as long as half a step of training a small model; tensor cores like such numbers as well.
ROW_MULTIPLE = 64


class Forest(NamedTuple):
    """Sequences as a forest, in the order in which its nodes stand in a row.

    Attributes:
        tokens: the ids of the nodes' tokens, `T` in all.
        positions: of each token in its sequence.
        lengths: of the nodes.
        parents: of the nodes, -1 for a root. A parent stands before its children.
        read_at: for each sequence, the place in the row of its last token that is not padding.
    """

    tokens: list[int]
    positions: list[int]
    lengths: list[int]
    parents: list[int]
    read_at: list[int]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share from the front."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    # The first difference lies in [low, high): halving compares slices, which is Python's fast way.
    low, high = 0, length
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def grow_forest(sequences: Sequence[list[int]], pad_token_id: int | None) -> Forest:
    """
    The forest of some token sequences. Whatever they share from the front is shared, whichever sequences they are.

    Args:
        sequences: lists of token ids, none of them empty.
        pad_token_id: the reward is read at the last token that is not this one, as Hugging Face's classifiers do,
            also where it is the end-of-text token too.
    """
    # In the order of a dictionary those that share a prefix are neighbours, and one that is a prefix of another comes
    # before it.
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    ordered = [sequences[index] for index in order]
    shared = [0, *(common_prefix(*pair) for pair in itertools.pairwise(ordered))]

    forest = Forest([], [], [], [], [0] * len(sequences))
    begins: list[tuple[int, int]] = []  # of the nodes: place in the row, and position in the sequence
    # Sequences first..last (in `ordered`) share what the nodes up to `parent` hold, `depth` tokens.
    waiting = [(0, len(ordered), 0, -1)]
    while waiting:
        first, last, depth, node = waiting.pop()
        end = min(shared[first + 1 : last], default=len(ordered[first]))
        if end > depth:
            begins.append((len(forest.tokens), depth))
            forest.tokens.extend(ordered[first][depth:end])
            forest.positions.extend(range(depth, end))
            forest.lengths.append(end - depth)
            forest.parents.append(node)
            node = len(forest.lengths) - 1
        while first < last and len(ordered[first]) == end:
            at = end - 1
            while at > 0 and ordered[first][at] == pad_token_id:
                at -= 1
            holder = node
            while begins[holder][1] > at:
                holder = forest.parents[holder]
            place, position = begins[holder]
            forest.read_at[order[first]] = place + at - position
            first += 1
        if first < last:
            cuts = [first, *(index for index in range(first + 1, last) if shared[index] == end), last]
            waiting += [(*span, end, node) for span in itertools.pairwise(cuts)][::-1]
    return forest


def pack(
    sequences: Sequence[list[int]], pad_token_id: int | None, pad_to_multiple_of: int = ROW_MULTIPLE
) -> dict[str, Tensor]:
    """
    What a disco model's `forward` takes to run token sequences as one row.

    Args:
        sequences: lists of token ids, none of them empty.
        pad_token_id: see :func:`grow_forest`.
        pad_to_multiple_of: fill the row up to a multiple of this, with tokens that nobody sees.

    Returns:
        `read_at` `[N]`, where in the row each sequence's reward is read; `input_ids`, `attention_mask` and
        `position_ids`, each `[1, T]` (this mask tells tokens from filling; attention goes by the nodes); and `nodes`
        `[2, nodes]`, the length and the parent of each node.
    """
    forest = grow_forest(sequences, pad_token_id)
    # Before the tensors are made: as a root of its own, what fills the row up disturbs nobody.
    filling = -len(forest.tokens) % pad_to_multiple_of
    if filling:
        forest.tokens.extend([pad_token_id or 0] * filling)
        forest.positions.extend(range(filling))
        forest.lengths.append(filling)
        forest.parents.append(-1)
    input_ids = torch.tensor([forest.tokens])
    attention_mask = torch.ones_like(input_ids)
    if filling:
        attention_mask[:, -filling:] = 0
    return {
        "read_at": torch.tensor(forest.read_at),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": torch.tensor([forest.positions]),
        "nodes": torch.tensor([forest.lengths, forest.parents]),
    }


def batches_by_unique_tokens(sequences: Sequence[list[int]], tokens_per_batch: int) -> Iterator[list[int]]:
    """
    Indices of sequences in batches that hold at most so many different tokens; one above the budget is alone.

    Those that share the most stand together.
    """
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = sequences[index]
        added = len(sequence) - (common_prefix(sequences[batch[-1]], sequence) if batch else 0)
        if batch and tokens + added > tokens_per_batch:
            yield batch
            batch, tokens, added = [], 0, len(sequence)
        batch.append(index)
        tokens += added
    if batch:
        yield batch
