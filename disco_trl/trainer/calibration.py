"""
Calibration: what training leaves open about the scale and the unit of reward, fitted when it ends.

One pass of small steps leaves the scale half-way, and makes the model overconfident about texts that it has never
seen. The predictions that it made of its training pairs before it learned from them
(`disco_trl.trainer.predictions`) are free of that. [`calibrate`] fits to them, in turn,

1. the scale, if predictions that it was not fitted to support one (`disco_trl.trainer.scale_fit`). Otherwise it
   becomes constant;
2. two dials, to which of two answers people prefer and not to how strongly. A factor multiplies the locations
   (temperature scaling; C. Guo et al., 2017), and a share of the variance of a reward is taken to be the model's own
   error τ, which all answers have alike, rather than people's disagreement σ. Strengths and ratings say how people
   differ; a probability has to count the model's error as well. (It takes the place of an error that was learned
   during training.);
3. the tie width and the boundaries between strengths, given these.

The dials are forecasts in advance (A. P. Dawid, 1984), made by the model in the later half of training. Both have
priors. The factor is shrunk to 1 where it is uncertain, and its uncertainty takes into account that pairs share
answers. The share of the model's error is the mean of its posterior under a uniform prior: where the preferences
cannot tell, half of the variance. At a share of 1 the scale does not act on probabilities at all. Where nobody
compared answers, the ratings themselves tell the share (`disco_trl.trainer.rating_share`).

After several passes the model knows its training pairs by heart, and its rewards have grown. The dials are then fitted
to pairs that were set aside (`disco_trl.trainer.unseen_pairs`), with a wider prior of the factor. The scale is fitted
to the predictions of the first pass all the same: they are many more, and the states that they were made from hardly
change what it learns. (On tweets, 2,160 graded comparisons and three passes, its rank correlation with people's
standard deviation was 0.35 from the states of the first pass, 0.34 from those of the last, 0.30 from states and
locations of the last.)

The gauge holds: the variance of a reward about its prediction, σ² + τ², keeps the family's unit as its geometric mean
where the scale is constant, so that one unit of reward stays about one logit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from scipy.optimize import minimize_scalar
from torch import Tensor

from ..data.columns import OVERALL
from ..distributions.families import Normal
from ..distributions.reward_distribution import Family, RewardDistribution
from ..models.distributed import is_in_shards
from ..models.reward_head import RewardHead
from ..models.scale_head import bounded_exp, bounded_log
from .head_fit import HeadFit, NothingToFit, check_finite
from .predictions import PredictionMemory, Predictions, numbered
from .rating_share import LARGEST_SHARE, share_of_ratings
from .scale_fit import Evidence, dyadic_standard_error, fit_scale


logger = get_logger(__name__)

LEAST_PAIRS = 512
"""Smallest number of predictions that a head is calibrated by."""
FACTOR_WIDTH, FACTOR_WIDTH_OF_UNSEEN = 0.05, 0.5
"""Width of the prior of the log of the factor, a Student's t distribution with `FACTOR_DEGREES` degrees of freedom.
One pass ends near a factor of 1, and a factor of 2 is no surprise after training that went wrong. In several passes,
rewards grow beyond what they are worth on other pairs, such as those that are set aside."""
FACTOR_DEGREES = 3
LARGEST_FACTOR = 100.0
"""Largest factor, and the inverse of the smallest. A head that is further off has not been trained."""
SHARES = tuple(np.linspace(0, LARGEST_SHARE, 6).tolist())
"""Shares of the variance that may be the model's own error, of which preferences tell the best."""
LEAST_EVIDENCE = 8.0
"""By how many nats predictions have to be better than a coin (4 standard errors of a single parameter)."""
MOST_SIGNS = 2048
"""Number of latest preferences that the dials are fitted to."""


@dataclass(frozen=True)
class Dials:
    """
    How the variance of a reward about its prediction is made up, and in which unit.

    Attributes:
        factor (`float`):
            Factor of the locations.
        scale_level (`float`):
            Factor of the scales.
        location_error (`float`):
            Standard deviation τ of the model's own error, in reward units.
    """

    factor: float = 1.0
    scale_level: float = 1.0
    location_error: float = 0.0

    @classmethod
    def of_share(cls, share: float) -> Dials:
        """Those with which a share of the variance of a reward is the model's own error."""
        # The error of a location is a normal one, with a unit of its own.
        return cls(1.0, math.sqrt(1 - share), math.sqrt(share) * Normal.unit_scale)


