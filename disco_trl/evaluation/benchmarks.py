"""
Test sets of reward models, as they are published, and what each of them makes of a model's rewards.

A row of a test set becomes an [`Item`]: a record, as a row of a preference dataset is one, and the part of the data
that it belongs to. So everything is evaluated by the same code. A [`Benchmark`] also has figures of its own (sections,
styles, best of several), which are functions of the items' rewards alone.

Columns, sections, weights and what equal rewards count are those of the benchmarks' own code: RewardBench (N. Lambert
et al., 2024, arXiv 2403.13787), RewardBench 2 (S. Malik et al., 2025, arXiv 2506.01937), RM-Bench (Y. Liu et al.,
2024, arXiv 2410.16184), JudgeBench (S. Tan et al., 2024, arXiv 2410.12784), LLMBar (Z. Zeng et al., 2023, arXiv
2310.07641).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..data.columns import Layout, find_layout
from ..data.curation.cells import first_of
from ..data.curation.formats import FORMATS
from ..data.curation.transcripts import prompt_messages
from ..data.records import Comparison, Record, read_record
from ..data.values import BadRow, Row, as_number, is_missing, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Item(Record):
    """
    A record with a name and a place in the data.

    Args:
        subset (`str`, *optional*, defaults to `""`):
            Part of the data that it belongs to.
        name (`str`, *optional*, defaults to `""`):
            The row's own id, if it has one.
    """

    subset: str = ""
    name: str = ""


Rewards = Sequence[np.ndarray]
"""The location of each answer, item by item: arrays of shape `(K,)`."""


@dataclass(frozen=True)
class Benchmark:
    """
    A published test set.

    Args:
        title (`str`):
            Its name.
        recognise (`Callable[[Row], bool]`):
            Whether a row is one of its.
        read (`Callable[[Row], Item]`):
            The item of a row. It raises [`~disco_trl.data.values.BadRow`] if something is missing.
        summarize (`Callable[[Sequence[Item], Rewards, np.ndarray], dict[str, float]]`):
            Its own figures, of the items, their rewards and the weight of each item, of shape `(items,)`.
    """

    title: str
    recognise: Callable[[Row], bool]
    read: Callable[[Row], Item]
    summarize: Callable[[Sequence[Item], Rewards, np.ndarray], dict[str, float]]


def _dialogues(row: Row, answers: Sequence[Any], prompt: str = "prompt") -> list[list[dict[str, Any]]]:
    """Each answer after the prompt in a column, as a conversation."""
    messages = prompt_messages("prompt", _text(row, prompt))
    return [[*messages, {"role": "assistant", "content": answer}] for answer in answers]


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value:
        raise BadRow(column, f"{shown(value)} where a text should be", "fill it in, or drop the row")
    return value


def _texts(row: Row, column: str, count: int | None = None) -> list[str]:
    value = row.get(column)
    whole = isinstance(value, list) and value and all(isinstance(text, str) and text for text in value)
    if not whole or (count is not None and len(value) != count):  # type: ignore[arg-type]
        wanted = f"{count} answers" if count else "answers"
        raise BadRow(column, f"{shown(value)} where a list of {wanted} should be", "fill it in, or drop the row")
    return value  # type: ignore[return-value]


def _average(values: ArrayLike, weights: ArrayLike) -> float:
    total = float(np.sum(weights))
    return float(np.dot(values, weights)) / total if total > 0 else math.nan


def _mean_of(figures: dict[str, float], names: Sequence[str]) -> float:
    present = [figures[name] for name in names if name in figures]
    return float(np.mean(present)) if present else math.nan


def _by_subset(items: Sequence[Item]) -> dict[str, list[int]]:
    members: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        members.setdefault(item.subset, []).append(index)
    return members


def _all_between(right: int, wrong: int) -> list[Comparison]:
    """Each of the first so many answers against each of the others, and better than it."""
    return [Comparison(better, right + worse) for better, worse in product(range(right), range(wrong))]


# RewardBench


REWARD_BENCH_SECTIONS = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
        "xstest-should-respond": 250, "donotanswer": 136,
    },
    # The 447 pairs of math weigh as much as the 984 of code.
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
        "hep-rust": 164,
    },
}  # fmt: skip
"""What each subset weighs in its section (`EXAMPLE_COUNTS` of allenai/reward-bench; since September 2024 XSTest has
these weights)."""


def _is_reward_bench(row: Row) -> bool:
    return {"prompt", "chosen", "rejected", "subset", "chosen_model"} <= row.keys()


def _read_reward_bench(row: Row) -> Item:
    answers = _dialogues(row, [_text(row, side) for side in ("chosen", "rejected")])
    return Item(answers=answers, subset=_text(row, "subset"), name=str(row.get("id", "")))


def _summarize_reward_bench(items: Sequence[Item], rewards: Rewards, weight: np.ndarray) -> dict[str, float]:
    # Equal rewards are wrong. The score is the mean of the sections, without the prior sets.
    right = np.array([float(of_item[0] > of_item[1]) for of_item in rewards])
    of_subset = {name: _average(right[members], weight[members]) for name, members in _by_subset(items).items()}
    figures = {}
    for section, weights in REWARD_BENCH_SECTIONS.items():
        present = [name for name in weights if name in of_subset]
        if present:
            figures[section] = _average([of_subset[name] for name in present], [weights[name] for name in present])
    return figures | {"score": _mean_of(figures, list(figures))}


# RewardBench 2


def _is_reward_bench_2(row: Row) -> bool:
    return {"prompt", "chosen", "rejected", "subset", "num_correct"} <= row.keys()


def _read_reward_bench_2(row: Row) -> Item:
    chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
    return Item(
        answers=_dialogues(row, [*chosen, *rejected]),
        comparisons=_all_between(len(chosen), len(rejected)),
        subset=_text(row, "subset"),
        name=str(row.get("id", "")),
    )


def _right_answers(item: Item) -> int:
    return max(comparison.first for comparison in item.comparisons) + 1


def _summarize_reward_bench_2(items: Sequence[Item], rewards: Rewards, weight: np.ndarray) -> dict[str, float]:
    figures = {}
    for subset, members in _by_subset(items).items():
        if subset.lower() == "ties":
            figures[subset] = _ties_score([items[m] for m in members], [rewards[m] for m in members], weight[members])
        else:
            # The right answer, the first one, shares the credit with those that have the same reward.
            best = [np.mean(np.flatnonzero(of == of.max()) == 0) for of in (rewards[member] for member in members)]
            figures[subset] = _average(best, weight[members])
    return figures | {"score": _mean_of(figures, list(figures))}


def _ties_score(items: Sequence[Item], rewards: Rewards, weight: np.ndarray) -> float:
    """
    Of questions with one right answer (`ref:N`) and with several (`tied:N`): is every right answer above every wrong
    one, and do the right ones differ by less than that?
    """
    is_right: dict[str, dict[str, float]] = {"ref": {}, "tied": {}}
    gap: dict[str, dict[str, float]] = {"ref": {}, "tied": {}}
    spread: dict[str, float] = {}
    weights: dict[str, dict[str, float]] = {"ref": {}, "tied": {}}
    for item, of_item, of_weight in zip(items, rewards, weight, strict=True):
        kind, _, number = item.name.partition(":")
        if kind not in gap:
            raise BadRow("id", f"{shown(item.name)} of a row of Ties", "it has to begin with ref: or tied:")
        right, wrong = np.split(of_item, [_right_answers(item)])
        gap[kind][number] = float(right.min() - wrong.max())
        is_right[kind][number] = float(gap[kind][number] > 0)
        weights[kind][number] = of_weight
        if kind == "tied":
            spread[number] = float(right.max() - right.min())
    score = sum(
        0.3 * _average([*is_right[kind].values()], [*weights[kind].values()]) for kind in gap if is_right[kind]
    )
    both = [number for number in spread if number in gap["ref"]]
    if both:
        tied, hard, apart = (
            np.array([values(number) for number in both])
            for values in (
                lambda number: gap["tied"][number],
                lambda number: min(gap["ref"][number], gap["tied"][number]),
                lambda number: spread[number],
            )
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            margin = np.nan_to_num(np.tanh(hard / apart - 1))
        of_both = [weights["tied"][number] for number in both]
        for share, values in ((0.2, tied > apart), (0.2, hard > apart), (0.01, margin)):
            score += share * _average(values.astype(float), of_both)
    return score


# RM-Bench


STYLES = ("concise", "detailed", "markdown")


def _is_rm_bench(row: Row) -> bool:
    return {"prompt", "chosen", "rejected", "domain"} <= row.keys() and isinstance(row["chosen"], list)


def _read_rm_bench(row: Row) -> Item:
    chosen, rejected = _texts(row, "chosen", len(STYLES)), _texts(row, "rejected", len(STYLES))
    return Item(
        answers=_dialogues(row, [*chosen, *rejected]),
        comparisons=_all_between(len(STYLES), len(STYLES)),
        subset=_text(row, "domain"),
        name=str(row.get("id", "")),
    )


def _summarize_rm_bench(items: Sequence[Item], rewards: Rewards, weight: np.ndarray) -> dict[str, float]:
    right = np.stack([of_item[: len(STYLES), None] > of_item[None, len(STYLES) :] for of_item in rewards])
    upper = np.triu_indices(len(STYLES), 1)
    # Hard: the right answer is the plainer one. Easy: it is the fancier one.
    styles = {
        "hard": right[:, upper[0], upper[1]].mean(axis=1),
        "normal": np.diagonal(right, axis1=1, axis2=2).mean(axis=1),
        "easy": right[:, upper[1], upper[0]].mean(axis=1),
    }
    # The items of both sides of safety are one domain. Equal rewards are wrong.
    of_domain: dict[str, list[int]] = {}
    for domain, members in _by_subset(items).items():
        of_domain.setdefault(domain.split("-")[0], []).extend(members)
    table = np.array([[_average(values[of], weight[of]) for values in styles.values()] for of in of_domain.values()])
    figures = dict(zip(of_domain, table.mean(axis=1).tolist(), strict=True))
    return figures | dict(zip(styles, table.mean(axis=0).tolist(), strict=True)) | {"score": float(table.mean())}


# JudgeBench and LLMBar


JUDGE_BENCH_CATEGORIES = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}


def _is_judge_bench(row: Row) -> bool:
    return {"question", "response_A", "response_B", "label"} <= row.keys()


def _read_judge_bench(row: Row) -> Item:
    said = {
        "A>B": Comparison(0, 1),
        "B>A": Comparison(0, 1, wins=0.0, losses=1.0),
        "A=B": Comparison(0, 1, wins=0.0, ties=1.0, tie_allowed=True),
    }
    label = _text(row, "label")
    if label not in said:
        raise BadRow("label", shown(label), f"it has to be one of {', '.join(said)}")
    source = str(row.get("source", ""))
    subset = next((name for start, name in JUDGE_BENCH_CATEGORIES.items() if source.startswith(start)), source)
    answers = _dialogues(row, [_text(row, name) for name in ("response_A", "response_B")], "question")
    return Item(answers=answers, comparisons=[said[label]], subset=subset, name=str(row.get("pair_id", "")))


def _is_llm_bar(row: Row) -> bool:
    return {"input", "output_1", "output_2", "label"} <= row.keys()


def _read_llm_bar(row: Row) -> Item:
    label = as_number(row["label"])
    if label not in (1, 2):
        raise BadRow("label", shown(row["label"]), "it has to be 1 or 2")
    answers = _dialogues(row, [_text(row, name) for name in ("output_1", "output_2")], "input")
    subset = row.get("subset")
    said = Comparison(0, 1, wins=float(label == 1), losses=float(label == 2))
    return Item(answers=answers, comparisons=[said], subset="" if is_missing(subset) else str(subset))


def _summarize_judge_bench(items: Sequence[Item], rewards: Rewards, weight: np.ndarray) -> dict[str, float]:
    """The share of pairs that are decided as labelled. Equal rewards decide for B, and no reward model for A=B."""
    decided = [float(of_item[0] > of_item[1]) for of_item in rewards]
    right = [float(item.comparisons[0].target == share) for item, share in zip(items, decided, strict=True)]
    return _by_subset_and_over_all(items, right, weight)


def _summarize_llm_bar(items: Sequence[Item], rewards: Rewards, weight: np.ndarray) -> dict[str, float]:
    """The share of pairs that are decided as labelled, on average over both orders of the answers: equal ratings
    decide for the second, so that they are right in one of the two.
    """
    decided = [0.5 + 0.5 * np.sign(of_item[0] - of_item[1]) for of_item in rewards]
    right = [1 - abs(item.comparisons[0].target - share) for item, share in zip(items, decided, strict=True)]
    return _by_subset_and_over_all(items, right, weight)


def _by_subset_and_over_all(items: Sequence[Item], right: Sequence[float], weight: np.ndarray) -> dict[str, float]:
    members = _by_subset(items)
    figures = {name: _average(np.array(right)[of], weight[of]) for name, of in members.items() if name}
    return figures | {"score": _average(right, weight)}


# Any preference dataset


def read_preference(row: Row, layout: Layout | None = None) -> Item:
    """
    The item of a row of a preference dataset.

    Args:
        row (`dict`):
            Row of any type that TRL documents, or a ranking, with judgements or without.
        layout ([`~disco_trl.data.columns.Layout`], *optional*):
            Layout of the dataset, by default that of the row.

    Returns:
        [`Item`]: The item.

    Raises:
        [`~disco_trl.data.values.BadRow`]: If something is wrong with the row.
    """
    record = read_record(row, layout or find_layout(row))
    subset = str(row[name]) if (name := first_of(row, ("subset", "category", "domain", "source"))) else ""
    return Item(**{field.name: getattr(record, field.name) for field in fields(record)}, subset=subset)


BENCHMARKS = {
    "reward-bench": Benchmark("RewardBench", _is_reward_bench, _read_reward_bench, _summarize_reward_bench),
    "reward-bench-2": Benchmark("RewardBench 2", _is_reward_bench_2, _read_reward_bench_2, _summarize_reward_bench_2),
    "rm-bench": Benchmark("RM-Bench", _is_rm_bench, _read_rm_bench, _summarize_rm_bench),
    "judge-bench": Benchmark("JudgeBench", _is_judge_bench, _read_judge_bench, _summarize_judge_bench),
    "llm-bar": Benchmark("LLMBar", _is_llm_bar, _read_llm_bar, _summarize_llm_bar),
}
"""By name. Rows of a preference dataset are of none of them."""

PREFERENCES = "preferences"
"""The kind of rows that training takes."""
KINDS = (PREFERENCES, *BENCHMARKS, *(name for name in FORMATS if name != "ratings"))
"""What rows may be: those of training, of a benchmark, or of a format that `disco-trl data convert` reads."""
