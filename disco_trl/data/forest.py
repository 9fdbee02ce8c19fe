"""Token sequences as a forest in one row: what they share from the front is stored once, and nothing is padded.

Two answers to one prompt share the prompt, K answers share it K times, and a conversation that is scored at each turn
shares all earlier turns. Each node of the forest is a run of tokens, and a sequence is the path from a root to the
node where it ends. The nodes stand one after another in a row. The position of a token is its place in its own
sequence:

    sequences       forest           row
    a b c d         a b ── c d       token     a b c d e f
    a b e f             └─ e f       position  0 1 2 3 2 3

`disco_trl.models.prefix_sharing` runs a model on such a row.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


# Rows are filled up to a multiple of this. CPUs compile a bfloat16 matrix product for each number of rows they meet,
# which takes as long as half a training step of a small model. Tensor cores are faster with such numbers, too.
ROW_MULTIPLE = 64


@dataclass(frozen=True)
class Nodes:
    """
    How the nodes of a row hang together. The host has to know it before it can tell a device what to attend to, so it
    stays there when a batch is moved to a device, and nobody has to wait for it to come back.

    Args:
        lengths (`list[int]`):
            Number of tokens of each node.
        parents (`list[int]`):
            Parent of each node, -1 for a root. A parent stands before its children.
    """

    lengths: list[int]
    parents: list[int]

    def to(self, *args: Any, **kwargs: Any) -> "Nodes":
        """What moves a batch calls this, and gets the same nodes."""
        return self


class Forest(NamedTuple):
    """
    Sequences as a forest, in the order in which its nodes stand in a row.

    [`Forest.places`] returns where all tokens of a sequence stand, which `read_at` says of one of them.

    Args:
        tokens (`list[int]`):
            Ids of the tokens of all nodes, T in all.
        positions (`list[int]`):
            Position of each token in its sequence.
        lengths (`list[int]`):
            Number of tokens of each node.
        parents (`list[int]`):
            Parent of each node, -1 for a root. A parent stands before its children.
        read_at (`list[int]`):
            For each sequence, the place in the row of its last token that is not padding.
    """

    tokens: list[int]
    positions: list[int]
    lengths: list[int]
    parents: list[int]
    read_at: list[int]

    def places(self, sequence: int) -> list[int]:
        """
        Places in the row of the tokens of a sequence, up to the one at which it is read.

        Args:
            sequence (`int`):
                Index of the sequence.

        Returns:
            `list[int]`: The places, in the order of the tokens.
        """
        ends = list(itertools.accumulate(self.lengths))
        end = self.read_at[sequence] + 1
        node = bisect.bisect_left(ends, end)
        path = []
        while node >= 0:
            path.append(range(ends[node] - self.lengths[node], min(ends[node], end)))
            node, end = self.parents[node], len(self.tokens)
        return [place for run in reversed(path) for place in run]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that two sequences share from the front."""
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
    The forest of token sequences. Any sequences share what they have in common from the front.

    Args:
        sequences (`Sequence[list[int]]`):
            Token ids of the sequences, none of them empty.
        pad_token_id (`int`, *optional*):
            The reward is read at the last token that is not this one, as in Hugging Face's classifiers, even if it is
            the end-of-text token too.

    Returns:
        [`Forest`]: The forest.
    """
    # In lexicographic order sequences that share a prefix are neighbours, and a prefix of another one comes before it.
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
) -> dict[str, Any]:
    """
    Arguments of a disco model's `forward` to run N token sequences as one row.

    Args:
        sequences (`Sequence[list[int]]`):
            Token ids of the sequences, none of them empty.
        pad_token_id (`int`, *optional*):
            As for `grow_forest`.
        pad_to_multiple_of (`int`, *optional*, defaults to `64`):
            The row is filled up to a multiple of this, with tokens that no other token attends to.

    Returns:
        `dict`: `read_at`, of shape `(N,)`, the place in the row where the reward of each sequence is read;
        `input_ids`, `attention_mask` and `position_ids`, each of shape `(1, T)` (this mask separates tokens from
        filling; attention follows the nodes); and `nodes`, the [`Nodes`].
    """
    forest = grow_forest(sequences, pad_token_id)
    return {"read_at": torch.tensor(forest.read_at), **to_row(forest, pad_token_id, pad_to_multiple_of)}


def to_row(forest: Forest, pad_token_id: int | None, pad_to_multiple_of: int = ROW_MULTIPLE) -> dict[str, Any]:
    """
    Tensors of a forest, which is filled up in place.

    Args:
        forest ([`Forest`]):
            The forest.
        pad_token_id, pad_to_multiple_of:
            As in [`pack`].

    Returns:
        `dict`: What [`pack`] returns, without `read_at`.
    """
    # The filling is a root of its own, so no sequence attends to it.
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
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": torch.tensor([forest.positions]),
        "nodes": Nodes(forest.lengths, forest.parents),
    }


def batches_by_unique_tokens(sequences: Sequence[list[int]], tokens_per_batch: int) -> Iterator[list[int]]:
    """
    Batches of sequences that hold at most so many different tokens. A sequence above the budget is alone.

    Sequences that share the most stand together.

    Args:
        sequences (`Sequence[list[int]]`):
            Token ids of the sequences.
        tokens_per_batch (`int`):
            Most different tokens of a batch.

    Yields:
        `list[int]`: Positions of the sequences of a batch.
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
