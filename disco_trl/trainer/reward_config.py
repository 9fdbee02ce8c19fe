"""Configuration of the reward trainer: TRL's `RewardConfig` and the fields that a reward distribution adds to it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from trl import RewardConfig

from ..data.columns import OVERALL
from ..data.values import as_number
from ..distributions.reward_distribution import FAMILIES
from .shared_config import SharedConfig


@dataclass
class DiscoRewardConfig(SharedConfig, RewardConfig):
    r"""
    Configuration class for the [`DiscoRewardTrainer`].

    This class adds the parameters below to those of [`~trl.RewardConfig`] and [`~transformers.TrainingArguments`],
    which keep their meaning and their defaults. Four of those can do more here:

    - If neither `bf16` nor `fp16` is set and the machine has no accelerator with bfloat16, training is in float32, and
      a line says so. TRL's default, bfloat16, is an error there. With `use_cpu=True` TRL's default holds.
    - `resume_from_checkpoint` may be a bool, also as a word of a command line.
    - `greater_is_better` defaults to `False` if `metric_for_best_model` is a negative log-likelihood, such as
      `"eval_nll"`.
    - `activation_checkpointing` is understood under that name with any supported version of transformers, which has
      called it so since 5.24 and will drop the name `gradient_checkpointing` in version 6.

    Parameters:
        > Parameters that control the model

        reward_family (`str`, *optional*):
            Family of the reward distributions: `"normal"`, `"cauchy"`, `"logistic"`, `"laplace"`, `"mixture"`, or any
            other registered family (see `disco_trl.distributions.families`). If `None`, a disco checkpoint keeps its
            own family, and any other model gets `"normal"`. A checkpoint of another family is an error.
        fixed_scale (`float`, *optional*):
            Scale of every reward, in reward units, in place of a learned one. `reward_family="logistic"` with
            `fixed_scale=2**-0.5` is Bradley–Terry, the loss of TRL. If `None`, a disco checkpoint keeps its own
            setting, and any other model learns a scale for each answer.
        scale_layer (`int`, *optional*):
            Layer whose mean hidden state over the tokens of a text the scale reads, from 1; 0 stands for the last
            hidden state of the last token, which the location reads. If `None`, a disco checkpoint keeps its own
            setting, and any other model reads the layer at two thirds of its depth.

        > Parameters that control the likelihood

        location_error (`bool`, *optional*):
            Whether to learn an error of the location that all judgements about an answer share, apart from the
            disagreement of people. Several ratings of an answer can tell the two apart, and a single rating cannot.
            Several votes on a pair can if the model errs equally on all answers. If `None`, the error is learned if
            answers have several ratings.
        tie_width (`float`, *optional*):
            Half-width, in reward units, of the band within which two rewards are called equal. It applies to datasets
            with a column `tie` or with equal `ranks`. If `None`, it is learned if the training data have ties.
        label_noise (`float`, *optional*, defaults to `0.0`):
            Probability, below ½, that a vote is the opposite of what was meant. If `None`, it is learned.
        rating_values (`list[float]`, *optional*):
            Ratings that `chosen_rating` and `rejected_rating` may hold, in ascending order. If `None`, they are those
            of the training data (for a stream, of its first 1,000 rows). Numbers that are not on a scale, such as a
            reward model's scores, are then not read, and a warning is logged.
        strength_levels (`int`, *optional*):
            Number L of levels of `preference_strength`, which holds whole numbers from −L to L. If `None`, L is the
            largest strength in the training data (for a stream, in its first 1,000 rows). With 1, strengths are read
            as votes.
        attributes (`list[str]`, *optional*):
            Attributes of an answer, beside its overall quality, that the model gives rewards for. If `None`, they are
            those that the training data rate (`chosen_rating` as a dict) or compare (the column `attribute`). Those
            that are left out are not read.
        attribute_weights (`dict[str, float]`, *optional*):
            Weight of each attribute in the overall reward, below 0 for one that counts against an answer, and 0 for
            one that does not count, as are those that are left out. If the weights are learned, they start here and
            keep their sign. If `None`, all are equal and positive.
        learn_attribute_weights (`bool`, *optional*):
            Whether to learn how much each attribute counts in the overall reward, and what they do not explain of it.
            If `None`, the weights are learned if the training data hold overall judgements. Otherwise they cannot be.
        scale_training (`str`, *optional*, defaults to `"at_end"`):
            When the scale is learned. With `"at_end"`, it stays as it is (in a new model, the same for every answer)
            until training ends, and `calibrate` fits it then. Until then the location is trained by votes, ties and
            ratings, and how strong a preference is moves the boundaries between strengths alone. With `"joint"`, all
            are trained together by the one likelihood, the language model included, before `calibrate` fits the scale
            again.
        weigh_by (`str`, *optional*, defaults to `"pair"`):
            What has weight 1 in the loss. With `"pair"`, all judgements in a row of the dataset together. With
            `"vote"`, each vote, each rating and each ranked pair. A column `weight` multiplies either.

        > Parameters that control what is fitted when training ends

        calibrate (`bool`, *optional*):
            Whether to fit the scale and the unit of the locations when training ends, to the predictions that the
            model made of pairs before it learned from them. The only cost is memory for the hidden states of the
            latest 8,192 pairs, which are saved with checkpoints. If training goes through its data more than once
            (TRL's default is 3 times), a tenth of the rows, at most 1,024, is not trained on: the unit is then fitted
            to what the finished model predicts of these. `None` is the same as `True`, unless the scale is fixed.
            Calibration is skipped, with a warning that says why, with fewer than 512 pairs, if several passes leave
            fewer than 128 rows to set aside, if the model predicts hardly better than chance, after
            `load_best_model_at_end` and if the head is sharded.
        epistemic (`bool`, *optional*, defaults to `False`):
            Whether to fit the epistemic uncertainty of the location when training ends: the posterior of the last
            layer, which is saved with the model. Its rewards then have a `location_error` that grows on unfamiliar
            text. The cost and the exceptions are those of `calibrate`.

        > Parameters that control batches

        prefix_sharing (`bool`, *optional*, defaults to `True`):
            Whether to compute what the sequences of a batch begin with (the prompt of a pair, a system prompt of all)
            only once, and without padding. The loss and the gradient of each pair are the same to rounding. It works
            with causal decoders that have attention in every layer. For any other model batches are padded as in TRL,
            and a warning is logged. With dropout, such as that of a LoRA adapter, both sides of a pair get the same
            noise on the shared part. The logged `num_tokens` counts the tokens that were computed.
        max_tokens_per_batch (`int`, *optional*):
            Maximum number of tokens in a training batch of each process, in place of `per_device_train_batch_size`. A
            batch holds as many pairs of similar length as fit, where a shared prompt counts once. A pair that is
            longer is a batch of its own. Each pair has the same weight in the loss for any size of its batch. A model
            without prefix sharing computes up to twice as many tokens. Not supported for streaming datasets.

        `train_sampling_strategy="group_by_length"` groups pairs of similar length, also those of a streaming dataset
        (within a buffer of 50 optimizer steps; the log of transformers says there that the option is ignored, which
        does not apply). With prefix sharing there is no padding to save, and the only gain is steps of more even
        length.

    The unit of reward needs no parameter. A likelihood of preferences leaves the unit free, so that it would drift.
    Here the geometric mean of the scales over the training rows is the family's unit by construction, at which one
    unit of reward is about one logit, as in Bradley–Terry (see `disco_trl.models.scale_head`). To fix the shift of the
    rewards as well, set `center_rewards_coefficient`.
    """

    reward_family: str | None = field(
        default=None,
        metadata={
            "help": "Distribution of a reward: "
            + ", ".join(f"'{name}' ({family.summary})" for name, family in FAMILIES.items())
            + ". If `None`, a disco checkpoint keeps its own, and any other model gets 'normal'. A checkpoint of "
            "another family is refused."
        },
    )
    fixed_scale: float | None = field(
        default=None,
        metadata={
            "help": "Scale of every reward, in reward units, in place of a learned one. `reward_family='logistic'` "
            "with `fixed_scale=0.7071067811865476` is Bradley-Terry, the loss of TRL. If `None`, a disco checkpoint "
            "keeps its own setting, and any other model learns a scale for each answer."
        },
    )
    scale_layer: int | None = field(
        default=None,
        metadata={
            "help": "Layer whose mean hidden state over the tokens of a text the scale reads, from 1; 0 is for the "
            "last hidden state of the last token. If `None`, a disco checkpoint keeps its own setting, and any other "
            "model reads the layer at two thirds of its depth."
        },
    )
    location_error: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to learn an error of the location that all judgements about an answer share, apart from "
            "the disagreement of people. If `None`, it is learned if answers have several ratings."
        },
    )
    rating_values: list[float] | None = field(
        default=None,
        metadata={
            "help": "Ratings that `chosen_rating` and `rejected_rating` may hold, in ascending order. If `None`, they "
            "are those of the training data, unless these are not on a scale."
        },
    )
    attributes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Attributes of an answer, beside its overall quality, that the model gives rewards for. If "
            "`None`, they are those that the training data rate or compare."
        },
    )
    attribute_weights: dict | str | None = field(
        default=None,
        metadata={
            "help": "Weight of each attribute in the overall reward, below 0 for one that counts against an answer, "
            "as JSON on the command line. If the weights are learned, they start here and keep their sign. If `None`, "
            "all are equal and positive."
        },
    )
    learn_attribute_weights: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to learn how much each attribute counts in the overall reward. If `None`, the weights "
            "are learned if the training data hold overall judgements."
        },
    )
    scale_training: str = field(
        default="at_end",
        metadata={
            "help": "Whether the scale stays as it is until training ends and is fitted then ('at_end'), or is "
            "trained together with the location, by the one likelihood ('joint').",
            "choices": ["at_end", "joint"],
        },
    )
    calibrate: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to fit the scale and the unit of the locations when training ends, to predictions that "
            "the model made of pairs before it learned from them. If training goes through its data more than once, a "
            "tenth of the rows, at most 1,024, is not trained on for that."
        },
    )
    epistemic: bool = field(
        default=False,
        metadata={
            "help": "Whether to fit the epistemic uncertainty of the location when training ends. Rewards of the "
            "model then have a `location_error` that grows on unfamiliar text."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens in a training batch of each process, in place of "
            "`per_device_train_batch_size`. A batch holds as many pairs of similar length as fit, where a shared "
            "prompt counts once. Not supported for streaming datasets."
        },
    )

    def __post_init__(self):
        super().__post_init__()

        # What is learned beside the rewards
        if self.rating_values is not None and (
            len(self.rating_values) < 2 or sorted({*self.rating_values}) != list(self.rating_values)
        ):
            raise ValueError(f"rating_values={self.rating_values!r} must be two or more numbers, ascending")
        if isinstance(self.attribute_weights, str):  # as a command line has it
            try:
                self.attribute_weights = json.loads(self.attribute_weights)
            except ValueError as error:
                raise ValueError(f"attribute_weights={self.attribute_weights!r} is not JSON: {error}") from error
        weights: Any = self.attribute_weights
        if weights is not None and (
            not isinstance(weights, dict) or not all(as_number(weight) is not None for weight in weights.values())
        ):
            raise ValueError(f"attribute_weights={weights!r} must be a number for each attribute, by its name")
        if self.attributes is not None and len({*self.attributes} - {OVERALL}) != len(self.attributes):
            raise ValueError(f"attributes={self.attributes!r} must be different names, other than {OVERALL!r}")
        if self.scale_training not in ("at_end", "joint"):
            raise ValueError(f"scale_training={self.scale_training!r} must be 'at_end' or 'joint'")

        # What makes up a batch
        strategy = getattr(self, "train_sampling_strategy", None)
        if strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy='batch_rebalance' needs one sequence per row, and would let a pair weigh "
                "more in a small batch than in a large one; set max_tokens_per_batch instead"
            )
        if self.max_tokens_per_batch is not None:
            budget: Any = self.max_tokens_per_batch
            if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
                raise ValueError(f"max_tokens_per_batch={budget!r} must be a positive whole number, or None")
            if strategy == "sequential":
                raise ValueError(
                    "max_tokens_per_batch groups pairs by length, which train_sampling_strategy='sequential' forbids; "
                    "leave one of them out"
                )
            accelerator_config: Any = self.accelerator_config
            for option in ("split_batches", "dispatch_batches"):
                if getattr(accelerator_config, option):
                    raise ValueError(
                        f"accelerator_config: {option} cuts batches of one size into pieces, and those of "
                        "max_tokens_per_batch have none; leave one of them out"
                    )
            if self.auto_find_batch_size:
                raise ValueError(
                    "auto_find_batch_size lowers per_device_train_batch_size, which max_tokens_per_batch does not "
                    "look at; leave one of them out"
                )

    @property
    def groups_by_length(self) -> bool:
        """Whether batches of `per_device_train_batch_size` hold pairs of similar length."""
        return self.train_sampling_strategy == "group_by_length"