class Signs:
    """
    Forecasts of which of two answers people prefer, as a function of the dials.

    Where nobody compared two answers but both have ratings, each rating of one is compared with each of the other.
    Ties and equal ratings are left out, as they are where forecasts are evaluated.

    Args:
        head ([`~disco_trl.models.reward_head.RewardHead`]):
            Head that made the predictions.
        family ([`~disco_trl.distributions.families.Family`]):
            Family of its rewards.
        predictions ([`Predictions`]):
            Pairs as they were predicted in advance.
        log_scale (`torch.DoubleTensor` of shape `(P, 2)`):
            log(σ / unit) of both sides.
        error_factor (`torch.DoubleTensor` of shape `(P, 2, H)`, *optional*):
            Factors of the errors of the locations, see [`~disco_trl.models.epistemic_head.EpistemicHead`].
        factor_width (`float`, *optional*, defaults to `0.05`):
            Width of the prior of the log of the factor.
    """

    def __init__(
        self,
        head: RewardHead,
        family: Family,
        predictions: Predictions,
        log_scale: Tensor,
        error_factor: Tensor | None = None,
        factor_width: float = FACTOR_WIDTH,
    ):
        judgements = predictions.judgements
        wins, losses = judgements.wins.double(), judgements.losses.double()
        if judgements.rating_counts is not None:
            rated = _comparisons_of_ratings(*judgements.rating_counts.double().chunk(2))
            is_compared = wins + losses > 0
            wins, losses = (torch.where(is_compared, *each) for each in zip((wins, losses), rated, strict=True))
        said = torch.nonzero(wins + losses > 0)[-MOST_SIGNS:, 0]
        weight = judgements.weight.double()[said]
        self.are_of_ratings = judgements.rating_counts is not None and not bool(is_compared.any())
        self.wins, self.losses = wins[said] * weight, losses[said] * weight
        self.location, self.log_scale = predictions.location.double()[said], log_scale[said]
        self.shape = family.shape_from_raw(predictions.raw_shape.double()[said]) if family.shape_names else None
        self.answers = numbered(predictions.answers)[said]
        self.error_factor = None if error_factor is None else error_factor[said]
        self.family = family
        self.unit_scale = head.scale.unit_scale
        self.factor_width = factor_width

    def __len__(self) -> int:
        return len(self.location)

    @torch.no_grad()
    def losses_of(self, dials: Dials) -> Tensor:
        """The loss of each pair `(P,)`, in nats."""
        location = self.location * dials.factor
        scale = self.unit_scale * dials.scale_level * bounded_exp(self.log_scale)
        error = torch.full_like(location, dials.location_error) if dials.location_error else None
        if self.error_factor is not None:
            own = self.error_factor.norm(dim=-1)
            error = own if error is None else torch.hypot(own, error)
        rewards = RewardDistribution(location, scale, self.family, self.shape, error, self.error_factor)
        chosen, rejected = rewards[:, 0], rewards[:, 1]
        losses = torch.zeros_like(self.wins)
        # Mostly one of the two is 0, and with errors a probability is an integral.
        for times, better, worse in ((self.wins, chosen, rejected), (self.losses, rejected, chosen)):
            said = times.nonzero()[:, 0]
            if len(said):
                losses[said] -= times[said] * better[said].log_prob_greater(worse[said])
        return losses

    def fit_factor(self, dials: Dials) -> tuple[Dials, float]:
        """
        Find the most likely factor, given the other dials.

        Args:
            dials ([`Dials`]):
                The others.

        Returns:
            `tuple[Dials, float]`: The dials with that factor, and their loss, in nats.
        """

        def of(log_factor: float) -> Dials:
            return Dials(math.exp(log_factor), dials.scale_level, dials.location_error)

        bound, step = math.log(LARGEST_FACTOR), 0.05
        most_likely = minimize_scalar(
            lambda log_factor: self.losses_of(of(log_factor)).sum().item(),
            bounds=(-bound, bound),
            method="bounded",
            options={"xatol": 1e-3},
        ).x
        left, middle, right = (self.losses_of(of(most_likely + shift)) for shift in (-step, 0.0, step))
        # Pairs that share an answer are not independent. Their information counts less by the ratio of the variance of
        # its slope, with the dependence, to what it would be without.
        slope = (right - left) / (2 * step)
        information = max((left - 2 * middle + right).sum().item() / step**2, 1e-12)
        effect = max(dyadic_standard_error(slope, self.answers) ** 2 / information, 1.0)

        def objective(log_factor: float) -> float:
            prior = (FACTOR_DEGREES + 1) / 2 * math.log1p((log_factor / self.factor_width) ** 2 / FACTOR_DEGREES)
            return self.losses_of(of(log_factor)).sum().item() / effect + prior

        # It has a minimum near that of either term, and no other.
        found = [
            minimize_scalar(objective, bounds=ends, method="bounded", options={"xatol": 1e-4})
            for ends in ((-bound, 0.0), (0.0, bound))
        ]
        best = min(found, key=lambda result: result.fun)
        return of(float(best.x)), float(self.losses_of(of(float(best.x))).sum())

    def fit_share(self) -> float:
        """
        Find the share of the model's own error in the variance of a reward.

        Returns:
            `float`: The mean of its posterior.
        """
        logs = np.array([-self.fit_factor(Dials.of_share(share))[1] for share in SHARES])
        posterior = np.exp(logs - logs.max())
        return float(posterior @ SHARES / posterior.sum())

    def check(self, dials: Dials, loss: float) -> None:
        """Raise [`NothingToFit`] if the forecasts are worth nothing, or if no factor suits them."""
        worth = (self.wins + self.losses).sum().item() * math.log(2) - loss
        if not worth > LEAST_EVIDENCE:
            raise NothingToFit(
                f"{len(self)} predictions are hardly better than chance (by {max(worth, 0.0):.1f} nats), and say next "
                "to nothing about the unit of reward; change learning_rate, or train on more pairs"
            )
        if dials.factor > 0.99 * LARGEST_FACTOR:
            raise NothingToFit(
                f"the factor of the rewards that fits best is {LARGEST_FACTOR:g} or more, as if every prediction were "
                "right, or training had hardly begun; train on more pairs, or raise learning_rate"
            )


