"""Configuration of the DPO trainer: TRL's `DPOConfig` and the fields that the likelihood of a pair adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import DPOConfig

from ..distributions.reward_distribution import FAMILIES
from .shared_config import SharedConfig


SIGMOID = "sigmoid"
"""TRL's name of the loss whose place the likelihood takes."""


@dataclass
class DiscoDPOConfig(SharedConfig, DPOConfig):
    r"""
    Configuration class for the [`DiscoDPOTrainer`].

    This class adds the parameters below to those of [`~trl.DPOConfig`] and [`~transformers.TrainingArguments`], which
    keep their meaning and their defaults, apart from those that `docs/dpo.md` lists as refused. As in
    [`DiscoRewardConfig`], training is in float32, with a warning, if neither `bf16` nor `fp16` is set and the machine
    has no accelerator with bfloat16.

    Parameters:
        > Parameters that control the likelihood

        reward_family (`str`, *optional*, defaults to `"logistic"`):
            Family of the distribution of an answer's reward, whose location is β (log π(y|x) − log π_ref(y|x)):
            `"normal"`, `"cauchy"`, `"logistic"`, `"laplace"`, `"mixture"`, or any other registered family. With
            `"logistic"` and the default scale the loss of a forced choice is TRL's `loss_type="sigmoid"`.
        fixed_scale (`float`, *optional*):
            Scale of every reward, in units of β (log π − log π_ref). If `None`, it is the unit of the family, at which
            one unit of reward is about one logit. A forced choice with another scale is trained as with another β.
        scale_model (`str`, *optional*):
            Hub id or directory of a disco reward model that scores the datasets before training. Each answer then has
            the scale that the model gives it, divided by the geometric mean over the training rows, so that β keeps
            its meaning. If `None`, the columns `scale_chosen` and `scale_rejected`, which `disco-trl score` adds, are
            read if the training data have them, and all answers have the same scale otherwise.
        scale_training (`str`, *optional*):
            If given, the scale of each answer is learned with the policy, by a linear map of the policy's last hidden
            state at the end of the answer, with the family's unit as its geometric mean. With `"detached"` its
            gradient is kept from the policy, and with `"joint"` it is not. The map is saved beside the policy.
        tie_width (`float`, *optional*):
            Half-width, in reward units, of the band within which two rewards are called equal. It applies to datasets
            with a column `tie` or with equal `ranks`. If `None`, it is learned if the training data have ties.
        label_noise (`float`, *optional*, defaults to `0.0`):
            Probability, below ½, that a vote is the opposite of what was meant. If `None`, it is learned. TRL's
            `label_smoothing` is something else, and acts in other losses only.
        strength_levels (`int`, *optional*):
            Number L of levels of `preference_strength`, which holds whole numbers from −L to L. If `None`, L is the
            largest strength in the training data (for a stream, in its first 1,000 rows). With 1, strengths are read
            as votes.
        weigh_by (`str`, *optional*, defaults to `"pair"`):
            What has weight 1 in the loss. With `"pair"`, all judgements in a row of the dataset together. With
            `"vote"`, each vote and each ranked pair. A column `weight` multiplies either.

        > Parameters that control batches

        prefix_sharing (`bool`, *optional*, defaults to `True`):
            Whether to compute what the sequences of a batch begin with, such as the prompt of a pair, only once for
            the policy and once for the reference, and without padding. The log-probabilities are the same to rounding.
            It needs TRL 1.15 and works with causal decoders that have attention in every layer. Otherwise batches are
            padded as in TRL, and a warning is logged.
    """

    reward_family: str = field(
        default="logistic",
        metadata={
            "help": "Distribution of the reward of an answer, whose location is beta * (log pi - log pi_ref): "
            + ", ".join(f"'{name}' ({family.summary})" for name, family in FAMILIES.items())
            + ". With 'logistic' and the default scale, the loss of a forced choice is TRL's 'sigmoid'."
        },
    )
    fixed_scale: float | None = field(
        default=None,
        metadata={
            "help": "Scale of every reward, in units of beta * (log pi - log pi_ref). If `None`, it is the unit of "
            "the family, at which one unit of reward is about one logit."
        },
    )
    scale_model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or directory of a disco reward model that scores the datasets before training. Each "
            "answer then has the scale that the model gives it, divided by the geometric mean over the training rows. "
            "If `None`, the columns `scale_chosen` and `scale_rejected` are read if the training data have them."
        },
    )

    scale_training: str | None = field(
        default=None,
        metadata={
            "help": "If given, the scale of each answer is learned with the policy, from its last hidden state. With "
            "'detached' its gradient is kept from the policy, and with 'joint' it is not.",
            "choices": ["detached", "joint"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if SIGMOID not in self.loss_type or self.loss_type.count(SIGMOID) > 1:
            raise ValueError(
                f"loss_type={self.loss_type!r} must contain 'sigmoid' once: the likelihood takes its place. Without "
                "it, use trl's DPOTrainer"
            )
        if self.scale_training not in (None, "detached", "joint"):
            raise ValueError(f"scale_training={self.scale_training!r} must be 'detached' or 'joint', or left out")
        sources = {name: getattr(self, name) for name in ("fixed_scale", "scale_model", "scale_training")}
        given = {name: value for name, value in sources.items() if value is not None}
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(f'{name}={value!r}' for name, value in given.items())} contradict each other; leave "
                f"{'one of them' if len(given) == 2 else 'two of them'} out"
            )
        refused = {
            "f_divergence_type": (
                self.f_divergence_type != "reverse_kl",
                "the reward of an answer is beta * (log pi - log pi_ref), which holds for the reverse KL divergence",
            ),
            "use_weighting": (self.use_weighting, "what a pair weighs is a column of the data, `weight`"),
            "use_liger_kernel": (self.use_liger_kernel, "its loss has TRL's forced choices built in"),
        }
        for name, (is_set, reason) in refused.items():
            if is_set:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported: {reason}; leave it out")
        if self.label_smoothing and not {*self.loss_type} - {SIGMOID}:
            raise ValueError(
                f"label_smoothing={self.label_smoothing!r} has no effect with loss_type=['sigmoid'], here and in TRL; "
                "set label_noise, the probability that a vote is the opposite of what was meant"
            )
