"""What a user can set: TRL's `RewardConfig` and the few fields that a reward distribution adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import RewardConfig

from ..data.judgements import MOST_RATING_VALUES, Survey
from ..distributions.reward_distribution import FAMILIES, get_family


@dataclass
class DiscoRewardConfig(RewardConfig):
    r"""
    Configuration class for the [`DiscoRewardTrainer`].

    Every parameter of [`~trl.RewardConfig`] (and of [`~transformers.TrainingArguments`]) is here with the same meaning
    and default. Those below are added.

    Parameters:
        > Parameters that control the model

        reward_family (`str`, *optional*):
            Distribution of a reward: `"normal"`, `"cauchy"`, `"logistic"`, `"laplace"`, `"mixture"`, or any other
            family that is registered (`disco_trl.distributions.families`). If `None`, a disco checkpoint keeps its
            own, and any other model gets `"normal"`. A checkpoint of another family is refused.
        fixed_scale (`float`, *optional*):
            If set, every reward has this scale and none is learned. `reward_family="logistic"` with
            `fixed_scale=2**-0.5` is Bradley–Terry, TRL's own loss. If `None`, a disco checkpoint keeps its own
            setting, and any other model learns a scale for each answer.

        location_error (`bool`, *optional*):
            Whether to learn how far the model's locations are off, apart from how much people disagree: an error that
            all judgements about an answer share. Several ratings of an answer tell the two apart; one does not;
            several votes on a pair do if the model errs by as much on all answers. If `None`, it is learned where
            answers have several ratings.
        tie_width (`float`, *optional*):
            Half-width of the band within which two rewards are called equal, in units of reward, for datasets with
            `tie` or with equal `ranks`. If `None`, it is learned where there are ties.
        label_noise (`float`, *optional*, defaults to `0.0`):
            Probability that a vote says the opposite of what was meant, below ½. If `None`, it is learned.
        rating_values (`list[float]`, *optional*):
            The ratings that `chosen_rating` and `rejected_rating` may hold, ascending. If `None`, those that the
            training data have (of a stream, its first 1,000 rows).

        > Parameters that control the training

        weigh_by (`str`, *optional*, defaults to `"pair"`):
            What has weight 1 in the loss: `"pair"`, all that is said in a row of the dataset together; or `"vote"`,
            each vote, rating and ranked pair. The column `weight` multiplies either.
        calibrate (`bool`, *optional*):
            Whether to fit the unit of the locations, and the scale, once more when training ends: to what the model
            predicted of pairs before it learned from them. It costs nothing but memory for the latest 8,192 pairs'
            hidden states, which are saved with checkpoints. If `None`, it is done where training goes through its data
            once (in later passes predictions are no longer made in advance), a scale is learned, and no location error
            is, which has the same effect. Not with `load_best_model_at_end`, nor where the head is sharded.
        epistemic (`bool`, *optional*, defaults to `False`):
            Whether to fit, when training ends, what the data leave open about the location: a posterior of the last
            layer, kept with the model, whose rewards then have a `location_error` that grows on unfamiliar text. It
            costs what `calibrate` does. Not with `load_best_model_at_end`, nor where the head is sharded.
        prefix_sharing (`bool`, *optional*, defaults to `True`):
            Compute what the sequences of a batch have in common from the front (the prompt of a pair, a system prompt
            of all) once, and without padding. The losses and gradients of each pair are the same to rounding. It works
            with causal decoders with attention in every layer; any other model falls back to TRL's padded batches and
            says so. With dropout (that of a LoRA adapter, say) both sides of a pair get the same noise on what they
            share. The logged `num_tokens` counts the tokens that were computed.
        max_tokens_per_batch (`int`, *optional*):
            If set, a training batch of each process holds as many pairs of similar length as fit into this many tokens
            (what both sides of a pair begin with counts once), in place of `per_device_train_batch_size`; a longer
            pair is alone. Each pair weighs the same in the loss, whatever the size of its batch. A model without
            prefix sharing computes up to twice as many tokens. Not for streaming datasets.

        `train_sampling_strategy="group_by_length"` puts pairs of similar length into a batch, also those of a
        streaming dataset (within a buffer of 50 optimizer steps; transformers' log, which says that it ignores the
        option there, does not know). A model with prefix sharing has no padding to save by it, and gains nothing but
        steps of more even length.

    The unit of reward needs no parameter. A likelihood of preferences leaves it free, and it would drift; here the
    geometric mean of the scales over the training rows is the family's unit by construction, at which one unit of
    reward is about one logit, as in Bradley–Terry (see `disco_trl.models.scale_head.ScaleHead`). To fix the shift of
    the rewards as well, use `center_rewards_coefficient`.
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
            "help": "If set, every reward has this scale and none is learned. `reward_family='logistic'` with "
            "`fixed_scale=0.7071067811865476` is Bradley-Terry, TRL's own loss. If `None`, a disco checkpoint keeps "
            "its own setting, and any other model learns a scale for each answer."
        },
    )
    location_error: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to learn how far the model's locations are off, apart from how much people disagree. "
            "Several ratings of an answer tell the two apart; one does not; several votes on a pair do if the model "
            "errs by as much on all answers. If `None`, it is learned where answers have several ratings."
        },
    )
    tie_width: float | None = field(
        default=None,
        metadata={
            "help": "Half-width of the band within which two rewards are called equal, in units of reward. If `None`, "
            "it is learned where there are ties."
        },
    )
    label_noise: float | None = field(
        default=0.0,
        metadata={
            "help": "Probability that a vote says the opposite of what was meant, below 0.5. If `None`, it is learned."
        },
    )
    rating_values: list[float] | None = field(
        default=None,
        metadata={
            "help": "The ratings that `chosen_rating` and `rejected_rating` may hold, ascending. If `None`, those "
            "that the training data have."
        },
    )
    weigh_by: str = field(
        default="pair",
        metadata={
            "help": "What has weight 1 in the loss: 'pair', all that is said in a row of the dataset together; or "
            "'vote', each vote, rating and ranked pair. The column `weight` multiplies either.",
            "choices": ["pair", "vote"],
        },
    )
    calibrate: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to fit the unit of the locations, and the scale, once more when training ends: to what "
            "the model predicted of pairs before it learned from them. If `None`, it is done where training goes "
            "through its data once, a scale is learned, and no location error is."
        },
    )
    epistemic: bool = field(
        default=False,
        metadata={
            "help": "Whether to fit, when training ends, what the data leave open about the location. The model's "
            "rewards then have a `location_error` that grows on unfamiliar text."
        },
    )
    prefix_sharing: bool = field(
        default=True,
        metadata={
            "help": "Compute what the sequences of a batch have in common from the front (the prompt of a pair, a "
            "system prompt of all) once, and without padding. The losses and gradients of each pair are the same to "
            "rounding. Models that cannot do it fall back to padded batches and say so."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "If set, a training batch of each process holds as many pairs of similar length as fit into this "
            "many tokens (what both sides of a pair begin with counts once), in place of "
            "`per_device_train_batch_size`; a longer pair is alone. Not for streaming datasets."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.reward_family is not None:
            get_family(self.reward_family)
        if self.fixed_scale is not None and not 0 < self.fixed_scale < float("inf"):
            raise ValueError(f"fixed_scale={self.fixed_scale!r} must be a positive, finite number")

        # What is learned beside the rewards
        if self.tie_width is not None and not 0 < self.tie_width < float("inf"):
            raise ValueError(f"tie_width={self.tie_width!r} must be a positive, finite number, or None to learn it")
        if self.label_noise is not None and not 0 <= self.label_noise < 0.5:
            raise ValueError(f"label_noise={self.label_noise!r} must be at least 0 and below 0.5, or None to learn it")
        if self.rating_values is not None and (
            len(self.rating_values) < 2 or sorted({*self.rating_values}) != list(self.rating_values)
        ):
            raise ValueError(f"rating_values={self.rating_values!r} must be two or more numbers, ascending")
        if self.weigh_by not in ("pair", "vote"):
            raise ValueError(f"weigh_by={self.weigh_by!r} must be 'pair' or 'vote'")

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
        """Whether batches of `per_device_train_batch_size` are to hold pairs of similar length."""
        return self.train_sampling_strategy == "group_by_length"


def likelihood_settings(args: DiscoRewardConfig, found: Survey) -> dict[str, Any]:
    """
    What is learned, or given, of how people answer: the settings of a `disco_trl.models.heads.LikelihoodHead`.

    Args:
        args: what the user gives.
        found: in the training data.

    Raises:
        ValueError: one rating, or too many different ones.
    """
    settings: dict[str, Any] = {}
    if args.location_error or (args.location_error is None and found.has_several_ratings):
        settings["location_error"] = True
    if found.has_ties or args.tie_width is not None:
        settings["tie_width"] = "learned" if args.tie_width is None else float(args.tie_width)
    if args.label_noise is None:
        settings["label_noise"] = "learned"
    elif args.label_noise > 0:
        settings["label_noise"] = float(args.label_noise)
    if args.rating_values is not None:
        settings["rating_values"] = [float(value) for value in args.rating_values]
    elif found.ratings:
        settings["rating_values"] = sorted(found.ratings)
    if not 2 <= len(settings.get("rating_values", (0, 1))) <= MOST_RATING_VALUES:
        raise ValueError(
            f"train dataset, columns 'chosen_rating' and 'rejected_rating': {len(settings['rating_values'])} "
            f"different ratings, where 2 to {MOST_RATING_VALUES} can be told apart; round them, or give all there can "
            "be in rating_values"
        )
    return settings
