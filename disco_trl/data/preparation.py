"""
From rows of preferences to the token ids that are trained on: the check, TRL's tokens made many at a time, the
filters.

`prepare_preferences` runs before TRL's own `_prepare_dataset` and `finish_preferences` after it. In between TRL
tokenizes what is not tokenized yet: plain text in streams, and in datasets with a format of the user's.

The tokens are those that TRL's `RewardTrainer` would make, in its columns, but made in one pass where TRL makes two,
and with the tokenizer's own threads. The filters read Arrow's arrays where TRL's read rows.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from .._version import __version__
from .columns import (
    LEGACY_TOKENIZED_PAIR,
    PREPARED,
    RANKED_IDS,
    RANKING,
    ROW_COLUMN,
    TEXT_PAIR,
    TOKENIZED_PAIR,
    Layout,
    find_layout,
    is_ranking,
)
from .records import join, read_answers
from .tokenization import chat_template_arguments, tokenize_all, tokenize_record
from .validation import check_preferences
from .values import Row, as_list, is_missing


# Not accelerate's logger: it raises in a spawned dataloader worker, where no accelerate state exists, and streaming
# datasets are filtered there.
logger = logging.getLogger(__name__)

TEXTS_PER_CALL = 128
"""Texts that the tokenizer gets at once: enough for its threads. What it returns beside the ids takes many times their
memory, so the texts of a whole batch of `map` would be too many."""

LOOKED_AT_OF_STREAM = 100
"""Pairs of a stream that are looked at before it is trained on, to see how many of them are dropped."""

MOST_DROPPED_OF_STREAM = 10_000
"""Pairs that a stream may begin with and that are all dropped. Nobody would wait for what comes after them."""


def prepare_preferences(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase,
    dataset_name: str,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Check a preference dataset and tokenize what TRL would tokenize more slowly, or not at all.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference dataset, see [`~disco_trl.data.validation.check_preferences`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, which also renders the conversations.
        dataset_name (`str`):
            Name used in errors and progress bars.
        num_proc (`int`, *optional*):
            Number of processes that check and tokenize a `Dataset`.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The dataset with `row_index` and, unless TRL is to
        tokenize it, `chosen_ids` and `rejected_ids`, and `chosen` and `rejected` as TRL leaves them: after their
        prompt, and a text with the end-of-text token. If it has rankings, `completion_ids` holds the ids of all
        answers of each, in the place of `completions`, and is None in rows that are pairs; the sides of a ranking are
        its best and its worst answer.

    Raises:
        `ValueError`: If something is wrong with a row; it names dataset, row, column and fix.
    """
    dataset = check_preferences(dataset, processing_class, dataset_name, num_proc=num_proc)
    return _tokenize_dataset(dataset, processing_class, dataset_name, num_proc)


def _tokenize_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase,
    dataset_name: str,
    num_proc: int | None,
) -> Dataset | IterableDataset:
    first_row: Row = next(iter(dataset.with_format(None)))
    if any(first_row.keys() >= {*pair} for pair in (TOKENIZED_PAIR, LEGACY_TOKENIZED_PAIR)):
        return dataset
    has_rankings = "ranks" in first_row
    as_lists = isinstance(dataset, IterableDataset)
    layout = find_layout(first_row)
    tokenization = _Tokenization(processing_class, layout, has_rankings, as_lists, dataset_name)
    removed = [RANKING[0]] if has_rankings else []
    # What TRL cannot tokenize, or without a word renders wrongly: parts, and Arrow's nulls in tools
    is_ours = has_rankings or layout.kind == "conversational"
    if isinstance(dataset, IterableDataset):
        # One row at a time, so that no row is read before it is asked for
        return dataset.map(tokenization, batched=True, batch_size=1, remove_columns=removed) if is_ours else dataset
    if dataset.format["type"] is not None and not is_ours:
        return dataset
    # As TRL does: those that come second find the tokens in the cache, on every node.
    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        if has_rankings:
            # The first rows may all be pairs, and a column without any value in them would be given no type.
            empty = [None] * len(dataset)
            dataset = dataset.add_column(RANKED_IDS, empty, feature=List(List(Value("int64"))))
        return dataset.map(
            tokenization,
            batched=True,
            num_proc=num_proc,
            remove_columns=removed,
            desc=f"Tokenizing {dataset_name} dataset",
        )


