"""
How a model becomes a disco model inside of TRL's constructor.

TRL builds a string model between seeding and wrapping it with PEFT, by its own rules for dtype, devices, revision and
tokenizer. Those rules are kept only if TRL builds the model, so the class that it asks is lent to it, and the model is
adopted the moment that it exists: it gets its scale and what else is learned, and PEFT is told to train and save them.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from trl import RewardTrainer

from ..data.judgements import MOST_RATING_VALUES, SURVEYED_OF_STREAM, Survey, why_not_a_scale
from ..distributions.reward_distribution import Family
from ..models.adapters import save_reward_head
from ..models.lending import lend
from ..models.likelihood_head import label_noise_from_raw
from ..models.modeling import DiscoRewardModel
from ..models.scale_layer import default_scale_layer
from ..models.upgrade import upgrade
from .epistemic import MOST_DIRECTIONS
from .reward_config import DiscoRewardConfig
from .shared_config import SharedConfig
from .upstream_checks import upstream_error


logger = get_logger(__name__)

IDLE = 0.01
"""Share of a pair's likelihood, and of the pairs, below which what is lost is not worth a warning."""
MODEL_CLASS = "AutoModelForSequenceClassification"
"""Global by which TRL's constructor builds a string model."""


def likelihood_settings(args: DiscoRewardConfig, found: Survey) -> dict[str, Any]:
    """
    Decide what is learned of how people answer, and what is given.

    Args:
        args ([`DiscoRewardConfig`]):
            What the user has set.
        found ([`~disco_trl.data.judgements.Survey`]):
            What the training data hold.

    Returns:
        `dict[str, Any]`: Settings of a [`~disco_trl.models.likelihood_head.LikelihoodHead`].

    Raises:
        `ValueError`: If `args` name more different ratings than can be told apart, or if the data hold only ratings
            and these are not on a scale.
    """
    if args.rating_values is None and not found.ratings_on_a_scale and found.ratings and not found.has_comparisons:
        raise ValueError(
            "train dataset, columns 'chosen_rating' and 'rejected_rating': nobody compared the answers, and the "
            f"ratings have nothing to teach: {why_not_a_scale(found.ratings)}; round them to the steps of a scale"
        )
    return answer_settings(args, found, args.rating_values)


def answer_settings(args: SharedConfig, found: Survey, rating_values: Sequence[float] | None = None) -> dict[str, Any]:
    """
    Decide what is learned of how people answer about one attribute.

    Args:
        args ([`DiscoRewardConfig`] or [`DiscoDPOConfig`]):
            What the user has set.
        found ([`~disco_trl.data.judgements.Survey`]):
            What the training data hold about the attribute.
        rating_values (`Sequence[float]`, *optional*):
            Ratings that the user names.

    Returns:
        `dict[str, Any]`: As in [`likelihood_settings`].
    """
    settings: dict[str, Any] = {}
    if rating_values is not None:
        settings["rating_values"] = [float(value) for value in rating_values]
    elif ratings := found.ratings_on_a_scale:
        settings["rating_values"] = sorted(ratings)
    if len(settings.get("rating_values", ())) > MOST_RATING_VALUES:
        raise ValueError(
            f"rating_values has {len(settings['rating_values'])} different ratings, where 2 to {MOST_RATING_VALUES} "
            "can be told apart; round them"
        )
    levels = max(found.strengths, default=0) if args.strength_levels is None else args.strength_levels
    if levels > 1:  # preferences of one strength are votes
        settings["strength_levels"] = levels
    several = found.has_several_ratings and "rating_values" in settings
    location_error = getattr(args, "location_error", False)  # which a policy has none of
    if location_error or (location_error is None and several):
        settings["location_error"] = True
    if found.has_ties or args.tie_width is not None:
        settings["tie_width"] = "learned" if args.tie_width is None else float(args.tie_width)
    if args.label_noise is None:
        settings["label_noise"] = "learned"
    elif args.label_noise > 0:
        settings["label_noise"] = float(args.label_noise)
    return settings


