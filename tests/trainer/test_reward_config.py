"""`DiscoRewardConfig`: the fields that it adds, and the way from the command line. TRL's fields are contract C4's."""

from dataclasses import fields

import pytest
from transformers import HfArgumentParser
from trl import RewardConfig

from disco_trl import DiscoRewardConfig


def config(tmp_path, **options) -> DiscoRewardConfig:
    return DiscoRewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_it_is_trls_config_with_fields_added(tmp_path):
    assert isinstance(config(tmp_path), RewardConfig)
    theirs = {field.name for field in fields(RewardConfig)}
    own = {field.name: field for field in fields(DiscoRewardConfig) if field.name not in theirs}
    assert {name: field.default for name, field in own.items()} == {
        "reward_family": None,
        "fixed_scale": None,
        "location_error": None,
        "tie_width": None,
        "label_noise": 0.0,
        "rating_values": None,
        "weigh_by": "pair",
        "calibrate": None,
        "epistemic": False,
        "prefix_sharing": True,
        "max_tokens_per_batch": None,
    }
    for name, field in own.items():
        assert len(field.metadata["help"]) > 40
        assert f"{name} (`" in DiscoRewardConfig.__doc__


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "reward_family",
            "gaussian",
            "'gaussian' is unknown; choose one of 'normal', 'cauchy', 'logistic', 'laplace', 'mixture'",
        ),
        ("fixed_scale", 0.0, "fixed_scale=0.0 must be a positive, finite number"),
        ("fixed_scale", -1.0, "fixed_scale=-1.0"),
        ("fixed_scale", float("inf"), "fixed_scale=inf"),
        ("fixed_scale", float("nan"), "fixed_scale=nan"),
        ("tie_width", 0.0, "tie_width=0.0 must be a positive"),
        ("label_noise", 0.5, "label_noise=0.5 must be at least 0 and below 0.5"),
        ("label_noise", -0.1, "label_noise=-0.1"),
        ("rating_values", [1.0], r"rating_values=\[1.0\] must be two or more numbers, ascending"),
        ("rating_values", [2.0, 1.0], "ascending"),
        ("rating_values", [1.0, 1.0, 2.0], "ascending"),
        ("weigh_by", "row", "weigh_by='row' must be 'pair' or 'vote'"),
    ],
)
def test_values_that_make_no_sense(tmp_path, option, value, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{option: value})


@pytest.mark.parametrize("family", ["normal", "cauchy", "logistic", None])
def test_values_that_do(tmp_path, family):
    made = config(tmp_path, reward_family=family, fixed_scale=2**-0.5)
    assert (made.reward_family, made.fixed_scale) == (family, 2**-0.5)


def test_from_the_command_line(tmp_path):
    (made,) = HfArgumentParser(DiscoRewardConfig).parse_args_into_dataclasses(
        f"--output_dir {tmp_path} --use_cpu --bf16 False --reward_family cauchy --fixed_scale 0.5 "
        "--center_rewards_coefficient 0.01 --rating_values 1 2 3 --weigh_by vote --location_error True "
        "--tie_width 0.5".split()
    )
    assert (made.rating_values, made.weigh_by, made.location_error, made.tie_width) == ([1, 2, 3], "vote", True, 0.5)
    assert (made.reward_family, made.fixed_scale) == ("cauchy", 0.5)
    assert made.center_rewards_coefficient == 0.01
