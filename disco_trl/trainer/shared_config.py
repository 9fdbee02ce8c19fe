"""Fields and checks that the configurations of all trainers share: how people answer, and how a batch is weighed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from ..data.records import MOST_LEVELS
from ..distributions.reward_distribution import get_family


logger = get_logger(__name__)

LIKELIHOOD_LEARNING_RATE = 0.02
"""Learning rate of what the likelihood learns beside the rewards, such as the tie width and the rating thresholds.

They are a few numbers in units of reward, or logarithms, which a language model's learning rate would hardly move.
"""


@dataclass
class SharedConfig:
    """
    What the configurations of disco-trl's trainers add to those of TRL's, and what they change for both.

    It is inherited beside one of TRL's configurations and before it, whose fields it does not repeat. Its own fields
    are documented where they are used, in [`DiscoRewardConfig`] and [`DiscoDPOConfig`].
    """

    if TYPE_CHECKING:  # Each configuration has a default and a help text of its own.
        reward_family: str | None = None
        fixed_scale: float | None = None

    tie_width: float | None = field(
        default=None,
        metadata={
            "help": "Half-width, in reward units, of the band within which two rewards are called equal. If `None`, "
            "it is learned if the training data have ties."
        },
    )
    label_noise: float | None = field(
        default=0.0,
        metadata={
            "help": "Probability, below 0.5, that a vote is the opposite of what was meant. If `None`, it is learned."
        },
    )
    strength_levels: int | None = field(
        default=None,
        metadata={
            "help": "Number L of levels of `preference_strength`, which holds whole numbers from -L to L. If `None`, "
            "it is the largest strength in the training data. With 1, strengths are read as votes."
        },
    )
    weigh_by: str = field(
        default="pair",
        metadata={
            "help": "What has weight 1 in the loss: all judgements in a row of the dataset together ('pair'), or each "
            "vote, each rating and each ranked pair ('vote'). A column `weight` multiplies either.",
            "choices": ["pair", "vote"],
        },
    )
    prefix_sharing: bool = field(
        default=True,
        metadata={
            "help": "Whether to compute what the sequences of a batch begin with (the prompt of a pair, a system "
            "prompt of all) only once, and without padding. The loss and the gradient of each pair are the same to "
            "rounding. For models that do not support it batches are padded, and a warning is logged."
        },
    )
    # TRL's default, `gradient_checkpointing=True`, stays the default where this is None.
    if "activation_checkpointing" not in {inherited.name for inherited in fields(TrainingArguments)}:
        activation_checkpointing: bool | None = field(
            default=None,
            metadata={
                "help": "Whether to drop activations and compute them again in the backward pass. It is the new name "
                "of `gradient_checkpointing`.",
                "nargs": "?",
                "const": True,
            },
        )

    def __post_init__(self) -> None:
        args: Any = self  # which are transformers' too
        lacks_bfloat16 = args.bf16 is None and not args.fp16 and not _has_bfloat16(args.use_cpu)
        if lacks_bfloat16:
            args.bf16 = False
        # transformers warns of the old name also where it holds no more than TRL's default.
        if args.activation_checkpointing is None:
            args.activation_checkpointing = getattr(args, "gradient_checkpointing", None)
        else:
            args.gradient_checkpointing = args.activation_checkpointing
        # A command line has words only, and transformers declares a path.
        resume = args.resume_from_checkpoint
        if isinstance(resume, str) and resume.lower() in ("true", "false"):
            resume = resume.lower() == "true"
        args.resume_from_checkpoint = resume
        # transformers takes every metric whose name does not end in "loss" for one to maximize.
        if args.greater_is_better is None and (args.metric_for_best_model or "").endswith("nll"):
            args.greater_is_better = False
        super().__post_init__()  # type: ignore[misc]  # TRL's
        # The launcher's mixed precision holds where the config names none.
        if lacks_bfloat16 and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no":
            # Only now accelerate knows which process speaks for all.
            logger.warning(
                f"Training is in float32: bf16 is not set, and this machine has no accelerator with bfloat16 (device: "
                f"{args.device.type}). Set bf16=False to silence this line, fp16=True on an older GPU, or "
                "use_cpu=True and bf16=True on a CPU with fast bfloat16."
            )
        if self.reward_family is not None:
            get_family(self.reward_family)
        if self.fixed_scale is not None and not 0 < self.fixed_scale < float("inf"):
            raise ValueError(f"fixed_scale={self.fixed_scale!r} must be a positive, finite number")

        if self.tie_width is not None and not 0 < self.tie_width < float("inf"):
            raise ValueError(f"tie_width={self.tie_width!r} must be a positive, finite number, or None to learn it")
        if self.label_noise is not None and not 0 <= self.label_noise < 0.5:
            raise ValueError(f"label_noise={self.label_noise!r} must be at least 0 and below 0.5, or None to learn it")
        if self.strength_levels is not None and self.strength_levels not in range(1, MOST_LEVELS + 1):
            raise ValueError(
                f"strength_levels={self.strength_levels!r} must be a whole number from 1 to {MOST_LEVELS}, or None"
            )
        if self.weigh_by not in ("pair", "vote"):
            raise ValueError(f"weigh_by={self.weigh_by!r} must be 'pair' or 'vote'")


def _has_bfloat16(use_cpu: bool) -> bool:
    """Whether transformers lets this machine train in bfloat16. Of a CPU that was asked for it does not doubt it."""
    return use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()
