"""`disco_trl.data.forest` against a brute-force trie, and its row and batches."""

from itertools import pairwise

import pytest
import torch
from forests import prefixes_by_place
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import PAD

from disco_trl.data.forest import batches_by_unique_tokens, grow_forest, pack


def read_by_hugging_face(sequence: list[int], pad_token_id: int) -> int:
    """The place where a classifier of transformers reads the reward of a row."""
    ids = torch.tensor([sequence])
    places = torch.arange(ids.shape[-1], dtype=torch.int32)
    return int((places * (ids != pad_token_id).to(torch.int32)).argmax(-1))


def assert_is_the_forest_of(sequences: list[list[int]], pad_token_id: int) -> None:
    forest = grow_forest(sequences, pad_token_id)
    assert len(forest.tokens) == len(forest.positions) == sum(forest.lengths)
    assert len(forest.parents) == len(forest.lengths)
    assert all(-1 <= parent < node for node, parent in enumerate(forest.parents))
    assert all(length > 0 for length in forest.lengths)
    found = prefixes_by_place(forest)
    # A trie has one place for each different prefix, and no other.
    assert sorted(found) == sorted({tuple(ids[:end]) for ids in sequences for end in range(1, len(ids) + 1)})
    assert forest.positions == [len(prefix) - 1 for prefix in found]
    assert len(forest.read_at) == len(sequences)
    for place, ids in zip(forest.read_at, sequences, strict=True):
        assert list(found[place]) == ids[: read_by_hugging_face(ids, pad_token_id) + 1]

    # Where all tokens of a sequence stand that no padding follows
    for number, sequence in enumerate(sequences):
        kept = sequence[: len(forest.places(number))]
        assert [forest.tokens[place] for place in forest.places(number)] == kept
        assert [forest.positions[place] for place in forest.places(number)] == [*range(len(kept))]
        assert forest.places(number)[-1] == forest.read_at[number]


def test_the_forest_of_a_pair():
    #       a b c d e f
    # [5 6] ┬ [7 8]
    #       └ [9 2]
    forest = grow_forest([[5, 6, 9, 2], [5, 6, 7, 8]], pad_token_id=0)
    assert forest.tokens == [5, 6, 7, 8, 9, 2]
    assert forest.positions == [0, 1, 2, 3, 2, 3]
    assert forest.lengths == [2, 2, 2]
    assert forest.parents == [-1, 0, 0]
    assert forest.read_at == [5, 3]


def test_a_conversation_at_every_turn_is_one_path():
    forest = grow_forest([[5, 6, 7], [5, 6, 7, 8, 9], [5]], pad_token_id=0)
    assert forest.tokens == [5, 6, 7, 8, 9]
    assert forest.lengths == [1, 2, 2]
    assert forest.parents == [-1, 0, 1]
    assert forest.read_at == [2, 4, 0]


@pytest.mark.parametrize(
    "sequences",
    [
        [[5, 6, 7]],
        [[5, 6], [5, 6], [5, 6]],
        [[5, 6], [7, 8], [9]],
        [[5, 6, 7, 8], [5, 6, 7], [5, 6], [5]],
        [[5, 6, 7, 8], [5, 6, 9], [5, 10], [5, 10, 11], [12]],
        # The reward is read before the padding, also where that is shared, and in another node than the last.
        [[5, 6, 2], [5, 6, 2, 2], [5, 6, 2, 7], [2, 2], [2, 5, 2]],
    ],
    ids=["one", "duplicates", "nothing shared", "prefixes of each other", "branches", "padding in the text"],
)
def test_the_forest_is_a_trie(sequences):
    for pad_token_id in (0, 2):
        assert_is_the_forest_of(sequences, pad_token_id)
        assert_is_the_forest_of(sequences[::-1], pad_token_id)


# Three different tokens, of which one is padding: almost everything is shared with something.
some_sequences = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=8), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(some_sequences, st.integers(0, 3))
def test_the_forest_of_any_sequences_is_a_trie(sequences, pad_token_id):
    assert_is_the_forest_of(sequences, pad_token_id)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(some_sequences, st.integers(1, 70))
def test_a_row_is_filled_up_behind_the_forest(sequences, multiple):
    forest = grow_forest(sequences, PAD)
    batch = pack(sequences, PAD, pad_to_multiple_of=multiple)
    tokens = len(forest.tokens)
    assert next(iter(batch)) == "read_at"  # transformers takes the batch size from the first tensor
    assert batch["read_at"].tolist() == forest.read_at
    assert {batch[name].shape for name in ("input_ids", "attention_mask", "position_ids")} == {
        (1, -(-tokens // multiple) * multiple)
    }
    assert batch["input_ids"][0, :tokens].tolist() == forest.tokens
    assert batch["position_ids"][0, :tokens].tolist() == forest.positions
    assert batch["attention_mask"][0].tolist() == [1] * tokens + [0] * (batch["input_ids"].shape[1] - tokens)
    lengths, parents = batch["nodes"].lengths, batch["nodes"].parents
    nodes = len(forest.lengths)
    assert lengths[:nodes] == forest.lengths
    assert parents[:nodes] == forest.parents
    assert sum(lengths) == batch["input_ids"].shape[1]
    assert parents[nodes:] in ([], [-1])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(some_sequences, st.integers(1, 20))
def test_batches_keep_to_their_budget_of_different_tokens(sequences, budget):
    batches = list(batches_by_unique_tokens(sequences, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(sequences)))

    def tokens(batch: list[int]) -> int:
        return len(grow_forest([sequences[index] for index in batch], 0).tokens)

    assert all(tokens(batch) <= budget or len(batch) == 1 for batch in batches)
    # And none is closed before it has to be.
    assert all(tokens([*batch, following[0]]) > budget for batch, following in pairwise(batches))


def test_batches_of_nothing():
    assert list(batches_by_unique_tokens([], 8)) == []
