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


def test_a_scale_layer_is_kept():
    stored = {"reward_family": "normal", "fixed_scale": None, "scale_layer": 20}
    assert resolve_settings(stored) == stored


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "20", None, [20]])
def test_a_scale_layer_is_a_whole_number(value):
    stored = {"reward_family": "normal", "fixed_scale": None, "scale_layer": value}
    with pytest.raises(ValueError, match=r"here: .*scale_layer=.*has to be the number of a layer, from 1"):
        resolve_settings(stored, where="here")


def test_a_fixed_scale_reads_no_layer():
    stored = {"reward_family": "normal", "fixed_scale": 0.5, "scale_layer": 1}
    with pytest.raises(ValueError, match=r"here: .*scale_layer=1 and fixed_scale=0\.5"):
        resolve_settings(stored, where="here")
