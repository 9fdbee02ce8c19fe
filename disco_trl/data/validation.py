"""
What a preference dataset must look like: its columns, and every row of it, before TRL touches them.

`check_preferences` numbers the rows and turns whatever would crash, or worse not crash, inside a chat template or a
loss into an error that names the row, the column and the fix. The row numbers go on into the batch, so that the
trainer can name the rows of a batch that goes wrong.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from .columns import (
    JUDGEMENT_COLUMNS,
    KNOWN_COLUMNS,
    LEGACY_TOKENIZED_PAIR,
    ROW_COLUMN,
    SYNONYMS,
    TEXT_PAIR,
    TOKENIZED_PAIR,
    Layout,
    tokenized_pair,
)
from .files import Row
from .judgements import find_problem as find_judgement_problem
from .tokenization import SpecialTokens
from .values import Problem, as_list, is_missing, shown


logger = logging.getLogger(__name__)

ROLES_AT_THE_FRONT = ("system", "developer")


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
            Preference dataset of any type that TRL's `RewardTrainer` takes: standard or conversational, implicit or
            explicit prompt, or tokenized (`chosen_ids` and `rejected_ids`).
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that will render the conversations.
        dataset_name (`str`):
            Name used in errors and progress bars, such as `"train"`.
        num_proc (`int`, *optional*):
            Number of processes that check a `Dataset`.

    Returns:
        The dataset with its columns untouched and one more, `row_index`: the row's position, from 0, in the dataset
        given. In a stream it is the position in what one dataloader worker reads. A dataset that this function and
        the tokenization have already been through is returned as it is.

    Raises:
        `ValueError`: the first thing wrong, with dataset, row, column and fix.
    """
    first_row = next(iter(dataset.with_format(None)), None)
    if first_row is None:
        raise ValueError(f"{dataset_name} dataset: it is empty; check its path, split and filters")
    if {ROW_COLUMN, *TOKENIZED_PAIR} <= first_row.keys():
        return dataset
    layout = _find_layout(first_row, dataset_name)
    # TRL hands a row's chat_template_kwargs to the tokenizer, and a template may be among them.
    kwargs = first_row.get("chat_template_kwargs")
    template = processing_class.chat_template or (isinstance(kwargs, dict) and kwargs.get("chat_template"))
    if layout.kind == "conversational" and not template:
        raise ValueError(
            f"{dataset_name} dataset, column 'chosen': conversations, but the tokenizer has no chat template for "
            "them; pass chat_template_path=... in the trainer's config (a chat model's name or path, or a .jinja "
            "file), or set processing_class.chat_template"
        )
    if layout.kind == "standard":
        _warn_of_unread_prompt(first_row, dataset_name)

    # One warning, from the process that speaks for all.
    special = SpecialTokens(processing_class) if PartialState().is_main_process else None
    if layout.kind == "tokenized":
        special = None
    notice = _Notice(special)
    arguments: dict[str, Any] = {"layout": layout, "dataset_name": dataset_name, "notice": notice}
    if isinstance(dataset, IterableDataset):
        # Without features given, `map` forgets them, and TRL then reads a row each time it asks for the columns.
        features = None if dataset.features is None else Features({**dataset.features, ROW_COLUMN: Value("int64")})
        return dataset.map(_number_checked_row, with_indices=True, features=features, fn_kwargs=arguments)

    # Row 0 by itself and first: the format of all other rows is compared with it.
    _number_checked_row(first_row, 0, **arguments)
    columns_read = {"prompt", *layout.pair, "tools", "chat_template_kwargs", *JUDGEMENT_COLUMNS}
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


def _find_layout(first_row: dict[str, Any], dataset_name: str) -> Layout:
    """Tell how the dataset writes its pairs from its first row, or raise what its columns lack."""
    # TRL's own order: tokenized columns win over text. A pair of which one side is there is the one that was meant.
    pairs = (TOKENIZED_PAIR, LEGACY_TOKENIZED_PAIR, TEXT_PAIR)
    pair = next((pair for pair in pairs if first_row.keys() >= set(pair)), None) or next(
        (pair for pair in reversed(pairs) if first_row.keys() & set(pair)), TEXT_PAIR
    )
    missing = [name for name in pair if name not in first_row]
    if missing:
        raise ValueError(_missing_columns(missing, first_row, dataset_name))
    if ROW_COLUMN in first_row:
        raise ValueError(
            f"{dataset_name} dataset, column '{ROW_COLUMN}': the trainer keeps its own row numbers under this name; "
            f'dataset.rename_column("{ROW_COLUMN}", "my_{ROW_COLUMN}")'
        )
    if pair != TEXT_PAIR:
        return Layout(pair, "tokenized")
    kind = "conversational" if isinstance(first_row["chosen"], list) else "standard"
    for column in ("completion", "messages"):
        # TRL tells the format by any one of the columns it knows; by which one changes from run to run.
        if column in first_row and isinstance(first_row[column], list) != (kind == "conversational"):
            raise ValueError(
                f"{dataset_name} dataset, column '{column}': {_format_of(first_row[column])} where 'chosen' is "
                f"{_format_of(first_row['chosen'])}, and TRL may take either for the dataset's format; "
                f'dataset.remove_columns("{column}")'
            )
    return Layout(pair, kind)


