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
            `fixed_scale=2**-0.5` is Bradley–Terry, TRL's own loss. If `None`, a disco checkpoint keeps its own setting,
            and any other model learns a scale for each answer.

        > Parameters that control the training

        scale_gauge_coefficient (`float`, *optional*, defaults to `1.0`):
            Strength of the term that fixes the unit of reward. The likelihood does not change when all locations and
            scales are multiplied by one number, so without it both drift. The term is
            $\lambda (\bar{x}^2 - (\bar{x} - m)^2)$, where $x$ is a row's log scale relative to the family's unit (at
            which one unit of reward is about one logit, as in Bradley–Terry), $\bar{x}$ its mean over the batch and
            $m$ its running mean over the rows before. Its gradient is the same for every row, so it moves all scales
            together and never flattens their differences. The likelihood is flat in the one direction that the term
            acts on, hence any positive value ends at the same place (geometric mean of the scales at the unit) and
            none needs tuning. It is exactly zero with `fixed_scale`. To fix the shift of the rewards as well, use
            `center_rewards_coefficient`.
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
    scale_gauge_coefficient: float = field(
        default=1.0,
        metadata={
            "help": "Strength of the term that fixes the unit of reward: it holds the geometric mean of the scales at "
            "the family's unit, at which one unit of reward is about one logit, and leaves their differences alone. "
            "Any positive value ends at the same place. Exactly zero with `fixed_scale`."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.reward_family is not None:
            from .distributions import get_family

            get_family(self.reward_family)
        if self.fixed_scale is not None and not 0 < self.fixed_scale < float("inf"):
            raise ValueError(f"fixed_scale={self.fixed_scale!r} must be a positive, finite number")
        if not 0 <= self.scale_gauge_coefficient < float("inf"):
            raise ValueError(
                f"scale_gauge_coefficient={self.scale_gauge_coefficient!r} must be a finite number of at least 0"
            )
