"""
Controls of a comparison: what Bradley–Terry is made into, so that a difference can be attributed to its cause.

A variant of disco differs from TRL's Bradley–Terry in several ways at once. Each control has one of them, and the
likelihood stays Bradley–Terry's, the logistic family with every scale at 1/√2:

- `bradley-terry-epistemic` knows the error of its locations, by the posterior of the last layer;
- `bradley-terry-ensemble` knows it as well, by the spread of several models that differ in their seed;
- `bradley-terry-soft` reads how much better an answer was said to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, Value

from ..data.columns import OVERALL, STRENGTH, VOTES
from ..data.judgements import survey
from ..data.records import read_feedback
from ..data.values import BadRow, Row
from ..distributions.reward_distribution import RewardDistribution


BRADLEY_TERRY = "bradley-terry"
SIGN, GRADES = "sign", "grades"
CONTROLS: dict[str, dict[str, Any]] = {
    BRADLEY_TERRY: {},
    f"{BRADLEY_TERRY}-epistemic": {"epistemic": True},
    f"{BRADLEY_TERRY}-ensemble": {"members": 4},
    f"{BRADLEY_TERRY}-soft": {"labels": GRADES},
}
"""What defines Bradley–Terry, which the others are compared with, and each control. All but the first can be given
settings of their own, and each other's as well. `members` and `labels` are fields of
[`~disco_trl.evaluation.compare_run.Run`], the others of [`DiscoRewardConfig`]."""

STRONGEST = 3.0
"""Log-odds that the strongest grade stands for in [`soft_labels`], about 20 to 1."""


def soft_labels(levels: int) -> list[float]:
    """
    The probability that each grade stands for if nothing else is known: sigmoid(3 k / L) for grade k of L.

    It is meant as the probability that somebody else prefers the same answer. A model that is trained on it forecasts
    people's votes as one that is trained on the votes does, with less noise in what it learns from.

    Args:
        levels (`int`):
            Number L of grades.

    Returns:
        `list[float]`: L probabilities above ½, the weakest grade first. Three grades are 0.73, 0.88 and 0.95.
    """
    return [1 / (1 + math.exp(-STRONGEST * grade / levels)) for grade in range(1, levels + 1)]


def check_labels(train: Dataset, labels: str | Sequence[float]) -> None:
    """
    Checks that a dataset has the grades that labels are for.

    Args:
        train ([`~datasets.Dataset`]):
            Preference dataset.
        labels (`str` or `Sequence[float]`):
            As in [`with_soft_labels`].

    Raises:
        `ValueError`: If it has none.
    """
    if labels != SIGN and STRENGTH not in train.column_names:
        raise ValueError(
            f"train dataset: labels={labels} are for the column {STRENGTH!r}, which it does not have; leave out the "
            "variant of Bradley–Terry that reads it"
        )


def check_judged(train: Dataset, base: str) -> None:
    """
    Checks that there is something for a variant to learn from.

    Args:
        train ([`~datasets.Dataset`]):
            Preference dataset.
        base (`str`):
            One of [`CONTROLS`], which read overall judgements only, or the name of a family.

    Raises:
        `ValueError`: If all judgements are about attributes, which Bradley–Terry and its controls do not read.
    """
    found = survey(train) if base in CONTROLS else None
    if found is not None and found.attributes and not (found.has_comparisons or found.ratings):
        raise ValueError(
            f"{base} learns from overall judgements, and all of the training data are about "
            f"{', '.join(map(repr, found.attributes))}; leave it out of --variants"
        )


def with_soft_labels(train: Dataset, labels: str | Sequence[float] = SIGN, by_vote: bool = False) -> Dataset:
    """
    Expresses ties and strengths of preference as soft labels, P(chosen ≻ rejected).

    A tie is ½. The label of several people's strengths is the mean of theirs. Other rows are left as they are:
    forced choices, votes, ratings, and rankings, whose equal ranks stay ties.

    Args:
        train ([`~datasets.Dataset`]):
            Preference dataset.
        labels (`str` or `Sequence[float]`, *optional*, defaults to `"sign"`):
            Label of each grade, the weakest first. `"sign"` makes each grade a forced choice, and `"grades"` stands
            for those of [`soft_labels`].
        by_vote (`bool`, *optional*, defaults to `False`):
            Whether a label weighs as much as the people it is the mean of, rather than 1.

    Returns:
        [`~datasets.Dataset`]: The rows, with `preference_probability` in the place of `tie` and
            `preference_strength`.

    Raises:
        `ValueError`: If a row cannot be read (it is named with column and fix), if there is no label for a grade, or
            if grades are to be read and the dataset has none.
    """
    read = [name for name in ("tie", STRENGTH) if name in train.column_names]
    check_labels(train, labels)
    if not read:
        return train
    levels = max(survey(train).strengths, default=1)
    if isinstance(labels, str):
        table = [1.0] * levels if labels == SIGN else soft_labels(levels)
    else:
        table = list(labels)
    if len(table) < levels:
        raise ValueError(
            f"train dataset, column {STRENGTH!r}: a preference of strength {levels}, and labels={labels} has "
            f"{len(table)} grades; give a label for each"
        )

    def label(row: Row, index: int) -> Row:
        try:
            feedback = read_feedback(row)
        except BadRow as error:
            raise ValueError(f"train dataset, row {index}, {error}") from error
        said, graded = feedback.comparisons[0], STRENGTH in feedback.said
        weight = {"weight": said.weight} if by_vote else {}
        if feedback.is_ranking or said.attribute != OVERALL or not (graded or said.ties):
            return {"preference_probability": row.get("preference_probability"), **weight}
        # A strength k stands for P(chosen ≻ rejected), and −k for P(rejected ≻ chosen).
        won = sum(table[k - 1] if k > 0 else 1 - table[-k - 1] for k in said.strengths)
        share = (won + said.ties / 2) / said.people
        if by_vote:
            weight = {"weight": said.weight * said.people}
        # Votes of 0 and 0 may stand beside a tie, and not beside a soft label.
        return {"preference_probability": share, **dict.fromkeys({*VOTES} & row.keys()), **weight}

    features = train.features.copy()
    for name in read:
        del features[name]
    # Named, as it could not be inferred from first rows that have no label.
    features["preference_probability"] = Value("float64")
    if by_vote:
        features["weight"] = Value("float64")
    return train.map(label, with_indices=True, remove_columns=read, features=features, desc="Labels of Bradley-Terry")


def ensemble(members: Sequence[RewardDistribution]) -> RewardDistribution:
    """
    The rewards of an ensemble: the mean of its members, with their spread as the error of the location.

    With `error_factor` the error of a difference is exactly the standard deviation, over the members, of the
    difference of their locations, so that what members have in common cancels. P(a ≻ b) takes that error as normal,
    and is close to the mean of the members' probabilities (B. Lakshminarayanan et al., 2017).

    Args:
        members (`Sequence[RewardDistribution]`):
            Rewards of the same N answers by each of n ≥ 2 models that share one constant scale, of shape `(N,)`.

    Returns:
        [`RewardDistribution`]: Rewards of shape `(N,)`, with a `location_error` and an `error_factor` of shape
            `(N, n)`.
    """
    locations = torch.stack([member.location.double() for member in members], dim=-1)  # [N, n]
    # The likelihood leaves the shift of each member free, and its differences would count as an error.
    locations = locations - locations.mean(dim=0) + locations.mean()
    location = locations.mean(dim=-1)
    factor = (locations - location[:, None]) / math.sqrt(len(members) - 1)
    return RewardDistribution(
        location.to(members[0].location),
        members[0].scale,
        members[0].kind,
        location_error=factor.norm(dim=-1).to(members[0].location),
        error_factor=factor.to(members[0].location),
    )