def attribute_settings(args: DiscoRewardConfig, found: Survey) -> dict[str, Any] | None:
    """
    Decide which attributes there are, what is learned of each, and how they make up the overall reward.

    Args:
        args ([`DiscoRewardConfig`]):
            What the user has set.
        found ([`~disco_trl.data.judgements.Survey`]):
            What the training data hold.

    Returns:
        `dict[str, Any]`, *optional*: Settings for [`~disco_trl.DiscoRewardModel.add_attributes`], or `None` if there
            are no attributes.

    Raises:
        `ValueError`: If the user names an attribute that nobody judged, if the weights are none, or if they are to be
            learned from data that do not determine them.
    """
    judged = ", ".join(map(repr, found.attributes)) or "none"
    names = [*(found.attributes if args.attributes is None else args.attributes)]
    for option, asked in (("attributes", names), ("attribute_weights", args.attribute_weights or {})):
        if unknown := [name for name in asked if name not in found.attributes]:
            raise ValueError(
                f"{option} names {unknown[0]!r}, about which the training data say nothing (they say something about "
                f"{judged}); correct the name, or leave it out"
            )
    if not names:
        if args.learn_attribute_weights:
            raise ValueError(
                "learn_attribute_weights=True, but the training data say nothing about attributes, without which no "
                "weight is determined; rate or compare some (chosen_rating as a dict, or a column 'attribute')"
            )
        return None
    given = cast(dict[str, float] | None, args.attribute_weights)  # the config has read JSON
    if given is not None and (left := [name for name in given if name not in names]):
        raise ValueError(
            f"attribute_weights has {left[0]!r}, which attributes leaves out; name it in both, or in none"
        )
    weights = {name: 1 / len(names) for name in names} if given is None else {n: float(given.get(n, 0)) for n in names}
    if not all(map(math.isfinite, weights.values())) or not any(weights.values()):
        raise ValueError(f"attribute_weights={given!r} must be finite numbers, of which one or more differ from 0")
    has_rest = found.has_comparisons or bool(found.ratings_on_a_scale)
    if args.learn_attribute_weights and not has_rest:
        raise ValueError(
            "learn_attribute_weights=True, but nobody has judged the answers overall, so that nothing tells how much "
            "each attribute counts; pass attribute_weights"
        )
    if not has_rest:
        made_of = ", ".join(f"{weight:+.3g} {name}" for name, weight in weights.items())
        logger.warning(
            f"Nobody has judged the answers overall: the overall reward is the weighted sum of the attributes "
            f"({made_of}). Other weights are set by attribute_weights."
        )
    return {
        "names": names,
        "weights": [*weights.values()],
        "likelihoods": [answer_settings(args, found.attributes[name]) for name in names],
        "are_learned": has_rest if args.learn_attribute_weights is None else args.learn_attribute_weights,
        "has_rest": has_rest,
    }


def warn_of_idle_margins(dataset: Dataset | IterableDataset, family: Family, likelihood: dict[str, Any]) -> None:
    """
    Warn, once for all processes, of margins so large that label noise explains the pair better than any reward.

    With label noise ν, P(chosen wins) = (1 − ν) P(R_a − R_b > m) + ν P(R_a − R_b < m). Where the first term is nothing
    beside the second, the pair has no gradient, whatever the model is.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training data. Of a stream, the first 1,000 rows are read.
        family ([`~disco_trl.distributions.families.Family`]):
            Family of the rewards.
        likelihood (`dict[str, Any]`):
            What is learned of how people answer; see [`likelihood_settings`].
    """
    noise = likelihood.get("label_noise")
    if noise is None or "margin" not in (dataset.column_names or ()):
        return
    if isinstance(dataset, IterableDataset):
        margins = [row["margin"] for row in dataset.take(SURVEYED_OF_STREAM)]
    else:
        margins = dataset.with_format("numpy")["margin"][:]
    unit, margin = torch.tensor(family.unit_scale), torch.as_tensor(margins, dtype=torch.float32)
    shape = family.shape_from_raw(torch.zeros(len(margin), len(family.shape_names))) if family.shape_names else None
    prob = family.log_prob_greater(torch.zeros_like(margin), unit, margin, unit, shape, shape).exp()
    # At the start of training, where a learned one is 0.06
    noise = label_noise_from_raw(torch.zeros(())).item() if noise == "learned" else float(noise)
    idle = (1 - noise) * prob < IDLE * noise
    if idle.float().mean() > IDLE:
        logger.warning(
            f"train dataset, column 'margin': {int(idle.sum())} of {len(idle)} margins, up to {margin.max():g}, are "
            "so large that label noise explains the pair better than any reward (from "
            f"{margin[idle].min():g} on, with label_noise={likelihood['label_noise']!r}): these pairs teach next to "
            "nothing. Divide the margins, which are in units of reward (about one logit), or set label_noise=0"
        )