def _missing_columns(missing: list[str], first_row: dict[str, Any], dataset_name: str) -> str:
    look_alikes = {name: _look_alike(name, first_row) for name in missing}
    renames = {found: name for name, found in look_alikes.items() if found is not None}
    if renames and "prompt" not in first_row and (prompt := _look_alike("prompt", first_row)) is not None:
        renames[prompt] = "prompt"
    if len(renames) == 1:
        ((old, new),) = renames.items()
        fix = f'dataset.rename_column("{old}", "{new}")'
    elif renames:
        fix = f"dataset.rename_columns({json.dumps(renames, ensure_ascii=False)})"
    else:
        fix = "name the columns 'chosen' and 'rejected' (and 'prompt'), or 'chosen_ids' and 'rejected_ids'"
    return (
        f"{dataset_name} dataset, column {' and '.join(map(repr, missing))}: missing "
        f"(there are {', '.join(map(repr, first_row))}); {fix}"
    )


def _look_alike(wanted: str, first_row: dict[str, Any]) -> str | None:
    """The column probably meant by `wanted`: in another case, by another tool's name, misspelt, or a longer name."""
    candidates = {
        name.strip().lower().replace("-", "_").replace(" ", "_"): name
        for name, value in first_row.items()
        if name not in KNOWN_COLUMNS and not name.endswith("_id") and isinstance(value, str | list)
    }
    found = [name for name in (wanted, *SYNONYMS.get(wanted, ())) if name in candidates]
    found = found or difflib.get_close_matches(wanted, candidates, n=1, cutoff=0.8)
    found = found or [name for name in candidates if wanted in name]
    return candidates[found[0]] if found else None


def _warn_of_unread_prompt(first_row: dict[str, Any], dataset_name: str) -> None:
    """Warn of plain text whose prompt has another name: TRL would train on the answers alone, without a word."""
    column = None if "prompt" in first_row else _look_alike("prompt", first_row)
    # An implicit prompt is quoted by the sides, and then a column with it is no loss.
    if column is None or str(first_row[column]) in str(first_row["chosen"]) or not PartialState().is_main_process:
        return
    logger.warning(
        f"{dataset_name} dataset, column '{column}': not read, and 'chosen' of row 0 does not contain it; if it is "
        f'the prompt, dataset.rename_column("{column}", "prompt")'
    )


# The rows


@dataclass
class _Notice:
    """Warns of the first row whose texts hold a special token; of a stream, each worker does. None: it never does."""

    special: SpecialTokens | None

    def __call__(self, row: dict[str, Any], index: int, dataset_name: str) -> None:
        found = None if self.special is None else find_special_token(row, self.special)
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


def find_special_token(row: dict[str, Any], special: SpecialTokens) -> tuple[str, str] | None:
    """The first column of a checked row with a special token in a text, and the token; see `SpecialTokens`."""
    contents = [(name, row[name]) for name in ("prompt", *TEXT_PAIR) if not is_missing(row.get(name))]
    if not is_missing(row.get("completions")):
        contents += [("completions", answer) for answer in row["completions"]]
    found = ((name, special.find(content)) for name, content in contents)
    return next(((name, token) for name, token in found if token is not None), None)


def _check_batch(
    batch: dict[str, list], indices: list[int], layout: Layout, dataset_name: str, notice: _Notice
) -> None:
    columns = {name: batch[name] for name in batch}
    for position, index in enumerate(indices):
        row = {name: values[position] for name, values in columns.items()}
        _number_checked_row(row, index, layout, dataset_name, notice)


def _number_checked_row(
    row: dict[str, Any], index: int, layout: Layout, dataset_name: str, notice: _Notice
) -> dict[str, int]:
    problem = find_problem(row, layout)
    if problem is not None:
        raise ValueError(
            f"{dataset_name} dataset, row {index}, column '{problem.column}': {problem.wrong}; {problem.fix}"
        )
    notice(row, index, dataset_name)
    return {ROW_COLUMN: index}


