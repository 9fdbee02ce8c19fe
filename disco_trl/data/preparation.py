"""
From checked rows to the pairs that are trained on: TRL's tokens, made many at a time, and the filters.

`tokenize_pairs` writes what TRL's `RewardTrainer` would, token for token and column for column, but in one pass where
TRL makes two, and with the tokenizer's own threads. `filter_pairs` drops what is longer than `max_length`, as TRL
does, and the pairs that no reward can tell apart; it reads Arrow's arrays where TRL reads rows.
"""

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from .._version import __version__
from .columns import LEGACY_TOKENIZED_PAIR, RANKED_IDS, RANKING, ROW_COLUMN, TEXT_PAIR, TOKENIZED_PAIR, Layout
from .tokenization import chat_template_arguments, tokenize, tokenize_pair
from .validation import find_ranking_problem
from .values import as_list, is_missing


# Not accelerate's logger: it raises in a spawned dataloader worker, where no accelerate state exists, and streaming
# datasets are filtered there.
logger = logging.getLogger(__name__)

TEXTS_PER_CALL = 128
"""Texts that the tokenizer gets at once: enough for its threads. What it returns beside the ids takes many times their
memory, so the texts of a whole batch of `map` would be too many."""

# Of apply_chat_template's parameters, those that make the text. Any other acts on the tokens or on their container.
TEXT_PARAMETERS = {"tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message", "kwargs"}
TOKEN_PARAMETERS = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - TEXT_PARAMETERS


def expand_rankings(dataset: Dataset | IterableDataset, dataset_name: str) -> Dataset | IterableDataset:
    """
    Make pairs of rankings, for whatever knows of pairs alone.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset that may have the columns `completions` and `ranks`.
        dataset_name (`str`):
            Name used in errors.

    Returns:
        The dataset, in which `chosen` and `rejected` of a ranking are its best and its worst answer.

    Raises:
        `ValueError`: something is wrong with a ranking; it names dataset, row, column and fix. (Of a stream, when the
        row is read.)
    """
    first_row: dict[str, Any] = next(iter(dataset.with_format(None)), {})
    if "ranks" not in first_row or RANKED_IDS in first_row:
        return dataset
    features = dataset.features
    # What is no list of answers is for the row's check to refuse.
    answer = None if features is None else getattr(features.get("completions"), "feature", None)
    if answer is None:
        features = None
    else:
        features = Features({**features, **{side: features.get(side) or answer for side in TEXT_PAIR}})
    return dataset.map(_best_and_worst, with_indices=True, features=features, fn_kwargs={"dataset_name": dataset_name})


def _best_and_worst(row: dict[str, Any], index: int, dataset_name: str) -> dict[str, Any]:
    if all(is_missing(row.get(name)) for name in RANKING):
        return {side: row.get(side) for side in TEXT_PAIR}
    answers = row.get("completions")
    is_conversational = isinstance(answers, list) and bool(answers) and isinstance(answers[0], list)
    kind = "conversational" if is_conversational else "standard"
    problem = find_ranking_problem(row, Layout(TEXT_PAIR, kind))
    if problem is not None:
        raise ValueError(
            f"{dataset_name} dataset, row {index}, column '{problem.column}': {problem.wrong}; {problem.fix}"
        )
    order = sorted(range(len(row["ranks"])), key=row["ranks"].__getitem__)
    return {"chosen": row["completions"][order[0]], "rejected": row["completions"][order[-1]]}


def tokenize_rankings(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase,
    dataset_name: str,
    max_length: int | None = None,
) -> Dataset | IterableDataset:
    """
    Put the tokens of all the answers of each ranking in the place of the answers.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset that has been through `expand_rankings` and `disco_trl.data.validation.check_preferences`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, which also renders the conversations.
        dataset_name (`str`):
            Name used in the progress bar.
        max_length (`int`, *optional*):
            Most tokens that an answer may have; rankings with a longer one are dropped.

    Returns:
        The dataset with `completion_ids`, a list of lists, in the place of `completions`; None in rows that are pairs.
    """
    first_row = next(iter(dataset.with_format(None)))
    if "completions" not in first_row or "ranks" not in first_row:
        return dataset

    def token_ids(row: dict[str, Any]) -> dict[str, Any]:
        if is_missing(row.get("ranks")):
            return {RANKED_IDS: None}
        with naming_the_row(dataset_name, row, "completions"):
            return {RANKED_IDS: ids_of_answers(row)}

    def ids_of_answers(row: dict[str, Any]) -> list[list[int]]:
        arguments = chat_template_arguments(row)
        answers = row["completions"]
        if not is_missing(row.get("prompt")):
            answers = [row["prompt"] + answer for answer in answers]
        return [tokenize(processing_class, answer, **arguments) for answer in answers]

    features = dataset.features
    if features is not None:
        kept = {name: feature for name, feature in features.items() if name != "completions"}
        features = Features({**kept, RANKED_IDS: List(List(Value("int64")))})
    options: dict[str, Any] = {"features": features, "remove_columns": ["completions"]}
    if isinstance(dataset, Dataset):
        options["desc"] = f"Tokenizing rankings of {dataset_name} dataset"
    dataset = dataset.map(token_ids, **options)
    if max_length is None:
        return dataset
    return dataset.filter(lambda row: max(map(len, row[RANKED_IDS] or [[]])) <= max_length)


