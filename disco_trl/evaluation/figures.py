"""Numbers with intervals, as reports show them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .bootstrap import interval
from .forecasts import Forecasts
from .metrics import INTERVALS, METRICS, spearman


@dataclass(frozen=True)
class Figure:
    """Number with its interval, which contains it.

    Attributes:
        value (`float`):
            The number, `nan` where it is undefined.
        low (`float`):
            Lower end of the 95 % interval, `nan` where there is none.
        high (`float`):
            Upper end of the 95 % interval, `nan` where there is none.
        note (`str`, *optional*, defaults to `""`):
            Why there is no number, or no interval, if that is not obvious.
    """

    value: float
    low: float
    high: float
    note: str = ""

    @classmethod
    def of(cls, value: float, draws: list[float]) -> Figure:
        """Figure from its value and the values of the resamples.

        Args:
            value (`float`):
                Value on the data.
            draws (`list[float]`):
                Values on the resamples.

        Returns:
            [`Figure`]: The figure.
        """
        return cls(value, *interval(draws))

    @classmethod
    def none(cls, why: str) -> Figure:
        """Figure that there is not, and why."""
        return cls(math.nan, math.nan, math.nan, f"none: {why}")

    def __str__(self) -> str:
        number = "" if self.note and math.isnan(self.value) else f"{self.value:.4f}"
        if not math.isnan(self.low):
            number += f" ({self.low:.4f} to {self.high:.4f})"
        return f"{number} {self.note}".strip()


def figure_of(name: str, forecasts: Forecasts, counts: np.ndarray) -> Figure:
    """A metric of forecasts, with its own interval or that of the bootstrap.

    Args:
        name (`str`):
            One of [`~disco_trl.evaluation.metrics.METRICS`].
        forecasts ([`~disco_trl.evaluation.forecasts.Forecasts`]):
            Forecasts to evaluate.
        counts (`np.ndarray` of shape `(draws, N)`):
            Resamples of the forecasts, see [`~disco_trl.evaluation.bootstrap.resamples`].

    Returns:
        [`Figure`]: The metric.
    """
    metric = METRICS[name]
    if name not in INTERVALS:
        return Figure.of(metric(forecasts), [metric(forecasts.times(count)) for count in counts])
    own = INTERVALS[name]
    return Figure(metric(forecasts), *(own(forecasts) if own is not None else (math.nan, math.nan)))


def correlation_of(ours: np.ndarray, theirs: np.ndarray, draws: int, seed: int) -> Figure:
    """Spearman's rank correlation, with the interval of the bootstrap over pairs of values.

    Args:
        ours (`np.ndarray` of shape `(N,)`):
            Values of the model.
        theirs (`np.ndarray` of shape `(N,)`):
            Values of people.
        draws (`int`):
            Number of bootstrap resamples.
        seed (`int`):
            Seed of the resamples.

    Returns:
        [`Figure`]: The correlation.
    """
    generator = np.random.default_rng(seed)
    drawn = [generator.integers(len(ours), size=len(ours)) for _ in range(draws)]
    return Figure.of(spearman(ours, theirs), [spearman(ours[index], theirs[index]) for index in drawn])