def _comparisons_of_ratings(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """
    From counts `(P, L)` of ratings to wins and losses `(P,)` in comparisons of raters.

    They are shares of the pairs of raters who do not agree, times the number of ratings: the weight of a judgement is
    that of a rating.
    """
    higher = [(a * (b.cumsum(dim=1) - b)).sum(dim=1) for a, b in ((first, second), (second, first))]
    amount = (first + second).sum(dim=1) / (higher[0] + higher[1]).clamp_min(1e-12)
    return higher[0] * amount, higher[1] * amount


def calibrate(
    head: RewardHead, family: Family, predictions: Predictions, unseen: Predictions | None = None
) -> dict[str, float]:
    """
    Fit the scale, the dials and the widths to predictions, in place.

    Args:
        head ([`~disco_trl.models.reward_head.RewardHead`]):
            Head that is changed.
        family ([`~disco_trl.distributions.families.Family`]):
            Family of its rewards.
        predictions ([`Predictions`]):
            What the head predicted in advance, and what people said.
        unseen ([`Predictions`], *optional*):
            What it predicts, as it is, of pairs that it was not trained on. The dials are fitted to these. By default
            training is one pass, and they are fitted to the later half of it.

    Returns:
        `dict[str, float]`: Metrics to log: `calibration_factor` and `scale_level`, factors of locations and scales;
            `model_error`, in reward units; and `scale_gain` and `scale_gain_error`, by how much a scale that varies
            predicts what people say about other answers better than a constant one, in nats.

    Raises:
        [`NothingToFit`]: If there are too few predictions, or they are worth nothing, in which case the head is left
            as it was.
    """
    if len(predictions) < LEAST_PAIRS:
        raise NothingToFit(
            f"{len(predictions)} predictions are kept on the first process, and {LEAST_PAIRS} are needed; train on "
            "more pairs, or check the probabilities with `disco-trl evaluate`"
        )
    scale = fit_scale(head, family, predictions.in_hindsight())
    if unseen is None:
        latest, log_scale, width = predictions.recent(), scale.log_scale[len(predictions) // 2 :], FACTOR_WIDTH
    else:
        latest, log_scale, width = unseen, scale.log_scale_of(head, unseen), FACTOR_WIDTH_OF_UNSEEN
    signs = Signs(head, family, latest, log_scale, factor_width=width)
    dials = Dials()
    if len(signs):
        if signs.are_of_ratings:
            factor = signs.fit_factor(Dials.of_share(LARGEST_SHARE / 2))[0].factor
            dials = Dials.of_share(share_of_ratings(head, family, latest, log_scale, factor, Normal.unit_scale))
        elif scale.weight is not None:
            dials = Dials.of_share(signs.fit_share())
        # Otherwise the model's own error and people's disagreement act alike, and all of the variance is the latter.
        dials, loss = signs.fit_factor(dials)
        signs.check(dials, loss)
    weight = torch.zeros_like(head.scale.weight) if scale.weight is None else scale.weight[None].to(head.scale.weight)
    known = predictions if unseen is None else unseen
    head.refit(known.scale_states.flatten(0, 1), known.location.flatten(), dials.factor, weight)
    head.scale.log_level.fill_(math.log(dials.scale_level))
    head.scale.location_error.fill_(dials.location_error)
    if head.likelihood is not None:
        head.likelihood.forget_location_error()
    evidence = Evidence(head, family, latest, torch.ones_like(head.scale.mean_hidden).cpu().double())
    evidence.settle(head, weight[0].cpu().double(), dials.factor, dials.scale_level, dials.location_error)
    return {
        "calibration_factor": dials.factor,
        "scale_level": dials.scale_level,
        "model_error": dials.location_error,
        "scale_gain": scale.gain,
        "scale_gain_error": scale.standard_error,
    }


def recalibrate_unit(
    head: RewardHead, family: Family, predictions: Predictions, factor_width: float = FACTOR_WIDTH
) -> float:
    """
    Fit the unit of the locations again, in place, for a head with epistemic uncertainty.

    P(a ≻ b) counts the epistemic uncertainty of each answer. The factor that [`calibrate`] has found stands for all
    errors of the model, these included, so that with both the probabilities would be too close to ½.

    Args:
        head ([`~disco_trl.models.reward_head.RewardHead`]):
            Calibrated head whose [`~disco_trl.models.epistemic_head.EpistemicHead`] is fitted.
        family ([`~disco_trl.distributions.families.Family`]):
            Family of its rewards.
        predictions ([`Predictions`]):
            Predictions in advance, in the unit that the head has now.
        factor_width (`float`, *optional*, defaults to `0.05`):
            Width of the prior of the log of the factor.

    Returns:
        `float`: Factor that the locations were multiplied by.
    """
    assert head.epistemic is not None
    errors = head.epistemic(predictions.hidden_states.to(head.weight.device)).cpu().double()  # [P, 2, H]
    with torch.no_grad():
        scale = head.scale(predictions.scale_states.to(head.weight.device))[..., 0].cpu().double()
    log_scale = bounded_log(scale / (head.scale.unit_scale * head.scale.log_level.exp().item()))
    signs = Signs(head, family, predictions, log_scale, errors, factor_width)
    dials = Dials(1.0, head.scale.log_level.exp().item(), head.scale.location_error.item())
    factor = signs.fit_factor(dials)[0].factor if len(signs) else 1.0
    head.refit(predictions.scale_states.flatten(0, 1), predictions.location.flatten(), factor)
    return factor


def announce(factor: float, attribute: str = OVERALL) -> None:
    """
    Log a factor, as a warning where it is more than a tenth.

    Args:
        factor (`float`):
            Factor that the rewards were multiplied by.
        attribute (`str`, *optional*, defaults to `"overall"`):
            Their attribute.
    """
    rewards = "the rewards" if attribute == OVERALL else f"the rewards for {attribute}"
    logger.log(
        logging.WARNING if abs(math.log(factor)) > 0.1 else logging.INFO,
        f"Calibration has multiplied {rewards} by {factor:.3g}. What was tuned to rewards that are not calibrated, "
        "such as those logged during training (a KL coefficient, a threshold), has to be multiplied by that, too.",
    )


ONE_PASS = "set num_train_epochs=1 (TRL's default is 3), or max_steps to one pass or less"


def why_no_forecasts(passes: float) -> str:
    """
    Say why a head cannot be calibrated by what training has predicted.

    Args:
        passes (`float`):
            Number of passes through the training data.
    """
    return (
        f"training goes through its data {passes:.3g} times, and what the model predicts of pairs that it has learned "
        "from is no forecast"
    )


class Calibration(HeadFit):
    """
    Calibrates a head when training ends; see [`calibrate`].

    A scale that nothing supports does not leave training: it becomes constant where the head cannot be calibrated.

    Args:
        whole_head, family, memory, log, attribute, refusal:
            As in [`HeadFit`].
        predict_unseen (`Callable[[str], Predictions]`, *optional*):
            Function that predicts pairs which are not trained on, for an attribute; see
            [`~disco_trl.trainer.unseen_pairs.UnseenPairs`]. Without it, training must go through its data once.

    Attributes:
        forecasts ([`Predictions`], *optional*):
            What the dials were fitted to, in the unit that the head has now.
    """

    without = "The rewards are not calibrated"

    def __init__(self, *args: Any, predict_unseen: Callable[[str], Predictions] | None = None):
        super().__init__(*args)
        self.predict_unseen = predict_unseen
        self.forecasts: Predictions | None = None

    @property
    def factor_width(self) -> float:
        """Width of the prior of the log of the factor."""
        return FACTOR_WIDTH if self.predict_unseen is None else FACTOR_WIDTH_OF_UNSEEN

    def why_not(self, args: Any, state: Any) -> str | None:
        reason = super().why_not(args, state)
        if reason is None and self.predict_unseen is None and (state.epoch or 0) > 1 + 1e-6:
            return f"{why_no_forecasts(state.epoch)}; {ONE_PASS}"
        return reason

    def kept(self, memory: PredictionMemory) -> Predictions | None:
        return memory.forecasts(self.attribute)

    def fit(self, predictions: Predictions, args: Any, state: Any) -> dict[str, float]:
        assert self.memory is not None
        unseen = None if self.predict_unseen is None else self.predict_unseen(self.attribute).judged()
        if unseen is not None:
            check_finite(unseen)
        metrics = calibrate(self.head, self.family, predictions, unseen)
        factor = metrics["calibration_factor"]
        self.memory.rescale(factor, self.attribute)
        self.follow(factor)
        forecasts = predictions.recent() if unseen is None else unseen
        self.forecasts = replace(forecasts, location=factor * forecasts.location)
        announce(factor, self.attribute)
        if self.head.scale.is_constant:
            about = "" if self.attribute == OVERALL else f" ({self.attribute})"
            logger.warning(f"The scale is the same for every answer{about}: {why_constant(metrics)}.")
        return metrics

    def give_up(self) -> str:
        scale = self.head.scale
        if is_in_shards(scale.weight) or not scale.is_constant:
            scale.make_constant()
            self.changed = True
        return " The scale is the same for every answer, as nothing supports another one."


def why_constant(metrics: dict[str, float]) -> str:
    """
    Say why a scale was made constant, and what to collect instead.

    Args:
        metrics (`dict[str, float]`):
            What [`calibrate`] returns.
    """
    gain, error = metrics["scale_gain"], metrics["scale_gain_error"]
    found = (
        f"one that varies predicts what people say about answers that it was not fitted to better by {gain:.1f} ± "
        f"{error:.1f} nats, which may be chance"
        if gain > 0
        else "none that varies predicts what people say about answers that it was not fitted to any better"
    )
    return (
        f"{found}. To learn where people disagree, ask them how much better an answer is (the column "
        "preference_strength), or for 3 to 5 ratings of a tenth of the answers (chosen_rating, rejected_rating)"
    )