def finish_preferences(
    dataset: Dataset | IterableDataset, dataset_name: str, max_length: int | None = None
) -> Dataset | IterableDataset:
    """
    Drop the rows that are too long, and those whose two sides are the same tokens: no reward can tell them apart.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Tokenized dataset with `chosen_ids` and `rejected_ids`, and perhaps `completion_ids`.
        dataset_name (`str`):
            Name used in errors and in the warning.
        max_length (`int`, *optional*):
            Most tokens that an answer with its prompt may have.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The dataset without those rows. One warning gives the
        number of identical pairs and the first ten row numbers (for a stream: the first row, when it is met), and
        another one the number of pairs that are too long (for a stream: if most of its first 100 are dropped).

    Raises:
        `ValueError`: If nothing is left, of a `Dataset` or of what a stream begins with.
    """
    on_main_process = PartialState().is_main_process
    if isinstance(dataset, IterableDataset):
        usable = _UsablePairs(dataset_name, max_length, warn=on_main_process)
        _look_ahead(dataset, usable)
        return dataset.filter(usable)

    too_long = np.zeros(len(dataset), dtype=bool)
    identical = np.zeros(len(dataset), dtype=bool)
    start = 0
    names = [name for name in (*TOKENIZED_PAIR, RANKED_IDS) if name in dataset.column_names]
    for batch in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        sides = [batch[name].combine_chunks() for name in TOKENIZED_PAIR]
        lengths = [pc.list_value_length(side).to_numpy(zero_copy_only=False) for side in sides]
        fits = np.full(len(batch), True) if max_length is None else np.maximum(*lengths) <= max_length
        if max_length is not None and RANKED_IDS in names:
            # The answers of all rankings in one array, each with the position of its ranking
            answers = batch[RANKED_IDS].combine_chunks()
            is_long = pc.list_value_length(answers.flatten()).to_numpy(zero_copy_only=False) > max_length
            fits[pc.list_parent_indices(answers).to_numpy()[is_long]] = False
        too_long[start : start + len(batch)] = ~fits
        # Only sides of equal length are compared, a few in a hundred.
        for position in np.flatnonzero(fits & np.equal(*lengths)).tolist():
            chosen, rejected = (side[position].values.to_numpy() for side in sides)
            identical[start + position] = np.array_equal(chosen, rejected)
        start += len(batch)

    kept = np.flatnonzero(~(too_long | identical))
    if len(kept) == len(dataset):
        return dataset
    if len(kept) == 0:
        why = _why_dropped(max_length, int(too_long.sum()), int(identical.sum()))
        raise ValueError(f"{dataset_name} dataset: no pair is left of {len(dataset)}: {why}")
    if too_long.any() and on_main_process:
        why = _why_dropped(max_length, int(too_long.sum()), 0)
        logger.warning(f"{dataset_name} dataset: dropped {too_long.sum()} of {len(dataset)} pairs: {why}")
    if identical.any() and on_main_process:
        dropped = np.flatnonzero(identical)
        positions = dropped[:10].tolist()
        rows = dataset.with_format(None)[positions][ROW_COLUMN] if ROW_COLUMN in dataset.column_names else positions
        logger.warning(
            f"{dataset_name} dataset: dropped {len(dropped)} of {len(dataset) - too_long.sum()} pairs, whose 'chosen' "
            f"and 'rejected' are identical after tokenization and teach nothing (row {', '.join(map(str, rows))}"
            f"{', ...' if len(dropped) > len(positions) else ''})"
        )
    return dataset.select(kept)


