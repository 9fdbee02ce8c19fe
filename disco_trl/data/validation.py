"""
The check of a preference dataset before TRL touches it: its columns, and every row of it.

`check_preferences` numbers the rows and turns whatever would crash inside a chat template or a loss, or worse not
crash, into an error that names the row, the column and the fix. The row numbers stay in the dataset and go into each
batch, so that the trainer can name the rows of a batch that goes wrong.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from .columns import (
    JUDGEMENT_COLUMNS,
    RANKED_IDS,
    RANKING,
    ROW_COLUMN,
    TEMPLATE_COLUMNS,
    TOKENIZED_PAIR,
    Layout,
    find_layout,
    holds_pair,
)
from .contents import format_of
from .findings import find_in_some_rows
from .look_alikes import conversion_of, find_look_alikes, fix_of_answers, unconverted_side
from .records import Record, read_record
from .tokenization import SpecialTokens
from .values import BadRow, Row, is_missing


# Not accelerate's logger, which raises in a spawned dataloader worker, where streams are checked.
logger = logging.getLogger(__name__)


def check_preferences(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase,
    dataset_name: str,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Check every row of a preference dataset and number the rows.

    A `Dataset` is checked at once, by every process of a distributed run, so that all of them stop. An
    `IterableDataset` is checked row by row as it is read; only its columns, and the tokenizer's chat template, are
    checked at once.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference dataset of any type that TRL's `RewardTrainer` takes (standard or conversational, implicit or
            explicit prompt, or tokenized), or with rankings, which may stand among pairs.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that will render the conversations.
        dataset_name (`str`):
            Name used in errors and progress bars, such as `"train"`.
        num_proc (`int`, *optional*):
            Number of processes that check a `Dataset`.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The dataset with its columns untouched and one more,
        `row_index`: the position of the row, from 0, in the dataset given. In a stream it is the position in what one
        dataloader worker reads. A dataset that this function and the tokenization have already been through is
        returned as it is.

    Raises:
        `ValueError`: If something is wrong; the first such thing is named with dataset, row, column and fix.
    """
    first_row = next(iter(dataset.with_format(None)), None)
    if first_row is None:
        raise ValueError(f"{dataset_name} dataset: it is empty; check its path, split and filters")
    if {ROW_COLUMN, *TOKENIZED_PAIR} <= first_row.keys():
        return dataset
    layout = find_layout(first_row)
    _check_columns(first_row, layout, dataset_name)
    # TRL hands a row's chat_template_kwargs to the tokenizer, and a template may be among them.
    kwargs = first_row.get("chat_template_kwargs")
    template = processing_class.chat_template or (isinstance(kwargs, dict) and kwargs.get("chat_template"))
    if layout.kind == "conversational" and not template:
        column = RANKING[0] if is_missing(first_row.get(layout.columns[0])) else layout.columns[0]
        raise ValueError(
            f"{dataset_name} dataset, column '{column}': conversations, but the tokenizer has no chat template for "
            "them; pass chat_template_path=... in the trainer's config (a chat model's name or path, or a .jinja "
            "file), or set processing_class.chat_template"
        )
    if PartialState().is_main_process:
        if layout.kind == "standard":
            _warn_of_unread_prompt(first_row, dataset_name)
        for message in find_in_some_rows(dataset, layout):
            logger.warning(f"{dataset_name} dataset, {message}")

    # One warning, from the process that speaks for all. Token ids have no texts to look at.
    warns = PartialState().is_main_process and layout.kind != "tokenized"
    notice = _Notice(SpecialTokens(processing_class) if warns else None)
    arguments: dict[str, Any] = {"layout": layout, "dataset_name": dataset_name, "notice": notice}
    if isinstance(dataset, IterableDataset):
        # Without features given, `map` forgets them, and TRL then reads a row each time it asks for the columns.
        features = None if dataset.features is None else Features({**dataset.features, ROW_COLUMN: Value("int64")})
        return dataset.map(_number_checked_row, with_indices=True, features=features, fn_kwargs=arguments)

    # Row 0 by itself and first: the format of all other rows is compared with it.
    _number_checked_row(first_row, 0, **arguments)
    columns_read = {"prompt", *layout.columns, *TEMPLATE_COLUMNS, *JUDGEMENT_COLUMNS, *RANKING, RANKED_IDS}
    dataset.with_format(None).select_columns([name for name in dataset.column_names if name in columns_read]).map(
        _check_batch,
        with_indices=True,
        batched=True,
        num_proc=num_proc,
        fn_kwargs=arguments,
        desc=f"Checking {dataset_name} dataset",
    )
    # `add_column` writes a shuffled dataset out anew: ten times faster in Arrow's format than in Python's, and found
    # in the cache by the processes that come second.
    with PartialState().main_process_first():
        numbered = dataset.with_format("arrow").add_column(ROW_COLUMN, np.arange(len(dataset)))
    user_format = dataset.format
    return numbered.with_format(
        user_format["type"],
        columns=[*user_format["columns"], ROW_COLUMN],
        output_all_columns=user_format["output_all_columns"],
        **user_format["format_kwargs"],
    )


