"""Bootstrap intervals: what is drawn together, and that they cover."""

import numpy as np
import pytest

from disco_trl.evaluation.bootstrap import interval, resamples
from disco_trl.evaluation.forecasts import Forecasts
from disco_trl.evaluation.metrics import accuracy


def test_resamples_draw_groups():
    counts = resamples(np.array([7, 7, 3, 5, 5, 5]), draws=500, seed=0)
    assert counts.shape == (500, 6)
    assert (counts[:, 0] == counts[:, 1]).all() and (counts[:, 3] == counts[:, 5]).all()
    assert (counts[:, [0, 2, 3]].sum(axis=1) == 3).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(6), abs=0.15)


def test_resamples_draw_both_sides():
    groups = np.array([[7, 7], [7, 3], [3, 5], [5, 5]])
    counts = resamples(groups, draws=500, seed=0)
    seven, three, five = counts[:, 0], 3 - counts[:, 0] - counts[:, 3], counts[:, 3]
    assert (counts[:, 1] == seven * three).all() and (counts[:, 2] == three * five).all()
    assert (counts == resamples(groups[:, ::-1], draws=500, seed=0)).all()


def test_bootstrap_covers_the_standard_error():
    # Of 2,000 right or wrong answers, p = 0.8: ±1.96 √(0.8 · 0.2 / 2000) = 0.0175
    wins = np.random.default_rng(0).random(2000) < 0.8
    given = Forecasts.of_probabilities(np.where(wins, 0.9, 0.1))
    low, high = interval([accuracy(given.times(count)) for count in resamples(np.arange(2000), 1000)])
    assert (high - low) / 2 == pytest.approx(0.0175, rel=0.1)