def check_token_ids(dataset: Dataset | IterableDataset, dataset_name: str, known: int) -> Dataset | IterableDataset:
    """
    Check that the model has an embedding of every token, of a `Dataset` at once and of a stream as it is read.

    Unchecked, such a token is an index out of range at some step, and on an accelerator the end of the process.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Tokenized dataset.
        dataset_name (`str`):
            Name used in the error.
        known (`int`):
            How many token ids the model knows; 0 if that cannot be told.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The dataset, or a stream that checks its rows.

    Raises:
        `ValueError`: If a token id is too large; it names dataset, row, column and fix.
    """
    if not known:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.filter(partial(_has_known_tokens, dataset_name=dataset_name, known=known))
    names = [name for name in (*TOKENIZED_PAIR, RANKED_IDS) if name in dataset.column_names]
    start = 0
    for batch in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        for name in names:
            ids = batch[name].combine_chunks()
            while pa.types.is_list(ids.type) or pa.types.is_large_list(ids.type):
                ids = ids.flatten()
            if len(ids) and (pc.max(ids).as_py() or 0) >= known:
                for row in dataset.with_format(None).select(range(start, start + len(batch))):
                    _has_known_tokens(row, dataset_name, known)
        start += len(batch)
    return dataset


def _has_known_tokens(row: Row, dataset_name: str, known: int) -> bool:
    answers = [(name, row.get(name)) for name in TOKENIZED_PAIR]
    answers += [(RANKED_IDS, ids) for ids in as_list(row.get(RANKED_IDS)) or ()]
    for name, ids in answers:
        if not is_missing(ids) and max(as_list(ids)) >= known:
            number = f" {int(row[ROW_COLUMN])}" if ROW_COLUMN in row else ""
            raise ValueError(
                f"{dataset_name} dataset, row{number}, column '{name}': the token id {max(as_list(ids))}, where the "
                f"model has the ids 0 to {known - 1}; tokenize with the model's own tokenizer"
            )
    return True


# Tokens


@contextmanager
def _naming_the_row(dataset_name: str, row: Row, columns: Sequence[str]) -> Iterator[None]:
    """Name the row and the columns of a text that cannot be tokenized."""
    try:
        yield
    except ValueError as error:
        number = f" {int(row[ROW_COLUMN])}" if ROW_COLUMN in row else ""
        places = " or ".join(f"'{column}'" for column in dict.fromkeys(columns))
        raise ValueError(
            f"{dataset_name} dataset, row{number}, column {places}: {error}; drop the row, or fix it"
        ) from error


@dataclass(frozen=True)
class _Tokenization:
    """What `map` does to a batch. By its version, tokens in the cache are found by no other one."""

    processing_class: PreTrainedTokenizerBase
    layout: Layout
    has_rankings: bool = False
    as_lists: bool = False
    dataset_name: str = ""
    version: str = __version__

    def __call__(self, batch: Any) -> dict[str, list[Any]]:
        columns = {name: as_list(batch[name]) for name in batch}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        try:
            return self._tokens_of(rows)
        except Exception:
            # One row's text or template is at fault, and only tokenized by itself does it say which one's.
            for row in rows:
                record = read_answers(row, self.layout)
                with _naming_the_row(self.dataset_name, row, record.columns):
                    tokenize_record(record, self.processing_class)
            raise

    def _tokens_of(self, rows: list[Row]) -> dict[str, list[Any]]:
        records = [read_answers(row, self.layout) for row in rows]
        if self.layout.kind == "standard":
            # TRL looks for the end of the answer, and not of the answer after its prompt.
            end = self.processing_class.eos_token
            contents = [
                [join(record.prompt, text if text.endswith(end) else text + end) for text in record.answers]
                for record in records
            ]
            arguments: list[dict[str, Any]] = [{}] * len(rows)  # plain text reads no template
        else:
            contents = [record.contents for record in records]
            arguments = [chat_template_arguments(record.template) for record in records]
        texts = [text for of_row in contents for text in of_row]
        arguments = [of_row for of_row, record in zip(arguments, records, strict=True) for _ in record.answers]
        ids: list[Any] = []
        for start in range(0, len(texts), TEXTS_PER_CALL):
            stop = start + TEXTS_PER_CALL
            tokenized = tokenize_all(
                self.processing_class, texts[start:stop], arguments[start:stop], refuse_empty=True
            )
            # An array takes a fifth of the memory of a list of numbers, but is not what a stream hands on.
            ids += tokenized if self.as_lists else [np.array(of_text, dtype=np.int64) for of_text in tokenized]

        # In a stream of pairs TRL leaves the messages as they were.
        names = TOKENIZED_PAIR if self.as_lists and not self.has_rankings else (*TEXT_PAIR, *TOKENIZED_PAIR)
        output: dict[str, list[Any]] = {name: [] for name in names}
        if self.has_rankings:
            output[RANKED_IDS] = []
        start = 0
        for row, of_row in zip(rows, contents, strict=True):
            of_answers = ids[start : start + len(of_row)]
            start += len(of_row)
            sides = [0, 1]
            if self.has_rankings:
                ranked = is_ranking(row)
                output[RANKED_IDS].append(of_answers if ranked else None)
                if ranked:  # TRL's columns hold two answers: the best and the worst
                    order = sorted(range(len(of_row)), key=as_list(row["ranks"]).__getitem__)
                    sides = [order[0], order[-1]]
            for side, text, tokens in zip(sides, TEXT_PAIR, TOKENIZED_PAIR, strict=True):
                output[tokens].append(of_answers[side])
                if text in output:
                    output[text].append(of_row[side])
        return output


