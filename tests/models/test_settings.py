"""The settings of a checkpoint against what is asked for; what is refused is in contract C6."""

import pytest

from disco_trl.models.settings import resolve_settings


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (None, (None, None), ("normal", None)),
        (None, ("cauchy", 2.0), ("cauchy", 2.0)),
        (("cauchy", None), (None, None), ("cauchy", None)),
        (("cauchy", None), ("cauchy", None), ("cauchy", None)),
        (("logistic", 0.5), (None, 0.5), ("logistic", 0.5)),
    ],
)
def test_resolve_settings(stored, asked, expected):
    names = ("reward_family", "fixed_scale")
    stored = None if stored is None else dict(zip(names, stored, strict=True))
    assert resolve_settings(stored, *asked) == dict(zip(names, expected, strict=True))
