"""Which pairs go into a batch: orders by length, streams, and batches of a bounded number of tokens."""

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainerState

from disco_trl.data.columns import ROW_COLUMN
from disco_trl.data.samplers import (
    LengthGroupedSampler,
    TokenBudgetBatchSampler,
    group_stream,
    length_grouped_order,
    pair_lengths,
)
from disco_trl.trainer.callbacks import SamplerEpoch


# Spread as in chat data: mean 213, from 15 to 2,500
LENGTHS = np.random.default_rng(0).lognormal(5, 0.8, size=2000).astype(np.int64).clip(15)


def of_epoch(sampler, epoch: int) -> list:
    sampler.set_epoch(epoch)
    return list(sampler)


def pairs_together(batches) -> set[tuple[int, int]]:
    return {(one, other) for batch in batches for one in batch for other in batch if one < other}


def cut(order, size: int) -> list:
    return [order[start : start + size] for start in range(0, len(order), size)]


# Lengths


def random_pairs(rows: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Tokenized pairs; with four different tokens, sides often agree by chance beyond their prompt."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(rows):
        prompt, *answers = (rng.integers(0, 4, size=rng.integers(0, high)).tolist() for high in (9, 5, 5))
        pairs.append({f"{side}_ids": [*prompt, *answer, 4] for side, answer in zip(SIDES, answers, strict=True)})
    return pairs


SIDES = ("chosen", "rejected")


def count_by_hand(pair: dict[str, list[int]]) -> int:
    """Tokens in a tree of both sides: different prefixes that are not empty."""
    return len({tuple(pair[f"{side}_ids"][: end + 1]) for side in SIDES for end in range(len(pair[f"{side}_ids"]))})


def test_pair_lengths():
    pairs = random_pairs(2500)
    pairs += [{"chosen_ids": [1, 2, 3], "rejected_ids": [1, 2]}, {"chosen_ids": [7], "rejected_ids": [7]}]
    expected = [count_by_hand(pair) for pair in pairs]
    assert expected[-2:] == [3, 1]
    dataset = Dataset.from_list(pairs)
    assert pair_lengths(dataset).tolist() == expected
    # Filtered and shuffled datasets read their table through a list of indices.
    shuffled = np.random.default_rng(1).permutation(len(pairs))[:2000]
    assert pair_lengths(dataset.select(shuffled)).tolist() == [expected[index] for index in shuffled]


# Batches of a fixed number of pairs


@pytest.mark.parametrize("rows", [1, 7, 8, 250, 2000])
@pytest.mark.parametrize("block_size", [1, 8, 24])
def test_each_pair_once_and_the_longest_first(rows, block_size):
    lengths = LENGTHS[:rows]
    order = length_grouped_order(lengths, block_size, np.random.default_rng(0))
    assert sorted(order) == list(range(rows))
    blocks = cut(order, block_size)
    assert [len(block) for block in blocks[:-1]] == [block_size] * (len(blocks) - 1)
    whole = rows // block_size * block_size
    assert lengths[order[0]] == lengths[order[:whole]].max(initial=lengths[order[0]])


def test_the_order_is_a_function_of_seed_and_epoch():
    sampler = LengthGroupedSampler(LENGTHS, 16, seed=3)
    first, second = of_epoch(sampler, 0), of_epoch(sampler, 1)
    assert of_epoch(sampler, 0) == first == list(LengthGroupedSampler(LENGTHS, 16, seed=3))
    assert second != first != list(LengthGroupedSampler(LENGTHS, 16, seed=4))
    assert len(sampler) == len(first)


@pytest.mark.parametrize("rows", [64, 2000])
def test_epochs_group_pairs_anew(rows):
    """Not only in another order: two pairs in one block are seldom there together again."""
    sampler = LengthGroupedSampler(LENGTHS[:rows], 8, seed=0)
    first, second = (pairs_together(cut(of_epoch(sampler, epoch), 8)) for epoch in (0, 1))
    assert len(first & second) / len(first) < (0.3 if rows == 64 else 0.15)  # sorted as a whole: 1


def test_padding_falls():
    def padded_to_own(order) -> float:
        return sum(len(batch) * LENGTHS[batch].max() for batch in cut(np.array(order), 8)) / LENGTHS.sum()

    random_order = np.random.default_rng(0).permutation(len(LENGTHS))
    assert padded_to_own(random_order) > 2.2
    assert padded_to_own(list(LengthGroupedSampler(LENGTHS, 8, seed=0))) < 1.1
    # Four processes, or accumulation steps: blocks are larger, and so are megabatches.
    assert padded_to_own(list(LengthGroupedSampler(LENGTHS, 32, seed=0))) < 1.1


def test_two_processes_share_the_order():
    """Batches of a step are of similar length, and no row is lost or doubled beyond accelerate's own rule."""
    rows = 1999  # a multiple of nothing
    batches = BatchSampler(LengthGroupedSampler(LENGTHS[:rows], 16, seed=0), batch_size=8, drop_last=False)
    first, second = (list(BatchSamplerShard(batches, 2, process)) for process in (0, 1))
    assert len(first) == len(second)
    seen = Counter(index for batch in first + second for index in batch)
    assert len(seen) == rows
    assert sum(seen.values()) - rows == 2 * 8 * len(first) - rows  # accelerate fills up the last two batches
    longest = np.array([[LENGTHS[batch].max() for batch in step] for step in zip(first, second, strict=True)])
    assert np.median(longest.min(axis=1) / longest.max(axis=1)) > 0.95


# Streams


def numbered_stream(rows: int, shards: int = 1) -> IterableDataset:
    pairs = [{**pair, ROW_COLUMN: row} for row, pair in enumerate(random_pairs(rows))]
    return Dataset.from_list(pairs).to_iterable_dataset(num_shards=shards)


def test_stream_gives_each_row_once_by_length():
    rows, block = 1030, 4  # five buffers of 200, and one that is neither full nor of whole blocks
    pairs = random_pairs(rows)
    stream = group_stream(numbered_stream(rows), block, seed=0)
    assert stream.features == numbered_stream(rows).features
    read = list(stream)
    order = [row.pop(ROW_COLUMN) for row in read]
    assert read == [pairs[row] for row in order]  # rows stay together
    for buffer, numbers in enumerate(cut(order, 200)):
        assert sorted(numbers) == list(range(buffer * 200, min((buffer + 1) * 200, rows)))
    lengths = np.array([count_by_hand(pair) for pair in pairs])

    def spread(order) -> float:
        return np.mean([np.ptp(lengths[numbers]) for numbers in cut(order, block)])

    assert spread(order) < 0.1 * spread(np.arange(rows))
    assert [row[ROW_COLUMN] for row in group_stream(numbered_stream(rows), block, seed=0)] == order
    assert [row[ROW_COLUMN] for row in group_stream(numbered_stream(rows), block, seed=1)] != order


@pytest.mark.parametrize("stop", [0, 3, 200, 333])
def test_stream_resumes_where_it_stopped(stop):
    straight = [row[ROW_COLUMN] for row in group_stream(numbered_stream(410), 4, seed=0)]
    stream = group_stream(numbered_stream(410), 4, seed=0)
    iterator = iter(stream)
    before = [next(iterator)[ROW_COLUMN] for _ in range(stop)]
    resumed = group_stream(numbered_stream(410), 4, seed=0)
    resumed.load_state_dict(stream.state_dict())
    assert before + [row[ROW_COLUMN] for row in resumed] == straight


@pytest.mark.parametrize("shards", [1, 4])
def test_stream_across_processes_and_workers(shards):
    stream = group_stream(numbered_stream(430, shards), 4, seed=0)
    seen = [
        row[ROW_COLUMN]
        for process in range(2)
        for row in DataLoader(
            split_dataset_by_node(stream, process, 2), batch_size=None, num_workers=2, multiprocessing_context="fork"
        )
    ]
    assert sorted(seen) == list(range(430))


def test_stream_of_tensors():
    stream = group_stream(numbered_stream(20).with_format("torch"), 4, seed=0)
    rows = list(stream)
    assert sorted(int(row[ROW_COLUMN]) for row in rows) == list(range(20))
    assert torch.is_tensor(rows[0]["chosen_ids"])


# Batches of a bounded number of tokens


def budget_sampler(rows: int = 2000, max_tokens: int = 2000, **options) -> TokenBudgetBatchSampler:
    return TokenBudgetBatchSampler(LENGTHS[:rows], max_tokens, **options)


BUDGETS = [
    {"max_tokens": 50, "rows": 100},  # nearly every pair alone
    {},
    {"num_processes": 2},
    {"num_processes": 3, "accumulation_steps": 4, "max_tokens": 4000},
    {"rows": 37, "num_processes": 2, "accumulation_steps": 3, "max_tokens": 100_000},  # fewer batches than choice
    {"rows": 3, "num_processes": 4},
    {"rows": 1},
]


@pytest.mark.parametrize("options", BUDGETS, ids=str)
def test_token_budget(options):
    sampler = budget_sampler(**options)
    processes, steps = (options.get(name, 1) for name in ("num_processes", "accumulation_steps"))
    lengths = sampler.lengths
    for epoch in range(3):
        batches = of_epoch(sampler, epoch)
        # The training loop counts on a number of batches that is the same in all epochs.
        assert len(batches) == len(sampler)
        assert sampler.pairs_per_batch == pytest.approx(sum(map(len, batches)) / len(batches))
        for batch in batches:
            assert batch
            assert len(batch) == 1 or lengths[batch].sum() <= options.get("max_tokens", 2000)
        times = Counter(index for batch in batches for index in batch)
        assert sorted(times) == list(range(len(lengths)))
        assert sum(times.values()) - len(lengths) == -len(lengths) % processes

        # What processes compute at the same time has the same number of pairs, and the heaviest comes first.
        groups = cut(batches, processes)
        assert all(len(batch) == len(group[0]) for group in groups for batch in group)
        assert lengths[np.concatenate(groups[0])].sum() == max(
            lengths[np.concatenate(group)].sum() for group in groups
        )
        if max(map(len, batches)) > 1:
            assert len(groups) % steps == 0


def test_token_budget_is_used_and_balanced():
    sampler = budget_sampler(max_tokens=4000, num_processes=2)
    tokens = np.array([LENGTHS[batch].sum() for batch in sampler])
    assert tokens.mean() > 0.85 * 4000
    # How long both processes take is what the slower one takes.
    assert tokens.reshape(-1, 2).max(axis=1).sum() / tokens.sum() < 1.05 / 2


def test_token_budget_is_a_function_of_seed_and_epoch():
    sampler = budget_sampler(seed=3)
    first, second = of_epoch(sampler, 0), of_epoch(sampler, 1)
    assert of_epoch(sampler, 0) == first == list(budget_sampler(seed=3))
    assert second != first != list(budget_sampler(seed=4))
    assert len(pairs_together(first) & pairs_together(second)) / len(pairs_together(first)) < 0.2


def test_each_pair_weighs_the_same():
    """In the sum over an epoch of what goes into the weights, with accumulation and several processes.

    The Trainer averages over the accumulated batches, DDP over processes, and a batch's loss is a sum over its pairs,
    divided by `pairs_per_batch`.
    """
    processes, steps = 2, 4
    sampler = budget_sampler(num_processes=processes, accumulation_steps=steps)
    batches = list(sampler)
    assert len({len(batch) for batch in batches}) > 5
    weight = np.zeros(len(LENGTHS))
    of_each_step = cut(batches, processes * steps)
    for step in of_each_step:
        for batch in step:
            weight[batch] += 1 / sampler.pairs_per_batch / len(step)
    assert np.ptp(weight) == 0
    assert weight.sum() == pytest.approx(len(of_each_step))  # as if each step's loss were a mean over its pairs


def test_drop_last():
    sampler = budget_sampler(rows=1001, num_processes=4, drop_last=True)
    seen = [index for batch in sampler for index in batch]
    assert len(seen) == len(set(seen)) == 1000
    assert list(budget_sampler(rows=3, num_processes=4, drop_last=True)) == []


def test_two_processes_share_the_batches():
    batches = budget_sampler(num_processes=2)
    # With and without evening out, which accelerate 1.10 does not do for such batches.
    shards = [list(BatchSamplerShard(batches, 2, process, even_batches=False)) for process in (0, 1)]
    assert [batch for step in zip(*shards, strict=True) for batch in step] == list(batches)
    assert all(len(BatchSamplerShard(batches, 2, process)) == len(shards[process]) for process in (0, 1))
    resumed = list(SkipBatchSampler(BatchSamplerShard(batches, 2, 1, even_batches=False), skip_batches=5))
    assert resumed == shards[1][5:]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("by_tokens", [False, True])
def test_the_epoch_gets_through_every_wrapper(processes, skip, by_tokens):
    sampler = budget_sampler(num_processes=processes) if by_tokens else LengthGroupedSampler(LENGTHS, 8, seed=0)
    batches = sampler if by_tokens else BatchSampler(sampler, 8, drop_last=False)
    if processes == 2:
        batches = BatchSamplerShard(batches, 2, 0, even_batches=False)
    if skip:
        batches = SkipBatchSampler(batches, 1)
    loader = DataLoader(range(len(LENGTHS)), batch_sampler=batches)
    SamplerEpoch().on_epoch_begin(None, TrainerState(epoch=2.4), None, train_dataloader=loader)
    assert sampler.epoch == 2
