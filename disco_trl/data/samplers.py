"""Samplers: batches of pairs of similar length, or of as many pairs as a budget of tokens allows.

An order is a pure function of the seed and the epoch, so that all processes agree on it and a resumed run continues
it. Each epoch groups the pairs anew. It is a shuffle that only keeps long pairs and short pairs apart.

The length of a pair is the number of its different tokens. That is what a model that shares prefixes computes for it,
and at least half of what a model that pads computes, which is twice the longer side. Both use the same measure, so
that they train on the same batches. (Grouped by their longer sides, padded batches of HH-RLHF would be 7 % smaller.)
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, Sampler

from .columns import RANKED_IDS, TOKENIZED_PAIR
from .forest import grow_forest


# Pairs are sorted by length within this many blocks at a time. More would save little padding and shuffle less.
BLOCKS_PER_MEGABATCH = 50
# However small the dataset, the shuffle chooses among this many megabatches, or batches of one capacity.
LEAST_CHOICE = 4


# Lengths


def pair_lengths(dataset: Dataset) -> np.ndarray:
    """
    Number of different tokens in each row of a tokenized dataset. What the answers of a row share from the front
    counts once.

    Args:
        dataset ([`~datasets.Dataset`]):
            Prepared dataset of N rows.

    Returns:
        `np.ndarray` of shape `(N,)`: The lengths, in tokens.
    """
    pairs = dataset.select_columns(list(TOKENIZED_PAIR)).with_format("arrow")
    parts = [
        _unique_tokens(*(batch[name].combine_chunks() for name in TOKENIZED_PAIR))
        for batch in pairs.iter(batch_size=1000)
    ]
    lengths = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
    if RANKED_IDS in dataset.column_names:
        for index, row in enumerate(dataset.with_format(None).select_columns([RANKED_IDS])):
            if row[RANKED_IDS] is not None:
                lengths[index] = len(grow_forest(row[RANKED_IDS], None).tokens)
    return lengths


def _unique_tokens(chosen: pa.Array, rejected: pa.Array) -> np.ndarray:
    lengths = [np.asarray(pc.list_value_length(side)).astype(np.int64) for side in (chosen, rejected)]
    # The tokens that have a counterpart on the other side, of all rows in one array.
    shared = np.minimum(*lengths)
    row = np.repeat(np.arange(len(shared)), shared)
    place = np.arange(len(row)) - np.repeat(np.cumsum(shared) - shared, shared)
    tokens = [
        np.asarray(side.flatten())[(np.cumsum(length) - length)[row] + place]
        for side, length in zip((chosen, rejected), lengths, strict=True)
    ]
    differences = np.flatnonzero(tokens[0] != tokens[1])
    rows, first = np.unique(row[differences], return_index=True)
    shared[rows] = place[differences[first]]
    return lengths[0] + lengths[1] - shared


# Batches of a fixed number of pairs


def length_grouped_order(
    lengths: np.ndarray, block_size: int, rng: np.random.Generator, blocks_per_megabatch: int | None = None
) -> np.ndarray:
    """
    A permutation in which each block of `block_size` holds pairs of similar length, the longest first.

    The pairs are shuffled, sorted within megabatches and cut into blocks, and the blocks are shuffled. The block with
    the longest pair comes first, so that memory runs out at once or not at all, and an incomplete block comes last.

    Args:
        lengths (`np.ndarray` of shape `(N,)`):
            Lengths of the pairs, in tokens.
        block_size (`int`):
            Pairs in a block: those of one optimizer step.
        rng (`np.random.Generator`):
            Source of randomness.
        blocks_per_megabatch (`int`, *optional*):
            Blocks that are sorted together. By default 50, and fewer for a small dataset, which would otherwise be
            sorted as a whole and give the same blocks in each epoch.

    Returns:
        `np.ndarray` of shape `(N,)`: Positions of the pairs.
    """
    if blocks_per_megabatch is None:
        blocks_per_megabatch = min(max(len(lengths) // (LEAST_CHOICE * block_size), 1), BLOCKS_PER_MEGABATCH)
    order = rng.permutation(len(lengths))
    megabatch = np.arange(len(order)) // (blocks_per_megabatch * block_size)
    order = order[np.lexsort((-lengths[order], megabatch))]
    blocks, rest = np.split(order, [len(order) // block_size * block_size])
    blocks = rng.permutation(blocks.reshape(-1, block_size))
    if len(blocks):
        longest = int(lengths[blocks[:, 0]].argmax())
        blocks[[0, longest]] = blocks[[longest, 0]]
    return np.concatenate([blocks.ravel(), rest])


class LengthGroupedSampler(Sampler[int]):
    """
    Sampler of positions of pairs, each once an epoch, in the order of `length_grouped_order`.

    Args:
        lengths (`np.ndarray` of shape `(N,)`):
            Lengths of the pairs, in tokens.
        block_size (`int`):
            Pairs of one optimizer step of all processes.
        seed (`int`):
            With the epoch, it determines the order.
    """

    def __init__(self, lengths: np.ndarray, block_size: int, seed: int):
        self.lengths = lengths
        self.block_size = block_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration has."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        return iter(length_grouped_order(self.lengths, self.block_size, rng).tolist())


def group_stream(dataset: IterableDataset, block_size: int, seed: int) -> IterableDataset:
    """
    Group the tokenized pairs of a stream by length, within a buffer of 50 blocks.

    It is a `map`, so that sharding, `state_dict` and the processes of a dataloader work as with any other stream. Each
    process or dataloader worker that reads a shard of its own has a buffer of its own.

    Args:
        dataset ([`~datasets.IterableDataset`]):
            Prepared stream with `chosen_ids` and `rejected_ids`.
        block_size (`int`):
            Pairs of one optimizer step of all processes.
        seed (`int`):
            With the position of a buffer in the stream, it determines the order.

    Returns:
        [`~datasets.IterableDataset`]: The stream in the new order.
    """
    return dataset.map(
        _group_buffer,
        with_indices=True,
        batched=True,
        batch_size=BLOCKS_PER_MEGABATCH * block_size,
        features=dataset.features,
        fn_kwargs={"block_size": block_size, "seed": seed},
    )


def _group_buffer(batch: dict[str, list[Any]], indices: list[int], block_size: int, seed: int) -> dict[str, list[Any]]:
    # Arrays, because a dataset with a format of the user's gives tensors.
    lengths = _unique_tokens(*(pa.array([np.asarray(ids) for ids in batch[name]]) for name in TOKENIZED_PAIR))
    rng = np.random.default_rng([seed, indices[0]])
    order = length_grouped_order(lengths, block_size, rng, BLOCKS_PER_MEGABATCH)
    return {name: [column[position] for position in order] for name, column in batch.items()}


# Batches of a bounded number of tokens


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """
    Batch sampler with as many pairs in a batch as fit into a budget of tokens. A pair above the budget is alone.

    Pairs of similar length form a class, and the batches of a class hold as many pairs as would fit if all were as
    long as its longest. So no shuffle makes a batch exceed the budget, and every epoch has the same number of batches,
    which the training loop relies on. What does not fill the last batch of a class goes into the next class, of longer
    pairs.

    Batches come in groups, with one batch for each process. Those of a group have the same number of pairs, because
    their metrics are gathered, and are of similar length, so that no process waits long for another. The groups are
    shuffled, except that the one with the most tokens comes first. If the number of groups is not a multiple of the
    accumulation steps, the largest are halved until it is.

    Each pair comes once an epoch, and up to `num_processes - 1` pairs come twice if their number is not a multiple of
    `num_processes`. With `drop_last` the surplus is left out instead.

    The attribute `pairs_per_batch` (`float`) is the mean number of pairs in a batch. The loss of a batch is the sum
    over its pairs divided by this number, because otherwise a pair in a small batch would weigh more than one in a
    large batch.

    Args:
        lengths (`np.ndarray` of shape `(N,)`):
            Lengths of the pairs, in tokens.
        max_tokens (`int`):
            Most tokens that a batch may hold.
        num_processes (`int`, *optional*, defaults to `1`):
            Processes that take the batches in turn.
        accumulation_steps (`int`, *optional*, defaults to `1`):
            Batches of a process for one optimizer step.
        seed (`int`, *optional*, defaults to `0`):
            With the epoch, it determines the batches and their order.
        drop_last (`bool`, *optional*, defaults to `False`):
            Whether to leave pairs out rather than repeat some.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        max_tokens: int,
        *,
        num_processes: int = 1,
        accumulation_steps: int = 1,
        seed: int = 0,
        drop_last: bool = False,
    ):
        self.lengths = lengths
        self.num_processes = num_processes
        self.seed = seed
        self.epoch = 0

        longest_first = np.argsort(-lengths, kind="stable")
        fitting = np.maximum(max_tokens // np.maximum(lengths[longest_first], 1), 1)
        self._classes: list[tuple[int, np.ndarray]] = []  # pairs in a batch, and the members
        start = 0
        while start < len(fitting):
            pairs = int(fitting[start])
            # A class ends where a sixteenth more would fit: batches of many pairs are nearly full all the same, and
            # the classes large enough to shuffle in.
            stop = int(np.searchsorted(fitting, pairs * 17 / 16, side="right"))
            stop = max(stop, start + max(LEAST_CHOICE, num_processes) * pairs)
            self._classes.insert(0, (pairs, longest_first[start:stop]))
            start = stop

        sizes: list[int] = []  # pairs in each batch of a group
        left_over = 0
        for pairs, members in self._classes:
            groups, left_over = divmod(left_over + len(members), pairs * num_processes)
            sizes += [pairs] * groups
        last = left_over // num_processes if drop_last else -(-left_over // num_processes)
        sizes += [last] * (last > 0)
        while len(sizes) % accumulation_steps and max(sizes) > 1:
            index = int(np.argmax(sizes))
            sizes[index : index + 1] = [(sizes[index] + 1) // 2, sizes[index] // 2]
        self._ends = np.cumsum(sizes, dtype=np.int64) * num_processes  # of the groups
        self.pairs_per_batch = sum(sizes) / max(len(sizes), 1)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose batches the next iteration has."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._ends) * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        if not len(self._ends):
            return
        rng = np.random.default_rng([self.seed, self.epoch])
        runs = []
        left_over = np.zeros(0, dtype=np.int64)
        for pairs, members in self._classes:
            pool = rng.permutation(np.concatenate([left_over, members]))
            whole = len(pool) // (pairs * self.num_processes) * pairs * self.num_processes
            runs.append(pool[:whole])
            left_over = pool[whole:]
        # Begins anew where pairs are missing, and stops where there are too many.
        order = np.resize(np.concatenate([*runs, left_over]), self._ends[-1])
        groups = np.split(order, self._ends[:-1])
        tokens = np.array([self.lengths[group].sum() for group in groups])
        turns = rng.permutation(len(groups))
        heaviest = int(tokens[turns].argmax())
        turns[[0, heaviest]] = turns[[heaviest, 0]]
        for turn in turns:
            yield from groups[turn].reshape(self.num_processes, -1).tolist()


def with_batches(loader: DataLoader, batches: Sampler[list[int]], accelerator: Any) -> DataLoader:
    """
    The same loader with other batches. The Trainer (up to transformers 5.23) takes no batch sampler but its own.

    Args:
        loader ([`~torch.utils.data.DataLoader`]):
            Loader of the Trainer, already prepared.
        batches ([`~torch.utils.data.Sampler`]):
            Positions of the rows of each batch.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the Trainer.

    Returns:
        [`~torch.utils.data.DataLoader`]: The new loader, prepared.
    """
    options = [
        *("collate_fn", "num_workers", "pin_memory", "persistent_workers", "prefetch_factor"),
        *("worker_init_fn", "multiprocessing_context", "in_order"),
    ]
    other: DataLoader = DataLoader(
        loader.dataset, batch_sampler=batches, **{name: getattr(loader, name) for name in options}
    )
    # accelerate 1.10 refuses to even out batches of different sizes, and there is nothing to even out.
    even_batches, accelerator.even_batches = accelerator.even_batches, False
    try:
        return accelerator.prepare_data_loader(other)
    finally:
        accelerator.even_batches = even_batches
