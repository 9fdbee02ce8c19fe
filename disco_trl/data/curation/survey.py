"""
What is in a preference dataset, in figures: read row by row, kept as hashes and numbers, so that a million rows fit.

A `DataSurvey` takes records in and gives figures out. It knows nothing of files, of what is printed, or of pictures.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from ..columns import OVERALL, STRENGTH
from ..contents import text_of
from ..findings import ROWS_NAMED
from ..judgements import why_not_a_scale
from ..records import Record


QUANTILES = (0.0, 0.05, 0.5, 0.95, 0.99, 1.0)
SHORTEST_LEAK = 20
"""Characters after normalization from which an answer in two splits counts as a leak. ("Yes." is in all of them.)"""
DEFAULT_MAX_LENGTH = 1024
"""TRL's: longer pairs are left out of training."""


def normalize(text: str) -> str:
    """The text without case and punctuation, with single spaces and one way to write each letter."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def _hash(*parts: str) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return int.from_bytes(digest.digest(), "little")


def texts_of(record: Record) -> tuple[str, list[str]]:
    """
    What was asked, and the answers, each as one text.

    Where the answers hold the whole conversation, an answer begins with the first turn in which they differ, or is the
    last turn. Answers in plain text are taken as they are.

    Args:
        record ([`~disco_trl.data.records.Record`]):
            Record of a row.

    Returns:
        `tuple[str, list[str]]`: The prompt, empty if there is none, and the answers.
    """
    prompt, answers = record.prompt, record.answers
    if record.kind == "tokenized":
        return "", [" ".join(map(str, ids)) for ids in answers]
    if prompt is None and all(isinstance(answer, list) for answer in answers):
        same = len(list(takewhile(lambda turns: all(turn == turns[0] for turn in turns), zip(*answers, strict=False))))
        shared = min(same, *(len(answer) - 1 for answer in answers))
        prompt, answers = answers[0][:shared], [answer[shared:] for answer in answers]
    return _text(prompt or ""), list(map(_text, answers))


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(text_of(turn.get("content")) or str(turn.get("tool_calls") or "") for turn in content)


class Fingerprints:
    """Hashes of normalized prompts, answers and whole rows, which show what two datasets have in common."""

    def __init__(self) -> None:
        self.prompts, self.rows = array("Q"), array("Q")
        self.answers, self.rows_of_answers = array("Q"), array("Q")

    def add(self, prompt: str, answers: list[str], number: int) -> None:
        """
        Add a row.

        Args:
            prompt (`str`), answers (`list[str]`):
                What `texts_of` makes of its record.
            number (`int`):
                Its number in the dataset.
        """
        normal = list(map(normalize, answers))
        prompt = normalize(prompt)
        self.prompts.append(_hash(prompt) if prompt else 0)
        self.rows.append(_hash(prompt, *sorted(normal)))
        for answer in normal:
            if len(answer) >= SHORTEST_LEAK:
                self.answers.append(_hash(answer))
                self.rows_of_answers.append(number)

    def overlap(self, other: Fingerprints) -> dict[str, Any]:
        """
        What these rows have in common with those of another dataset.

        Args:
            other ([`Fingerprints`]):
                Fingerprints of the other dataset.

        Returns:
            `dict[str, dict]`: For `"prompt"`, `"answer"` and `"row"`, how many `rows` here have theirs among the
            other's, and the `first` of them.
        """
        prompts = _numbers(self.prompts)
        shared_prompts = np.isin(prompts, _numbers(other.prompts)) & (prompts != 0)
        shared_answers = np.isin(_numbers(self.answers), _numbers(other.answers))
        found = {
            "prompt": np.flatnonzero(shared_prompts),
            "answer": np.unique(_numbers(self.rows_of_answers)[shared_answers]),
            "row": np.flatnonzero(np.isin(_numbers(self.rows), _numbers(other.rows))),
        }
        return {
            name: {"rows": len(numbers), "first": numbers[:ROWS_NAMED].tolist()} for name, numbers in found.items()
        }


class RatingFigures:
    """Takes in the ratings of answers, and gives figures."""

    def __init__(self) -> None:
        self.values: Counter[float] = Counter()
        self.counts, self.means, self.deviations = array("Q"), array("d"), array("d")

    def add(self, ratings: Sequence[float]) -> None:
        """
        Take in an answer.

        Args:
            ratings (`Sequence[float]`):
                Its ratings, of which there is at least one.
        """
        self.values.update(ratings)
        self.counts.append(len(ratings))
        self.means.append(float(np.mean(ratings)))
        self.deviations.append(float(np.std(ratings, ddof=1)) if len(ratings) > 1 else np.nan)

    def figures(self) -> dict[str, Any]:
        """All figures, in types that JSON has."""
        counts, means, deviations = map(_numbers, (self.counts, self.means, self.deviations))
        several = counts > 1
        figures: dict[str, Any] = {
            "answers": len(counts),
            "of_an_answer": quantiles(counts),
            "answers_with_several": int(several.sum()),
            "values": {f"{value:.12g}": number for value, number in sorted(self.values.items())},
            "why_not_read": why_not_a_scale(self.values),
        }
        if several.sum() > 1:
            within = float(np.mean(deviations[several] ** 2))
            # The mean of an answer's ratings is off by within / count itself.
            between = float(np.var(means[several], ddof=1) - np.mean(deviations[several] ** 2 / counts[several]))
            figures["standard_deviation_of_an_answer"] = quantiles(deviations[several])
            figures["share_of_variance_between_answers"] = max(0.0, between) / (max(0.0, between) + within or 1.0)
        return figures


class AttributeFigures:
    """Takes in what rows say about one attribute, and gives figures."""

    def __init__(self) -> None:
        self.compared = 0
        self.ratings = RatingFigures()

    def add(self, record: Record, attribute: str) -> None:
        """
        Take in a row.

        Args:
            record ([`~disco_trl.data.records.Record`]):
                Its record.
            attribute (`str`):
                Name of the attribute.
        """
        self.compared += sum(one.people > 0 for one in record.comparisons if one.attribute == attribute)
        for ratings in filter(None, record.ratings(attribute)):
            self.ratings.add(ratings)

    def figures(self) -> dict[str, Any]:
        """All figures, in types that JSON has."""
        return {
            "compared_pairs": self.compared,
            **({"ratings": self.ratings.figures()} if self.ratings.counts else {}),
        }


class DataSurvey:
    """Takes in records of rows, one by one, and gives figures."""

    def __init__(self) -> None:
        self.fingerprints = Fingerprints()
        self.rows = 0
        self.terms: Counter[str] = Counter()
        self.identical = array("Q")
        # Characters of prompts and answers; tokens of each side, and of a row's longest
        self.lengths = {name: array("Q") for name in ("prompt", "chosen", "rejected", "ranked answers")}
        self.longest_side = array("Q")
        self.side_tokens = array("Q")
        # Pairs: their key, wins and losses of the side that comes first by its hash, and the row
        self.pair_keys, self.pair_rows = array("Q"), array("Q")
        self.wins, self.losses = array("d"), array("d")
        # 1 where that side is the chosen one, -1 where it is the rejected one, 0 where both are the same
        self.orientations = array("b")
        self.are_soft = array("b")
        # What people said
        self.votes = (array("d"), array("d"))
        self.probabilities = array("d")
        self.strengths: Counter[int] = Counter()
        self.strength_counts = array("Q")
        self.ratings = RatingFigures()
        # Besides the overall judgements, by attribute
        self.attributes: dict[str, AttributeFigures] = {}
        self.ranked = array("Q")
        # How many pairs, or answers, so many people judged: by what they were asked, and by their number
        self.asked: dict[str, Counter[int]] = {what: Counter() for what in ("votes", "grades", "ratings")}

    def add(self, record: Record, number: int, tokens: Sequence[int] | None = None) -> None:
        """
        Take in a row.

        Args:
            record ([`~disco_trl.data.records.Record`]):
                Its record.
            number (`int`):
                Its number in the dataset.
            tokens (`Sequence[int]`, *optional*):
                How many tokens each of its answers has, with the prompt.
        """
        self.rows += 1
        prompt, answers = texts_of(record)
        self.fingerprints.add(prompt, answers, number)
        if tokens is not None:
            self.side_tokens.extend(tokens)
            self.longest_side.append(max(tokens))
        for name in sorted(record.attributes - {OVERALL}):
            self.attributes.setdefault(name, AttributeFigures()).add(record, name)
        self.terms["weights"] += "weight" in record.said
        self.terms["margins"] += "margin" in record.said
        names = ["ranked answers"] * len(answers) if record.is_ranking else ["chosen", "rejected"]
        if record.kind != "tokenized":
            self.lengths["prompt"].append(len(prompt))
            for name, answer in zip(names, answers, strict=True):
                self.lengths[name].append(len(answer))
        if record.is_ranking:
            self.terms["rankings"] += 1
            self.terms["ranked ties"] += record.has_tie
            self.ranked.append(len(answers))
            # K ranked answers say no more than K - 1 comparisons that do not follow from each other.
            self.asked["votes"][1] += len(answers) - 1
        else:
            self._add_pair(record, number, prompt, answers)

    def _add_pair(self, record: Record, number: int, prompt: str, answers: list[str]) -> None:
        won, lost = self._compared(record)
        self.terms["pairs with several votes"] += won + lost >= 2
        self.asked["grades" if STRENGTH in record.said else "votes"][round(record.comparisons[0].people)] += 1
        if STRENGTH in record.said:
            self._add_strengths(record)
        hashes = [_hash(answer) for answer in answers]
        if hashes[0] == hashes[1]:
            self.identical.append(number)
        self.pair_keys.append(_hash(prompt, *(str(value) for value in sorted(hashes))))
        self.pair_rows.append(number)
        self.orientations.append((hashes[0] < hashes[1]) - (hashes[0] > hashes[1]))
        if hashes[0] > hashes[1]:
            won, lost = lost, won
        self.are_soft.append("preference_probability" in record.said)
        self.wins.append(won)
        self.losses.append(lost)

        if any(record.ratings()):
            self.terms["ratings"] += 1
            if record.said.isdisjoint(("chosen_votes", "preference_probability", STRENGTH, "tie")):
                self.terms["ratings with a forced choice"] += 1
        for values in filter(None, record.ratings()):
            self.ratings.add(values)
            self.asked["ratings"][len(values)] += 1

    def _add_strengths(self, record: Record) -> None:
        (comparison,) = record.comparisons
        self.strengths.update(comparison.strengths)
        self.strengths[0] += int(comparison.ties)
        self.strength_counts.append(int(comparison.people))

    def _compared(self, record: Record) -> tuple[float, float]:
        """Wins and losses of the chosen side, counted under the term of the likelihood that they belong to."""
        (comparison,) = record.comparisons
        won, lost = comparison.wins, comparison.losses
        if STRENGTH in record.said:
            self.terms["strengths"] += 1
            return won, lost
        if comparison.ties:
            self.terms["ties"] += 1
            return won, lost
        self.terms["ties refused"] += comparison.tie_allowed
        if "chosen_votes" in record.said:
            self.terms["votes" if won + lost else "not compared"] += 1
            if won + lost:
                self.votes[0].append(won)
                self.votes[1].append(lost)
        elif "preference_probability" in record.said:
            self.terms["soft labels"] += 1
            self.probabilities.append(won)
        else:
            self.terms["forced choices"] += 1
        return won, lost

    # Figures

    def figures(self) -> dict[str, Any]:
        """All figures, in types that JSON has. What the data do not have is left out."""
        figures: dict[str, Any] = {
            "rows": self.rows,
            "terms": {name: count for name, count in sorted(self.terms.items()) if count},
            "identical_sides": {"rows": len(self.identical), "first": self.identical[:ROWS_NAMED].tolist()},
            "repeated_pairs": self._repeated_pairs(),
            "characters": {name: quantiles(values) for name, values in self.lengths.items() if any(values)},
        }
        if self.side_tokens:
            longest = _numbers(self.longest_side)
            figures["tokens"] = {
                "of a prompt with an answer": quantiles(self.side_tokens),
                "rows_above_max_length": int((longest > DEFAULT_MAX_LENGTH).sum()),
                "max_length": DEFAULT_MAX_LENGTH,
            }
        if (longer := self._longer_is_chosen()) is not None:
            figures["longer_is_chosen"] = longer
        if self.votes[0]:
            votes = _numbers(self.votes[0]) + _numbers(self.votes[1])
            figures["votes"] = {
                "of a pair": quantiles(votes),
                "mean": float(votes.mean()),
                "several": int((votes > 1).sum()),
                "unanimous": int(((votes > 1) & (np.minimum(*map(_numbers, self.votes)) == 0)).sum()),
            }
        if self.probabilities:
            soft = _numbers(self.probabilities)
            figures["soft_labels"] = {
                "quantiles": quantiles(soft),
                "below_half": int((soft < 0.5).sum()),
                "between_0.4_and_0.6": float(np.mean((soft > 0.4) & (soft < 0.6))),
            }
        if self.strength_counts:
            values = {value: count for value, count in sorted(self.strengths.items()) if count}
            figures["strengths"] = {
                "of a pair": quantiles(self.strength_counts),
                "given": sum(self.strength_counts),
                "values": {str(value): count for value, count in values.items()},
                "levels": max(map(abs, values)),
            }
        if self.ratings.counts:
            figures["ratings"] = self.ratings.figures()
        if self.attributes:
            figures["attributes"] = {name: self.attributes[name].figures() for name in sorted(self.attributes)}
        unread = figures.get("ratings", {}).get("why_not_read")
        figures["asked"] = {
            what: {str(people): count for people, count in sorted(counts.items()) if people}
            for what, counts in self.asked.items()
            if not (what == "ratings" and unread)
        }
        if self.ranked:
            figures["rankings"] = {"answers": quantiles(self.ranked), "with_ties": self.terms["ranked ties"]}
        return figures

    def _repeated_pairs(self) -> dict[str, Any]:
        """Pairs in several rows or with several votes: how often they are judged both ways, and what that means."""
        differ = _numbers(self.orientations) != 0
        keys, rows, won, lost, soft = (
            _numbers(values)[differ]
            for values in (self.pair_keys, self.pair_rows, self.wins, self.losses, self.are_soft)
        )
        if not len(keys):
            return {"rows": 0}
        _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        wins, losses, has_soft = (np.bincount(inverse, weights=values) for values in (won, lost, soft))
        # By what each row says on the whole: the votes of one row differ without contradicting another's.
        prefers = np.sign(won - lost)
        up = np.bincount(inverse, weights=prefers > 0) > 0
        down = np.bincount(inverse, weights=prefers < 0) > 0
        repeated = np.setdiff1d(np.arange(len(rows)), first)
        both_ways = np.flatnonzero((up & down)[inverse])
        figures: dict[str, Any] = {
            "pairs": int((counts > 1).sum()),
            "rows": len(repeated),
            "first": rows[repeated][:ROWS_NAMED].tolist(),
            "judged_both_ways": int((up & down).sum()),
            "judged_both_ways_first": rows[both_ways][:ROWS_NAMED].tolist(),
        }
        judged = wins + losses
        several = (judged >= 2) & (has_soft == 0)
        if several.any():
            a, b, n = wins[several], losses[several], judged[several]
            agreement = float(np.mean((a * (a - 1) + b * (b - 1)) / (n * (n - 1))))
            figures["judged_several_times"] = int(several.sum())
            figures["agreement"] = agreement
            # Of a pair whose better side wins with probability q, two judgements agree with 1 - 2q(1 - q); q is
            # concave in that, so the mean of q over pairs is at most this (Jensen).
            figures["best_accuracy_on_single_judgements"] = float((1 + max(0.0, 2 * agreement - 1) ** 0.5) / 2)
        return figures

    def preference_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """
        Lengths of the answers of all N pairs in which one was preferred.

        Returns:
            `tuple[np.ndarray, np.ndarray]` of shape `(N,)` each: Characters of the preferred and of the other answer.
        """
        if not self.lengths["chosen"]:
            return np.empty(0), np.empty(0)
        chosen, rejected = _numbers(self.lengths["chosen"]), _numbers(self.lengths["rejected"])
        prefers = np.sign(_numbers(self.wins) - _numbers(self.losses)) * _numbers(self.orientations)
        preferred = np.where(prefers > 0, chosen, rejected)
        other = np.where(prefers > 0, rejected, chosen)
        return preferred[prefers != 0], other[prefers != 0]

    def _longer_is_chosen(self) -> dict[str, Any] | None:
        preferred, other = self.preference_lengths()
        differ = preferred != other
        if not differ.any():
            return None
        share = float(np.mean(preferred[differ] > other[differ]))
        pairs = int(differ.sum())
        return {"share": share, "pairs": pairs, "standard_error": float((share * (1 - share) / pairs) ** 0.5)}


def quantiles(values: Iterable[float]) -> dict[str, float]:
    """The quantiles that are reported, by their name."""
    numbers = np.quantile(_numbers(values), QUANTILES)
    names = ("min", *(f"{100 * q:g} %" for q in QUANTILES[1:-1]), "max")
    return {name: round(float(number), 4) for name, number in zip(names, numbers, strict=True)}


def _numbers(values: Any) -> np.ndarray:
    return np.asarray(values)
