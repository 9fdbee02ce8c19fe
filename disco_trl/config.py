"""What a user can set: TRL's `RewardConfig` and the few fields that a reward distribution adds to it."""

from dataclasses import dataclass, field

from trl import RewardConfig


@dataclass
class DiscoRewardConfig(RewardConfig):
    r"""
    Configuration class for the [`DiscoRewardTrainer`].

    Every parameter of [`~trl.RewardConfig`] (and of [`~transformers.TrainingArguments`]) is here with the same meaning
    and default. Those below are added.

    Parameters:
        > Parameters that control the model

        reward_family (`str`, *optional*):
            Distribution of a reward: `"normal"`, `"cauchy"` or `"logistic"`. If `None`, a disco checkpoint keeps its
            own, and any other model gets `"normal"`. A checkpoint of another family is refused.
        fixed_scale (`float`, *optional*):
            If set, every reward has this scale and none is learned. `reward_family="logistic"` with
            `fixed_scale=2**-0.5` is Bradley–Terry, TRL's own loss. If `None`, a disco checkpoint keeps its own
            setting, and any other model learns a scale for each answer.

    The unit of reward needs no parameter. A likelihood of preferences leaves it free, and it would drift; here the
    geometric mean of the scales over the training rows is the family's unit by construction, at which one unit of
    reward is about one logit, as in Bradley–Terry (see `disco_trl.modeling.ScaleHead`). To fix the shift of the
    rewards as well, use `center_rewards_coefficient`.
    """

    reward_family: str | None = field(
        default=None,
        metadata={
            "help": "Distribution of a reward: 'normal', 'cauchy' or 'logistic'. If `None`, a disco checkpoint keeps "
            "its own, and any other model gets 'normal'. A checkpoint of another family is refused."
        },
    )
    fixed_scale: float | None = field(
        default=None,
        metadata={
            "help": "If set, every reward has this scale and none is learned. `reward_family='logistic'` with "
            "`fixed_scale=0.7071067811865476` is Bradley-Terry, TRL's own loss. If `None`, a disco checkpoint keeps "
            "its own setting, and any other model learns a scale for each answer."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.reward_family is not None:
            from .distributions import get_family

            get_family(self.reward_family)
        if self.fixed_scale is not None and not 0 < self.fixed_scale < float("inf"):
            raise ValueError(f"fixed_scale={self.fixed_scale!r} must be a positive, finite number")