# The columns


def _check_columns(first_row: Row, layout: Layout, dataset_name: str) -> None:
    """Raise `ValueError` for what the columns lack, or would confuse TRL with."""
    missing = [name for name in layout.columns if name not in first_row]
    if missing and "ranks" not in first_row:
        raise ValueError(
            f"{dataset_name} dataset, column {' and '.join(map(repr, missing))}: missing "
            f"(there are {', '.join(map(repr, first_row))}); {fix_of_answers(first_row)}"
        )
    if wrong := unconverted_side(first_row):
        raise ValueError(f"{dataset_name} dataset, {wrong}")
    if ROW_COLUMN in first_row:
        raise ValueError(
            f"{dataset_name} dataset, column '{ROW_COLUMN}': the trainer keeps its own row numbers under this name; "
            f'dataset.rename_column("{ROW_COLUMN}", "my_{ROW_COLUMN}")'
        )
    for column in ("completion", "messages") if layout.kind != "tokenized" else ():
        # TRL tells the format by any one of the columns it knows; by which one changes from run to run.
        is_conversational = layout.kind == "conversational"
        if column in first_row and isinstance(first_row[column], list) != is_conversational:
            kind = "a list of messages" if is_conversational else "a string"
            raise ValueError(
                f"{dataset_name} dataset, column '{column}': {format_of(first_row[column])} where "
                f"{layout.columns[0]!r} is {kind}, and TRL may take either for the dataset's format; "
                f'dataset.remove_columns("{column}")'
            )


def _warn_of_unread_prompt(first_row: Row, dataset_name: str) -> None:
    """Warn of plain text whose prompt has another name: TRL would train on the answers alone, without a word."""
    column = next((name for name, meant in find_look_alikes(first_row).items() if meant == "prompt"), None)
    answers = first_row.get(RANKING[0])
    side = RANKING[0] if isinstance(answers, list) and answers and not holds_pair(first_row) else "chosen"
    answer = answers[0] if isinstance(answers, list) and side == RANKING[0] else first_row.get(side)
    # An implicit prompt is quoted by the answers, and then a column with it is no loss.
    if column is None or str(first_row[column]) in str(answer):
        return
    fix = conversion_of(first_row) or f'if it is the prompt, dataset.rename_column("{column}", "prompt")'
    logger.warning(
        f"{dataset_name} dataset, column '{column}': not read, and '{side}' of row 0 does not contain it; {fix}"
    )


# The rows


@dataclass
class _Notice:
    """Warns of the first row whose texts hold a special token; of a stream, each worker does. None: it never does."""

    special: SpecialTokens | None

    def __call__(self, record: Record, index: int, dataset_name: str) -> None:
        found = None if self.special is None else find_special_token(record, self.special)
        if found is None:
            return
        self.special = None
        column, token = found
        logger.warning(
            f"{dataset_name} dataset, row {index}, column '{column}': the text holds {token!r}, which the tokenizer "
            "takes for the special token, as TRL does: whoever wrote it can end a turn, or begin another. If you "
            "rendered the text yourself all is well; else take it out. No further row is named; "
            "`disco-trl data check --model_name_or_path` counts them"
        )


def find_special_token(record: Record, special: SpecialTokens) -> tuple[str, str] | None:
    """The first column of a record with a special token in a text, and the token; see [`SpecialTokens`]."""
    found = ((column, special.find(content)) for column, content in record.parts())
    return next(((column, token) for column, token in found if token is not None), None)


def _check_batch(
    batch: dict[str, list], indices: list[int], layout: Layout, dataset_name: str, notice: _Notice
) -> None:
    columns = {name: batch[name] for name in batch}
    for position, index in enumerate(indices):
        row = {name: values[position] for name, values in columns.items()}
        _number_checked_row(row, index, layout, dataset_name, notice)


def _number_checked_row(row: Row, index: int, layout: Layout, dataset_name: str, notice: _Notice) -> dict[str, int]:
    try:
        record = read_record(row, layout)
    except BadRow as error:
        raise ValueError(f"{dataset_name} dataset, row {index}, {error}") from error
    notice(record, index, dataset_name)
    return {ROW_COLUMN: index}
