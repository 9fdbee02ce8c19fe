"""Preference pairs kept, dropped or flipped by what a reward model thinks of their labels: `disco-trl filter`.

The rules look at two numbers of a pair: p, the probability that the model gives to its label, P(chosen ≻ rejected),
and its scale, the larger one of its two answers. They apply in this order, and a pair counts under the first that
drops it:

====================  =============================  ===============================================================
rule                  what it does                   why
====================  =============================  ===============================================================
``flip_below``        p < it: swap the two answers   the label is probably a slip; p of the pair is 1 - p from here
``min_prob``          p < it: drop                   the label is doubtful
``max_prob``          p > it: drop                   the model knows the pair already
``max_scale``         scale > it: drop               people disagree about an answer
====================  =============================  ===============================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..data.columns import PAIRS, TEXT_PAIR, VOTES
from ..data.files import refuse_clash
from ..data.values import Row


@dataclass(frozen=True)
class Rules:
    """
    What to do with a pair. A rule that is None is not applied.

    Args:
        flip_below (`float`, *optional*):
            Swap the answers of pairs with a p below this, at most 0.5.
        min_prob (`float`, *optional*):
            Drop pairs with a p below this.
        max_prob (`float`, *optional*):
            Drop pairs with a p above this.
        max_scale (`float`, *optional*):
            Drop pairs with a scale above this, in units of reward.

    Raises:
        `ValueError`: If no rule is given, or if one is out of its domain or can never apply.
    """

    flip_below: float | None = None
    min_prob: float | None = None
    max_prob: float | None = None
    max_scale: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise ValueError("no rule is given, so every pair would be kept; give at least one")
        # Written so that nan, which no comparison is true of, is refused as well.
        domains = {
            "flip_below": (0, 0.5, "above 0 and at most 0.5: above that the model agrees with the label"),
            "min_prob": (0, 1, "above 0 and at most 1"),
            "max_prob": (0, 1, "above 0 and at most 1"),
            "max_scale": (0, math.inf, "above 0"),
        }
        for name, value in given.items():
            low, high, domain = domains[name]
            if not low < value <= high:
                raise ValueError(f"{name}={value!r} must be {domain}")
        if (self.min_prob or 0) >= (self.max_prob or math.inf):
            raise ValueError(
                f"min_prob={self.min_prob!r} must be below max_prob={self.max_prob!r}, or nothing is left"
            )

    def dropped_by(self, prob: float, scale: float) -> str | None:
        """
        The rule that drops a pair.

        Args:
            prob (`float`):
                Its p, after any flip.
            scale (`float`):
                Its scale.

        Returns:
            `str` or `None`: Name of the rule, or None if the pair is kept.
        """
        if self.min_prob is not None and prob < self.min_prob:
            return "min_prob"
        if self.max_prob is not None and prob > self.max_prob:
            return "max_prob"
        if self.max_scale is not None and scale > self.max_scale:
            return "max_scale"
        return None


@dataclass
class Report:
    """How many pairs were read, kept (`flipped` of them with their answers swapped), and dropped by each rule."""

    read: int = 0
    kept: int = 0
    flipped: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"read     {self.read:9,}"]
        lines += [f"dropped  {count:9,}  by {rule}" for rule, count in self.dropped.items()]
        return "\n".join([*lines, f"kept     {self.kept:9,}  ({self.flipped:,} of them flipped)"])


class PairFilter:
    """
    Applies rules to scored pairs and counts what they did.

    Args:
        rules ([`Rules`]):
            The rules.
        columns (`list[str]`):
            Columns of the data, scores among them.
        prefix (`str`, *optional*, defaults to `""`):
            What was put before the names of the scores.

    Raises:
        `ValueError`: If the rows are not pairs, have no scores, or cannot be flipped.
    """

    def __init__(self, rules: Rules, columns: list[str], prefix: str = ""):
        self.rules = rules
        self.report = Report(
            dropped={name: 0 for name, value in vars(rules).items() if value and name != "flip_below"}
        )
        if not any({*pair} <= {*columns} for pair in PAIRS):
            raise ValueError(
                f"columns 'chosen' and 'rejected': missing (there are {', '.join(map(repr, columns))}); only pairs "
                "can be filtered"
            )
        self.prob = f"{prefix}prob_chosen"
        self.scales = [f"{prefix}scale_{side}" for side in TEXT_PAIR]
        missing = [name for name in (self.prob, *self.scales) if name not in columns]
        if missing:
            raise ValueError(
                f"column {' and '.join(map(repr, missing))}: missing, the pairs are not scored; pass "
                "--model_name_or_path, or score them first with `disco-trl score` (and --prefix here if it was given "
                "there)"
            )
        # By name, so that other people's scores of the two answers stay with them: chosen_rating, score_rejected.
        others = {name: name.replace("chosen", "rejected") for name in columns if "chosen" in name}
        self.swaps = {one: other for one, other in others.items() if other in columns}
        if rules.flip_below is not None:
            refuse_clash(columns, ["flipped"], "rename it in the data")
            sided = {"margin", *VOTES, "preference_probability", "tie"} & {*columns}
            if sided:
                raise ValueError(
                    f"column {min(sided)!r}: says how the chosen answer compares with the rejected one, which is "
                    "wrong for a pair that is flipped; remove it, or leave out flip_below"
                )

    def __call__(self, rows: list[Row], first: int = 0) -> list[Row]:
        """
        Filter some rows.

        Args:
            rows (`list[dict]`):
                Scored pairs.
            first (`int`, *optional*, defaults to `0`):
                Position of the first of them in the data, for messages.

        Returns:
            `list[dict]`: The rows that are kept, in order.
        """
        kept = []
        for number, row in enumerate(rows, start=first):
            prob, scale = self._number(row, self.prob, number), self.scale(row, number)
            self.report.read += 1
            if self.rules.flip_below is not None:
                is_flipped = prob < self.rules.flip_below
                if is_flipped:
                    prob = 1 - prob
                    row = row | self._swapped(row) | {self.prob: prob}
                row = row | {"flipped": is_flipped}
            rule = self.rules.dropped_by(prob, scale)
            if rule is not None:
                self.report.dropped[rule] += 1
                continue
            self.report.kept += 1
            self.report.flipped += row.get("flipped") is True and self.rules.flip_below is not None
            kept.append(row)
        return kept

    def scale(self, row: Row, number: int) -> float:
        """The larger scale of the two answers of a pair, in units of reward."""
        return max(self._number(row, name, number) for name in self.scales)

    def _swapped(self, row: Row) -> Row:
        return {one: row[other] for one, other in self.swaps.items()} | {
            other: row[one] for one, other in self.swaps.items()
        }

    def _number(self, row: Row, column: str, number: int) -> float:
        value = row[column]
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                f"row {number}, column {column!r}: {value!r} is not a finite number; score the data again"
            )
        return value
