"""The likelihood of people's ratings according to a model: a proper score of location, scale and thresholds together.

What flows: rewards of answers, thresholds between ratings → the log-probability of one person's rating → means over
people, for each answer and over all.
"""

from __future__ import annotations

import numpy as np
import torch

from ..distributions.numerics import to_float64
from ..distributions.ratings import rating_log_likelihood
from .bootstrap import resamples
from .figures import Figure
from .held_out import HeldOut
from .scored import Scored


ROWS_AT_ONCE = 4096


def why_unread(scored: Scored, held_out: HeldOut) -> str | None:
    """Why the ratings of answers have no likelihood, if they have none.

    Args:
        scored ([`~disco_trl.evaluation.scored.Scored`]):
            What the model says.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            The data.

    Returns:
        `str`, *optional*: The reason.
    """
    if scored.responses.thresholds is None:
        return "the model knows no ratings"
    given = {float(rating) for ratings in held_out.ratings().values() for rating in ratings}
    strange = sorted(given - {*map(float, scored.rating_values)})
    return f"the model does not know the rating {strange[0]:g}" if strange else None


def rating_losses(scored: Scored, held_out: HeldOut) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The negative log-likelihood of the ratings of each answer.

    It is about one person at a time, as P(a ≻ b) is: the error of a location counts anew for each rating.

    Args:
        scored ([`~disco_trl.evaluation.scored.Scored`]):
            What the model says, which knows all of the ratings ([`why_unread`]).
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            The data.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: The positions of the N answers that have ratings, the mean −log P
        of a person's rating of each, in nats, and the number of people, each of shape `(N,)`.
    """
    assert scored.responses.thresholds is not None
    ratings = held_out.ratings()
    positions = np.fromiter(ratings, dtype=int)
    table = np.array([[(values == value).sum() for value in scored.rating_values] for values in ratings.values()])
    rewards, thresholds = scored.rewards.map(to_float64), to_float64(scored.responses.thresholds)
    answer, level = np.nonzero(table)
    losses = []
    for rows in np.split(np.arange(len(answer)), range(ROWS_AT_ONCE, len(answer), ROWS_AT_ONCE)):
        # One rating a row: several ratings of an answer would share the error of its location.
        counts = torch.nn.functional.one_hot(torch.from_numpy(level[rows]), len(scored.rating_values)).double()
        given = rewards[torch.from_numpy(positions[answer[rows]])]
        losses.append(-rating_log_likelihood(given, counts, thresholds).numpy())
    people = table.sum(axis=1)
    total = np.bincount(answer, table[answer, level] * np.concatenate(losses), len(positions))
    return positions, total / people, people


def with_ratings(scored: Scored, held_out: HeldOut, draws: int, seed: int) -> dict[str, Figure]:
    """The negative log-likelihood of people's ratings.

    Args:
        scored ([`~disco_trl.evaluation.scored.Scored`]):
            What the model says.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            The data.
        draws (`int`):
            Number of resamples, which are of items, and of answers that several items share.
        seed (`int`):
            Seed of the resamples.

    Returns:
        `dict[str, Figure]`: `rating_nll`, in nats. Empty if the data have no ratings.
    """
    if not held_out.ratings():
        return {}
    if (why := why_unread(scored, held_out)) is not None:
        return {"rating_nll": Figure.none(why)}
    positions, losses, people = rating_losses(scored, held_out)
    counts = resamples(held_out.groups_of_sequences[positions], draws, seed)
    drawn = (counts @ (people * losses)) / (counts @ people)
    return {"rating_nll": Figure.of(float(losses @ people / people.sum()), drawn.tolist())}