# Filters


class _UsablePairs:
    """Filter of a stream: keeps rows that fit and whose sides differ, and warns at the first identical pair."""

    def __init__(self, dataset_name: str, max_length: int | None, warn: bool):
        self.dataset_name = dataset_name
        self.max_length = max_length
        self.warn = warn

    def fault(self, example: dict[str, Any]) -> Literal["too long", "identical"] | None:
        """What is wrong with a row that is dropped."""
        answers = read_answers(example, PREPARED).answers
        if self.max_length is not None and max(map(len, answers)) > self.max_length:
            return "too long"
        chosen, rejected = (as_list(example[name]) for name in TOKENIZED_PAIR)
        return "identical" if chosen == rejected else None

    def __call__(self, example: dict[str, Any]) -> bool:
        fault = self.fault(example)
        if fault == "identical" and self.warn:
            self.warn = False
            row = f"row {int(example[ROW_COLUMN])}: " if ROW_COLUMN in example else ""
            logger.warning(
                f"{self.dataset_name} dataset, {row}'chosen' and 'rejected' are identical after tokenization and "
                "teach nothing; dropped, as all further ones will be without a word"
            )
        return fault is None


def _look_ahead(dataset: IterableDataset, usable: _UsablePairs) -> None:
    """See what is left of the beginning of a stream: a run on a stream of which nothing is left ends by itself."""
    faults = Counter[str | None]()
    of = "of"
    for row in dataset:
        faults[usable.fault(row)] += 1
        if faults.total() >= (LOOKED_AT_OF_STREAM if faults[None] else MOST_DROPPED_OF_STREAM):
            of = "of the first"  # and perhaps only ones
            break
    seen, dropped = faults.total(), faults.total() - faults[None]
    why = _why_dropped(usable.max_length, faults["too long"], faults["identical"])
    if dropped == seen:
        raise ValueError(f"{usable.dataset_name} dataset: no pair is left {of} {seen}: {why}")
    if 2 * dropped > seen and usable.warn:
        logger.warning(f"{usable.dataset_name} dataset: dropped {dropped} {of} {seen} pairs of the stream: {why}")


def _why_dropped(max_length: int | None, too_long: int, identical: int) -> str:
    """Why pairs are dropped, and how to keep them."""
    reasons, fixes = [], []
    if too_long:
        reasons.append(f"{too_long} have a side of more than max_length={max_length} tokens")
        fixes.append("raise max_length (None keeps all)")
    if identical:
        reasons.append(f"{identical} have identical sides after tokenization")
        fixes.append("check that the chat template renders the last turn and that the sides differ")
    return f"{' and '.join(reasons)}; {', and '.join(fixes)}"