def tokenize_pairs(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase,
    dataset_name: str,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Tokenize a preference dataset as TRL's `RewardTrainer` does, only faster.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset that has passed `disco_trl.data.validation.check_preferences`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, which also renders the conversations.
        dataset_name (`str`):
            Name used in the progress bar.
        num_proc (`int`, *optional*):
            Number of processes that tokenize.

    Returns:
        The dataset with `chosen_ids` and `rejected_ids`, and with `chosen` and `rejected` as TRL leaves them: after
        their prompt, and a text with the end-of-text token. A stream, and a dataset with a format that may make
        something else of the rows, come back as they are, for TRL to tokenize row by row; tokenized ones as well.
    """
    if isinstance(dataset, IterableDataset) or dataset.format["type"] is not None:
        return dataset
    if any(set(dataset.column_names).issuperset(pair) for pair in (TOKENIZED_PAIR, LEGACY_TOKENIZED_PAIR)):
        return dataset
    # As TRL does: those that come second find the tokens in the cache, on every node.
    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        return dataset.map(
            _Tokenization(processing_class, dataset_name),
            batched=True,
            num_proc=num_proc,
            desc=f"Tokenizing {dataset_name} dataset",
        )


def filter_pairs(
    dataset: Dataset | IterableDataset, dataset_name: str, max_length: int | None = None
) -> Dataset | IterableDataset:
    """
    Drop the pairs that are too long, and those whose two sides are the same tokens: no reward can tell them apart.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Tokenized dataset with `chosen_ids` and `rejected_ids`.
        dataset_name (`str`):
            Name used in errors and in the warning.
        max_length (`int`, *optional*):
            Most tokens that a side may have.

    Returns:
        The dataset without those pairs. One warning gives the number of identical ones and the first ten row numbers
        (for a stream: the first row, when it is met).

    Raises:
        `ValueError`: nothing is left of a `Dataset`.
    """
    on_main_process = PartialState().is_main_process
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_UsablePairs(dataset_name, max_length, warn=on_main_process))

    too_long = np.zeros(len(dataset), dtype=bool)
    identical = np.zeros(len(dataset), dtype=bool)
    start = 0
    for batch in dataset.select_columns(list(TOKENIZED_PAIR)).with_format("arrow").iter(batch_size=1000):
        sides = [batch[name].combine_chunks() for name in TOKENIZED_PAIR]
        lengths = [pc.list_value_length(side).to_numpy(zero_copy_only=False) for side in sides]
        fits = np.full(len(batch), True) if max_length is None else np.maximum(*lengths) <= max_length
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
        raise ValueError(_nothing_left(dataset_name, max_length, int(too_long.sum()), int(identical.sum())))
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
    Raise a `ValueError` if a row holds a token that the model has no embedding of: of a `Dataset` now, of a stream
    when the row is read. Left alone it is an index out of range at some step, and on an accelerator the end of the
    process.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Tokenized dataset.
        dataset_name (`str`):
            Name used in the error.
        known (`int`):
            How many token ids the model knows; 0 if that cannot be told.

    Returns:
        The dataset, of a stream one that checks.
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


def _has_known_tokens(row: dict[str, Any], dataset_name: str, known: int) -> bool:
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
def naming_the_row(dataset_name: str, row: Any, column: str) -> Iterator[None]:
    """Say of which row it is that a text cannot be tokenized."""
    try:
        yield
    except ValueError as error:
        number = f" {int(row[ROW_COLUMN])}" if ROW_COLUMN in row else ""
        raise ValueError(
            f"{dataset_name} dataset, row{number}, column '{column}': {error}; drop the row, or fix it"
        ) from error


@dataclass(frozen=True)
class _Tokenization:
    """What `map` does to a batch. By its version, tokens in the cache are found by no other one."""

    processing_class: PreTrainedTokenizerBase
    dataset_name: str = ""
    version: str = __version__

    def __call__(self, batch: Any) -> dict[str, list[Any]]:
        try:
            return self._tokens_of(batch)
        except Exception:
            # One row's text or template is at fault, and only tokenized by itself does it say which one's.
            for values in zip(*(batch[name] for name in batch), strict=True):
                row = dict(zip(batch, values, strict=True))
                read = {name: value for name, value in row.items() if value is not None}
                with naming_the_row(self.dataset_name, row, "chosen' or 'rejected"):
                    tokenize_pair(read, self.processing_class)
            raise

    def _tokens_of(self, batch: Any) -> dict[str, list[Any]]:
        is_conversational = isinstance(batch["chosen"][0], list)
        columns = {name: batch[name] for name in ("tools", "chat_template_kwargs") if name in batch}
        # Plain text reads neither column.
        arguments = [
            chat_template_arguments({name: values[row] for name, values in columns.items() if is_conversational})
            for row in range(len(batch["chosen"]))
        ]
        output: dict[str, list[Any]] = {}
        for side, side_ids in zip(TEXT_PAIR, TOKENIZED_PAIR, strict=True):
            contents = batch[side]
            if not is_conversational:
                eos_token = self.processing_class.eos_token
                contents = [text if text.endswith(eos_token) else text + eos_token for text in contents]
            if "prompt" in batch:
                contents = [prompt + content for prompt, content in zip(batch["prompt"], contents, strict=True)]
            output[side] = contents
            output[side_ids] = []
            for start in range(0, len(contents), TEXTS_PER_CALL):
                stop = start + TEXTS_PER_CALL
                ids = _tokenize(self.processing_class, contents[start:stop], arguments[start:stop])
                # An array takes a fifth of the memory of a list of numbers
                output[side_ids] += [np.array(row, dtype=np.int64) for row in ids]
        return output


def _tokenize(
    processing_class: PreTrainedTokenizerBase,
    contents: Sequence[str | list[dict[str, Any]]],
    arguments: Sequence[dict[str, Any]],
) -> list[list[int]]:
    """Token ids of texts, or of conversations with each its own arguments to the chat template."""
    # Of a tokenizers-backed tokenizer whose own methods these are, many at once get the tokens that each gets alone.
    # CodeLlama's, for one, has its own: it looks for the place to fill in a text, and would look for it in the list.
    kind: Any = type(processing_class)
    takes_many = (
        kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind.apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        and kind._encode_plus is TokenizersBackend._encode_plus
    )
    if not takes_many or any(TOKEN_PARAMETERS & row.keys() for row in arguments):
        return [tokenize(processing_class, content, **row) for content, row in zip(contents, arguments, strict=True)]
    if isinstance(contents[0], str):
        return processing_class(list(contents))["input_ids"]
    texts: list[str] = []
    # repr tells apart what == does not, and a template may: True and 1
    for _, rows in groupby(zip(contents, arguments, strict=True), key=lambda row: repr(row[1])):
        conversations, same_arguments = zip(*rows, strict=True)
        rendered: Any = processing_class.apply_chat_template(list(conversations), tokenize=False, **same_arguments[0])
        texts += rendered
    return processing_class(texts, add_special_tokens=False)["input_ids"]


# Filters


class _UsablePairs:
    """Filter of a stream: keeps pairs that fit and whose sides differ, and warns at the first identical one."""

    def __init__(self, dataset_name: str, max_length: int | None, warn: bool):
        self.dataset_name = dataset_name
        self.max_length = max_length
        self.warn = warn

    def __call__(self, example: dict[str, Any]) -> bool:
        chosen, rejected = (as_list(example[name]) for name in TOKENIZED_PAIR)
        if self.max_length is not None and max(len(chosen), len(rejected)) > self.max_length:
            return False
        if chosen != rejected:
            return True
        if self.warn:
            self.warn = False
            row = f"row {int(example[ROW_COLUMN])}: " if ROW_COLUMN in example else ""
            logger.warning(
                f"{self.dataset_name} dataset, {row}'chosen' and 'rejected' are identical after tokenization and "
                "teach nothing; dropped, as all further ones will be without a word"
            )
        return False


def _nothing_left(dataset_name: str, max_length: int | None, too_long: int, identical: int) -> str:
    reasons, fixes = [], []
    if too_long:
        reasons.append(f"{too_long} have a side of more than max_length={max_length} tokens")
        fixes.append("raise max_length (None keeps all)")
    if identical:
        reasons.append(f"{identical} have identical sides after tokenization")
        fixes.append("check that the chat template renders the last turn and that the sides differ")
    return (
        f"{dataset_name} dataset: no pair is left of {too_long + identical}: {' and '.join(reasons)}; "
        f"{', and '.join(fixes)}"
    )
