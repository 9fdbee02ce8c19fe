"""What a dataset can teach about the scale, and what to ask people next: data on one side, planning on the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..simulation.information import Precision
from ..simulation.spending import Ask, Outlook, ways_to_spend


JUDGEMENTS = 1000
"""Number of further comparisons that advice is given for."""
MOST_LEVELS = 5
"""Most strengths that are told apart: a scale of more tells little more."""
PEOPLE = (1, 2, 3, 5, 10)
"""Numbers of people whose answers are planned with. In between, the lower one counts."""
WORLD = "64 features, log σ differs by 0.5 between texts, half a unit of a location is not learned"


def scale_advice(asked: Mapping[str, Mapping[str, int]], levels: int | None = None) -> dict[str, Any]:
    """
    Tell what judgements are expected to teach about the scale, and how the next thousand would be spent best.

    Args:
        asked (`Mapping[str, Mapping[str, int]]`):
            By `"votes"`, `"grades"` and `"ratings"`, how many pairs, or answers, how many people judged, as
            [`~disco_trl.data.curation.survey.DataSurvey.figures`] has it.
        levels (`int`, *optional*):
            Number of strengths of the grades, if there are any.

    Returns:
        `dict[str, Any]`: In types that JSON has: `advice`, a list of sentences; what is `expected` of the data as they
        are; and of `next` ways to spend `judgements` further comparisons, each with `what` is asked and its
        `rank_correlation` and `scale_error`; and the `world` that this is computed in.
    """
    outlook = Outlook(levels=min(levels or 3, MOST_LEVELS))
    at_hand: Counter[Ask] = Counter()
    for what, counts in asked.items():
        for people, count in counts.items():
            at_hand[Ask(what, max(known for known in PEOPLE if known <= int(people)))] += count  # type: ignore[arg-type]
    expected = outlook.expected(at_hand)
    return {
        "advice": _advice(asked, expected),
        "expected": _figures(expected),
        "judgements": JUDGEMENTS,
        "next": [{"what": way.what, **_figures(way.expected)} for way in ways_to_spend(outlook, JUDGEMENTS, at_hand)],
        "world": WORLD,
    }


def _figures(precision: Precision) -> dict[str, float]:
    return {
        "rank_correlation": round(precision.scale_spearman, 3),
        "scale_error": round(precision.scale_error, 3),
    }


def _advice(asked: Mapping[str, Mapping[str, int]], expected: Precision) -> list[str]:
    graded = sum(int(people) * count for people, count in asked.get("grades", {}).items())
    rated = sum(count for people, count in asked.get("ratings", {}).items() if int(people) > 1)
    sources = [
        f"{count:,} {what}"
        for count, what in ((graded, "graded comparisons"), (rated, "answers with several ratings"))
        if count
    ]
    if not sources:
        return [
            "votes alone: the scale will very probably be constant. Ask how much better an answer is",
            "(preference_strength), or for 3 to 5 ratings of a tenth of the answers",
        ]
    source = " and ".join(sources)
    if expected.scale_spearman < 0.3:
        return [f"{source}: too few for a scale that can be relied on"]
    return [f"a scale can be learned, from {source}"]
