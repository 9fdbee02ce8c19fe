"""`DiscoRewardConfig`: the fields that it adds, and the way from the command line. TRL's fields are contract C4's."""

import warnings
from dataclasses import fields, replace

import pytest
from transformers import HfArgumentParser, TrainingArguments
from trl import RewardConfig

from disco_trl import DiscoRewardConfig


def config(tmp_path, **options) -> DiscoRewardConfig:
    return DiscoRewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_it_is_trls_config_with_fields_added(tmp_path):
    assert isinstance(config(tmp_path), RewardConfig)
    theirs = {field.name for field in fields(RewardConfig)} | {"activation_checkpointing"}  # of transformers 5.24 on
    own = {field.name: field for field in fields(DiscoRewardConfig) if field.name not in theirs}
    assert {name: field.default for name, field in own.items()} == {
        "reward_family": None,
        "fixed_scale": None,
        "scale_layer": None,
        "location_error": None,
        "tie_width": None,
        "label_noise": 0.0,
        "rating_values": None,
        "strength_levels": None,
        "attributes": None,
        "attribute_weights": None,
        "learn_attribute_weights": None,
        "scale_training": "at_end",
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
        ("attributes", ["tone", "tone"], "must be different names"),
        ("attributes", ["overall"], "must be different names, other than 'overall'"),
        ("attribute_weights", {"tone": "much"}, "must be a number for each attribute"),
        ("attribute_weights", "tone=1", "is not JSON"),
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


# Defaults that depend on the machine


@pytest.fixture
def without_bfloat16(monkeypatch):
    """A machine whose accelerator, if it has one, cannot compute in bfloat16."""
    monkeypatch.setattr("disco_trl.trainer.shared_config.is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)


def test_without_bfloat16_training_is_in_float32(tmp_path, without_bfloat16, caplog):
    made = DiscoRewardConfig(str(tmp_path))
    assert (made.bf16, made.fp16) == (False, False)
    (line,) = [record.message for record in caplog.records if record.name.startswith("disco_trl")]
    assert "Training is in float32" in line and "use_cpu=True and bf16=True" in line
    # A copy has been told.
    assert replace(made, learning_rate=1e-3).bf16 is False
    assert sum("float32" in record.message for record in caplog.records) == 1


def test_what_is_asked_for_is_as_in_trl(tmp_path, without_bfloat16, caplog):
    with pytest.raises(ValueError, match="bf16/gpu"):
        DiscoRewardConfig(str(tmp_path), bf16=True)
    assert (
        DiscoRewardConfig(str(tmp_path), use_cpu=True).bf16 is RewardConfig(str(tmp_path), use_cpu=True).bf16 is True
    )
    assert DiscoRewardConfig(str(tmp_path), bf16=False).bf16 is False
    assert not [record for record in caplog.records if record.name.startswith("disco_trl")]


def test_mixed_precision_of_the_launcher_is_not_called_float32(tmp_path, without_bfloat16, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert DiscoRewardConfig(str(tmp_path)).bf16 is False  # as in transformers, the launcher's setting then holds
    assert not [record for record in caplog.records if record.name.startswith("disco_trl")]


# Words of a command line


@pytest.mark.parametrize(
    ("word", "value"), [("True", True), ("true", True), ("False", False), ("runs/checkpoint-8", "runs/checkpoint-8")]
)
def test_resuming_from_the_command_line(tmp_path, word, value):
    (made,) = HfArgumentParser(DiscoRewardConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--resume_from_checkpoint", word]
    )
    assert made.resume_from_checkpoint == value
    assert type(made.resume_from_checkpoint) is type(value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, True), ({"activation_checkpointing": False}, False), ({"gradient_checkpointing": False}, False)],
)
def test_activation_checkpointing_by_both_names(tmp_path, options, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # transformers', also of what is TRL's default
        made = config(tmp_path, **options)
        copied = replace(made, activation_checkpointing=not expected)
    assert made.activation_checkpointing is made.gradient_checkpointing is expected
    assert copied.activation_checkpointing is copied.gradient_checkpointing is not expected


@pytest.mark.parametrize(
    ("metric", "greater"), [("eval_nll", False), ("eval_a_nll", False), ("nll", False), ("eval_accuracy", True)]
)
def test_a_likelihood_is_better_if_its_negative_is_smaller(tmp_path, metric, greater):
    assert config(tmp_path, metric_for_best_model=metric).greater_is_better is greater
    assert config(tmp_path, metric_for_best_model=metric, greater_is_better=True).greater_is_better is True
    assert TrainingArguments(str(tmp_path), use_cpu=True, metric_for_best_model="eval_nll").greater_is_better is True