def find_problem(row: dict[str, Any], layout: Layout) -> Problem | None:
    """The first thing wrong with a row, if there is any."""
    problems: Iterator[Problem | None]
    if layout.kind == "tokenized":
        problems = (_token_problem(column, row.get(column)) for column in layout.pair)
    elif layout.kind == "standard":
        problems = chain(_text_problems(row), _rendering_problems(row))
    else:
        problems = chain(_conversation_problems(row), _rendering_problems(row))
    return next(filter(None, problems), None) or find_judgement_problem(row)


def find_ranking_problem(row: dict[str, Any], layout: Layout) -> Problem | None:
    """The first thing wrong with a row of ranked `completions`, if there is any."""
    if (problem := find_judgement_problem(row)) is not None:
        return problem
    if (side := next((side for side in TEXT_PAIR if not is_missing(row.get(side))), None)) is not None:
        return Problem(side, "given beside ranked completions", "put pairs and rankings into different rows")
    # What makes a pair sound makes each of its answers sound, so an answer is checked as both sides of one.
    names = ("prompt", "tools", "chat_template_kwargs")
    read = {name: row[name] for name in names if not is_missing(row.get(name))}
    for index, answer in enumerate(row["completions"]):
        problem = find_problem(read | dict.fromkeys(TEXT_PAIR, answer), layout)
        if problem is not None:
            column = "completions" if problem.column in TEXT_PAIR else problem.column
            return problem._replace(column=column, wrong=f"answer {index}: {problem.wrong}")
    return None


def _token_problem(column: str, ids: Any) -> Problem | None:
    ids = as_list(ids)
    if not isinstance(ids, list):
        return Problem(column, f"{_format_of(ids)} where token ids should be", "give a list of integers")
    if not ids:
        return Problem(column, "no tokens", "drop the row")
    types = set(map(type, ids))
    if types != {int}:
        names = ", ".join(sorted(kind.__name__ for kind in types))
        return Problem(column, f"token ids must be integers, but these are of type {names}", "give a list of integers")
    if min(ids) < 0:
        return Problem(column, f"token id {min(ids)} is negative", "remove padding and label masks: give plain ids")
    return None


def _text_problems(row: dict[str, Any]) -> Iterator[Problem | None]:
    for column in TEXT_PAIR if "prompt" not in row else (*TEXT_PAIR, "prompt"):
        text = row.get(column)
        if text is None:
            yield Problem(column, "None", "drop the row or fill in the text")
        elif not isinstance(text, str):
            fix = "write every row and column the same way as 'chosen' of row 0: a string, or a list of messages"
            yield Problem(column, f"{_format_of(text)} in a dataset of plain text", fix)
        elif column != "prompt" and (not text or text.isspace()):
            yield Problem(column, "an empty string", "drop the row or fill in the text")
        else:
            yield _unicode_problem(column, text)


