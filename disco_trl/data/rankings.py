"""Rankings as pairs, for trainers whose rows are pairs."""

from __future__ import annotations

from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset

from .columns import RANKING, TEXT_PAIR, find_layout, is_ranking
from .judgements import in_turn
from .records import read_answers, read_feedback
from .values import as_list


def rankings_to_pairs(
    dataset: Dataset | IterableDataset, weigh_by: str, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """
    Replace each ranking of K answers by the pairs of its answers; rows that are pairs stay as they are.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset whose rows have been checked.
        weigh_by (`str`):
            `"pair"` if all that is said in a row weighs 1 together, `"vote"` if each pair does.
        num_proc (`int`, *optional*):
            Number of processes.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The dataset without `completions` and `ranks`, and with
        `chosen`, `rejected`, `tie` and `weight`. A dataset without rankings is returned as it is.
    """
    columns = dataset.column_names or []
    if "ranks" not in columns:
        return dataset
    first_row: dict[str, Any] = next(iter(dataset.with_format(None)))
    layout = find_layout(first_row)
    pairs_of = partial(_pairs_of, layout=layout, weigh_by=weigh_by)
    if isinstance(dataset, IterableDataset):
        return dataset.map(pairs_of, batched=True, remove_columns=[*RANKING])
    return dataset.map(
        pairs_of, batched=True, num_proc=num_proc, remove_columns=[*RANKING], desc="Taking rankings apart"
    )


def _pairs_of(batch: Any, layout: Any, weigh_by: str) -> dict[str, list[Any]]:
    columns = {name: as_list(batch[name]) for name in batch}
    found: list[dict[str, Any]] = []
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        kept = {name: value for name, value in row.items() if name not in RANKING}
        if not is_ranking(row):
            found.append({**dict.fromkeys(("tie", "weight")), **kept})
            continue
        record = read_answers(row, layout, read_feedback(row, with_answers=True))
        for comparison, weight in in_turn(record, weigh_by):
            sides = (record.answers[comparison.first], record.answers[comparison.second])
            pair = {**dict(zip(TEXT_PAIR, sides, strict=True)), "tie": comparison.ties > 0, "weight": weight}
            found.append({**kept, **pair})
    return {name: [row[name] for row in found] for name in found[0]}