class Adoption:
    """
    Makes the model of one trainer a disco model, wherever it comes from.

    Args:
        args ([`DiscoRewardConfig`]):
            Configuration of the trainer.
        likelihood (`dict[str, Any]`):
            What is learned of how people answer, the settings of a `disco_trl.models.likelihood_head.LikelihoodHead`.
        attributes (`dict[str, Any]`, *optional*):
            What [`attribute_settings`] returns.
        found ([`~disco_trl.data.judgements.Survey`]):
            What the training data hold, for the thresholds and the boundaries between strengths to start from.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The user's PEFT configuration. It is copied, as the head has to be added to it.

    Attributes:
        peft_config ([`~peft.PeftConfig`], *optional*):
            The copy, which trains and saves the head once the model has been adopted.
        model ([`~disco_trl.DiscoRewardModel`]):
            The adopted model, without any adapter around it. An [`UpstreamError`] is raised if TRL has built a string
            model in a way that could not be adopted.
    """

    def __init__(
        self,
        args: DiscoRewardConfig,
        likelihood: dict[str, Any],
        attributes: dict[str, Any] | None,
        found: Survey,
        peft_config: PeftConfig | None,
    ):
        self.args = args
        self.likelihood = likelihood
        self.attributes = attributes
        self.found = found
        self.peft_config = copy.deepcopy(peft_config)
        self._model: DiscoRewardModel | None = None
        self._head_weights: dict[str, dict[str, torch.Tensor]] = {}

    @property
    def model(self) -> DiscoRewardModel:
        if self._model is None:
            raise upstream_error(
                f"trl's RewardTrainer built the model, and not by {MODEL_CLASS}.from_pretrained in the module of its "
                "constructor, so the model has no scale"
            )
        return self._model

    def adopt(self, model: Any) -> None:
        """
        Give a model its scale and what else is learned, in place.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                Sequence classifier with one label, disco model, or an adapter around either.

        Raises:
            `ValueError`: If the model cannot carry a reward distribution, or its checkpoint contradicts `args`.
        """
        self._model = upgrade(model, self.args.reward_family, self.args.fixed_scale, self.likelihood)
        self._choose_what_the_scale_reads()
        if self.attributes is not None:
            self._add_attributes(self.attributes)
        if self.args.epistemic:
            self.model.add_epistemic(MOST_DIRECTIONS)
        for name, likelihood in self.model.likelihoods.items():
            found = self.found.by_attribute().get(name, Survey())
            if "rating_values" in likelihood:
                self.model.init_thresholds(found.ratings, name)
            if "strength_levels" in likelihood:
                self.model.init_strengths(found.strengths, name)
        if isinstance(self.peft_config, PeftConfig):  # TRL refuses any other type
            save_reward_head(self.peft_config, self.model)
        self._head_weights = {
            name: {key: value.clone() for key, value in head.state_dict().items()}
            for name, head in self.model.named_reward_heads()
        }

    def _add_attributes(self, settings: dict[str, Any]) -> None:
        """Have the model know the attributes of the data, unless it does."""
        known = self.model.attributes
        if unknown := [name for name in settings["names"] if known and name not in known]:
            raise ValueError(
                f"the training data are about {unknown[0]!r}, and the checkpoint knows the attributes "
                f"{', '.join(map(repr, known))}; leave it out of attributes, or start from a model without any"
            )
        if not known:
            if not settings["has_rest"] and self.model.family.name != "normal":
                raise ValueError(
                    f"nobody has judged the answers overall, and a weighted sum of {self.model.family.name!r} rewards "
                    "is of no family; use reward_family='normal', or judge some answers overall"
                )
            self.model.add_attributes(settings)

    def _choose_what_the_scale_reads(self) -> None:
        """Set the layer that the scale reads, as the user says, or by default in a model that is new to training."""
        scale, layer = self.model.scale_head, self.args.scale_layer
        if layer is not None:
            self.model.set_scale_layer(layer or None)
        elif scale.fixed_scale is None and self.model.scale_layer is None and not scale.rows_seen:
            default = default_scale_layer(self.model.config)
            try:
                self.model.set_scale_layer(default)
                reason = None if default else "it has no layers that each see all tokens once"
            except ValueError as error:
                reason = str(error)
            if reason is not None:
                logger.warning(
                    f"The scale of this {type(self.model).__name__} reads the last hidden state, and no middle layer, "
                    f"which as a rule says more about disagreement: {reason}"
                )

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

    @contextlib.contextmanager
    def in_constructor(self, model: Any) -> Iterator[None]:
        """
        Adopt a model as soon as it is there: an instance now, and a string model where TRL's constructor builds it.

        Args:
            model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                What the constructor gets, which runs in this context.
        """
        if not isinstance(model, str):
            self.adopt(model)
            yield
        else:
            with _lend_model_class(self.load):
                yield

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


@contextlib.contextmanager
def _lend_model_class(load: Callable[..., Any]) -> Iterator[None]:
    """
    Have TRL's constructor build a string model by `load`, in this thread alone.

    TRL (1.12 to 1.16) hands a global of its module to a function that only calls `from_pretrained` on it, and has no
    argument to name another class. The global is looked for where the constructor is defined, as another library may
    have put a trainer of its own in the place of TRL's, with a module of its own.
    """
    constructors = [inspect.unwrap(kind.__init__) for kind in RewardTrainer.__mro__]  # type: ignore[misc]
    namespaces = [getattr(constructor, "__globals__", {}) for constructor in constructors]
    modules = {id(namespace): namespace for namespace in namespaces if MODEL_CLASS in namespace}
    with contextlib.ExitStack() as lent:
        for namespace in modules.values():
            lent.enter_context(lend(namespace, MODEL_CLASS, SimpleNamespace(from_pretrained=load)))
        yield