def _unicode_problem(column: str, text: str) -> Problem | None:
    """Half of a character of two, a lone surrogate, is in no encoding and no tokenizer's vocabulary."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = f"{shown(text[error.start])} at character {error.start} is half a character"
        return Problem(column, wrong, "read the text anew with its right encoding, or drop the row")
    return None


def _conversation_problems(row: dict[str, Any]) -> Iterator[Problem | None]:
    for column in TEXT_PAIR if "prompt" not in row else (*TEXT_PAIR, "prompt"):
        messages = row.get(column)
        if messages is None:
            yield Problem(column, "None", "drop the row or fill in the messages")
        elif not isinstance(messages, list):
            wrong = f"{_format_of(messages)} in a dataset of conversations"
            role = "user" if column == "prompt" else "assistant"
            fix = f'make it [{{"role": "{role}", "content": ...}}], or every row and column a string'
            # As in HuggingFaceH4/ultrafeedback_binarized. By now 'chosen' is known to hold messages.
            if column == "prompt" and row["chosen"][0].get("content") == messages:
                wrong, fix = f"{wrong} that begin with it already", 'dataset.remove_columns("prompt")'
            yield Problem(column, wrong, fix)
        elif not messages:
            fix = "put the user's turn there" if column == "prompt" else "put the answer there, or drop the row"
            yield Problem(column, "no messages", fix)
        else:
            for turn, message in enumerate(messages):
                yield _message_problem(column, turn, message)
    prompt = [("prompt", turn, message) for turn, message in enumerate(row.get("prompt", ()))]
    for side in TEXT_PAIR:
        yield _order_problem(side, prompt + [(side, turn, message) for turn, message in enumerate(row[side])])


def _message_problem(column: str, turn: int, message: Any) -> Problem | None:
    """What is wrong with a message by itself. Arrow gives all messages the same keys, so a key may hold None."""
    shape = 'write each turn as {"role": ..., "content": ...}'
    if not isinstance(message, dict):
        return Problem(column, f"turn {turn} is {_format_of(message)}, not a message", shape)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role.strip():
        keys = ", ".join(shown(key) for key, value in list(message.items())[:20] if value is not None)
        return Problem(column, f"turn {turn} has no 'role' that is a string (its keys: {keys})", shape)
    if isinstance(content, str):
        return _unicode_problem(column, role) or _unicode_problem(column, content)
    if content is not None:
        wrong = f"turn {turn} ({shown(role)}) has content that is {_format_of(content)}, not a string"
        return Problem(column, wrong, "join the text of its parts into one string")
    if role == "tool" or (role == "assistant" and message.get("tool_calls")):
        return None
    fix = "fill it in (only a tool's turn, and an assistant's with tool_calls, may go without), or drop the row"
    return Problem(column, f"turn {turn} ({shown(role)}) has no content", fix)


def _order_problem(side: str, turns: list[tuple[str, int, dict[str, Any]]]) -> Problem | None:
    """What is wrong with the order of a conversation: the prompt's turns, if any, and those of one side."""
    roles = [message["role"] for _, _, message in turns]
    if "assistant" not in roles:
        wrong = f"no assistant turn, so there is no answer to reward (roles: {', '.join(map(shown, roles[:20]))})"
        fix = 'end it with {"role": "assistant", "content": ...}, or rename the role that answers to \'assistant\''
        return Problem(side, wrong, fix)
    previous = None
    for (column, turn, _), role in zip(turns, roles, strict=True):
        at_the_front = previous is None or previous in ROLES_AT_THE_FRONT
        if role in ROLES_AT_THE_FRONT and not at_the_front:
            return Problem(
                column, f"turn {turn} is '{role}' after {shown(previous)}", f"move the {role} turn to the front"
            )
        if role in ("assistant", "tool") and at_the_front:
            wrong = f"turn {turn} is '{role}', but nobody has asked anything yet"
            return Problem(column, wrong, "put the user's turn before it, or into a column 'prompt'")
        if role == "tool" and previous not in ("assistant", "tool"):
            fix = "put the assistant's tool call before it"
            return Problem(column, f"turn {turn} is 'tool' after {shown(previous)}", fix)
        previous = role
    column, turn, answer = turns[-1]
    if answer["role"] != "assistant":
        fix = "cut the conversation after the assistant's answer"
        return Problem(column, f"the last turn is {shown(answer['role'])}, not 'assistant'", fix)
    if not answer.get("tool_calls") and not answer["content"].strip():
        return Problem(column, f"turn {turn}, the assistant's answer, is empty", "drop the row or fill in the answer")
    return None


def _rendering_problems(row: dict[str, Any]) -> Iterator[Problem | None]:
    """What is wrong with the columns that TRL hands to the chat template."""
    tools = row.get("tools")
    fix = "write it with json.dumps, or give a list"
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:  # also of numbers too long, or nested too deeply
            yield Problem("tools", f"a string that is not JSON ({error})", fix)
    if not is_missing(tools) and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        yield Problem("tools", f"{shown(tools)} where a list of tools should be", fix)
    if "chat_template_kwargs" in row and not isinstance(row["chat_template_kwargs"], dict):
        wrong = f"{_format_of(row['chat_template_kwargs'])} where a dict should be"
        yield Problem("chat_template_kwargs", wrong, "give every row a dict ({} for none)")


def _format_of(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "a list of messages"
    return f"a value of type {type(value).__name__}"


def find_layout(row: Row) -> Layout:
    """How a row writes its answers, by what stands in `chosen`, in the first of `completions`, or as tokens."""
    if (pair := tokenized_pair(row)) is not None:
        return Layout(pair, "tokenized")
    answers = row.get("completions")
    answer = answers[0] if isinstance(answers, list) and answers else row.get("chosen")
    return Layout(TEXT_PAIR, "conversational" if isinstance(answer, list) else "standard")


def find_row_problem(row: Row, layout: Layout) -> Problem | None:
    """The first thing wrong with a row, its texts or its judgements; `layout` is how the dataset writes answers."""
    is_pair = is_missing(row.get("completions"))
    return find_problem(row, layout) if is_pair else find_ranking_problem(row, layout)
