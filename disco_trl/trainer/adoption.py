"""
How a model becomes a disco model inside of TRL's constructor.

TRL builds a string model between seeding and wrapping it with PEFT, by its own rules for dtype, devices, revision and
tokenizer. Those rules are kept only if TRL builds the model, so the class that it asks is lent to it, and the model is
adopted the moment that it exists: it gets its scale and what else is learned, and PEFT is told to train and save them.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from peft import PeftConfig
from trl.trainer import reward_trainer as trl_reward_trainer

from ..data.judgements import MOST_RATING_VALUES, Survey
from ..models.adapters import save_reward_head
from ..models.modeling import DiscoRewardModel
from ..models.upgrade import upgrade
from .epistemic import MOST_DIRECTIONS
from .reward_config import DiscoRewardConfig


def likelihood_settings(args: DiscoRewardConfig, found: Survey) -> dict[str, Any]:
    """
    Decide what is learned of how people answer, and what is given.

    Args:
        args ([`DiscoRewardConfig`]):
            What the user has set.
        found ([`~disco_trl.data.judgements.Survey`]):
            What the training data hold.

    Returns:
        `dict[str, Any]`: Settings of a [`~disco_trl.models.heads.LikelihoodHead`].

    Raises:
        `ValueError`: If there is one rating only, or more different ones than can be told apart.
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


class Adoption:
    """
    Makes the model of one trainer a disco model, wherever it comes from.

    Args:
        args ([`DiscoRewardConfig`]):
            Configuration of the trainer.
        likelihood (`dict[str, Any]`):
            What is learned of how people answer, the settings of a `disco_trl.models.heads.LikelihoodHead`.
        ratings (`Mapping[float, int]`):
            How often the training data hold each rating, for the thresholds to start from.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The user's PEFT configuration. It is copied, as the head has to be added to it.

    Attributes:
        peft_config ([`~peft.PeftConfig`], *optional*):
            The copy, which trains and saves the head once the model has been adopted.
        model ([`~disco_trl.DiscoRewardModel`]):
            The adopted model, without any adapter around it.
    """

    model: DiscoRewardModel

    def __init__(
        self,
        args: DiscoRewardConfig,
        likelihood: dict[str, Any],
        ratings: Mapping[float, int],
        peft_config: PeftConfig | None,
    ):
        self.args = args
        self.likelihood = likelihood
        self.ratings = ratings
        self.peft_config = copy.deepcopy(peft_config)
        self._head_weights: dict[str, dict[str, torch.Tensor]] = {}

    def adopt(self, model: Any) -> None:
        """
        Give a model its scale and what else is learned, in place.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                Sequence classifier with one label, disco model, or an adapter around either.

        Raises:
            `ValueError`: If the model cannot carry a reward distribution, or its checkpoint contradicts `args`.
        """
        self.model = upgrade(model, self.args.reward_family, self.args.fixed_scale, self.likelihood)
        if self.args.epistemic:
            self.model.add_epistemic(MOST_DIRECTIONS)
        if "rating_values" in self.likelihood:
            self.model.init_thresholds(self.ratings)
        if isinstance(self.peft_config, PeftConfig):  # TRL refuses any other type
            save_reward_head(self.peft_config, self.model)
        self._head_weights = {
            name: {key: value.clone() for key, value in head.state_dict().items()}
            for name, head in self.model.named_reward_heads()
        }

    def load(self, path: str, **kwargs: Any) -> Any:
        """
        Load and adopt a model.

        Args:
            path (`str`):
                Hub id or directory.
            **kwargs:
                What TRL passes to `from_pretrained`.

        Returns:
            [`~disco_trl.DiscoRewardModel`] or [`~peft.PeftModel`]: The model.
        """
        model = DiscoRewardModel.from_pretrained(
            path, reward_family=self.args.reward_family, fixed_scale=self.args.fixed_scale, is_trainable=True, **kwargs
        )
        self.adopt(model)
        return model

    def lend_model_class(self) -> contextlib.AbstractContextManager[None]:
        """Have TRL's constructor build a string model by [`load`] while this context lasts, in this thread alone."""
        return _loading_with(self.load)

    def restore_heads(self) -> None:
        """
        Put the heads' float32 values back after TRL has rounded them.

        TRL (1.12 to 1.16) casts every trainable parameter of a quantized model to bfloat16 once it is wrapped, the
        head included. Casting up again would keep the rounded values.
        """
        (any_weights, *_) = self._head_weights.values()
        for name, head in self.model.named_reward_heads():
            if head.weight.dtype != torch.float32:
                head.to(torch.float32)
                # Copies that PEFT has made of the head since have names of their own, and the same values.
                head.load_state_dict(self._head_weights.get(name, any_weights))
        self._head_weights.clear()  # the trainer lives on, and needs no second copy of its heads


_LOAD: ContextVar[Callable[..., Any] | None] = ContextVar("disco_trl_load", default=None)


class _LentModelClass:
    """
    What TRL's reward trainer takes for `AutoModelForSequenceClassification` while a trainer of ours is constructed.

    TRL (1.12 to 1.16) hands this global of its module to a function that only calls `from_pretrained` on it, and has
    no argument to name another class. The global is one for the whole process, so whom it serves is a context
    variable: a plain `RewardTrainer` that another thread constructs meanwhile gets TRL's own class.
    """

    def __init__(self, original: Any):
        self.original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def from_pretrained(self, path: str, **kwargs: Any) -> Any:
        load = _LOAD.get() or self.original.from_pretrained
        return load(path, **kwargs)


_lock = threading.Lock()
_lent = 0  # how many trainers are being constructed, in all threads


@contextlib.contextmanager
def _loading_with(load: Callable[..., Any]) -> Iterator[None]:
    global _lent
    name = "AutoModelForSequenceClassification"
    with _lock:
        if _lent == 0:
            setattr(trl_reward_trainer, name, _LentModelClass(getattr(trl_reward_trainer, name)))
        _lent += 1
    token = _LOAD.set(load)
    try:
        yield
    finally:
        _LOAD.reset(token)
        with _lock:
            _lent -= 1
            if _lent == 0:
                setattr(trl_reward_trainer, name, getattr(trl_reward_trainer, name).original)
