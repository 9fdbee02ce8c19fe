"""
The scale of a head, fitted to predictions and kept only if predictions that it was not fitted to support it.

What people say about a pair depends on the scales of its two answers, and on errors of the locations, which look much
the same. A scale that is fitted to the pairs that it is judged by therefore always looks useful. [`fit_scale`] judges
it by cross-fitting instead. The answers, not the pairs, are divided into folds, so that an answer that recurs in many
pairs counts as one. The scale of an answer is predicted by a weight that was fitted to pairs without any answer of its
fold. These predictions are compared with a constant scale by the log-likelihood of what people said. Two pairs that
share an answer are not independent, which the standard error of the comparison takes into account (dyadic clustering;
P. Aronow, C. Samii, V. Assenova, 2015).

What is evidence: strengths of preference, and the spread of several ratings of an answer about its own level.
Votes and single ratings say next to nothing about the scale beside them, and mistake an error of a location for
disagreement. They are evidence only where there is no better.

What flows: states that the scale is read from `[P, 2, H]`, locations and judgements → weights for several ridges →
cross-fitted log scales `[P, 2]` → gain over a constant scale, in nats, and its standard error → one weight, or none.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..distributions.likelihood import log_likelihood
from ..distributions.ratings import SpreadTable, has_spread
from ..distributions.reward_distribution import Family, RewardDistribution
from ..models.likelihood_head import LikelihoodHead, to_responses, width_penalty
from ..models.reward_head import RewardHead
from ..models.scale_head import bounded_exp
from .predictions import Predictions, numbered


RIDGES = (100.0, 30.0, 10.0, 3.0)
"""Ridges that are tried. At ridge r the prior standard deviation of log σ is about 1/√r."""
FOLDS = 4
"""Number of folds of answers. A weight is fitted to the pairs without the answers of one fold, 9 of 16 on average."""
LEAST_Z = 1.645
"""Number of standard errors by which a scale has to be better than a constant one: chance exceeds it once in 20 times
at most, as a scale that was fitted to noise predicts other answers worse than a constant one."""
TOLERANCE = 0.01
"""Largest distance to its optimum, in log σ, at which a fit counts as converged."""


@dataclass
class ScaleFit:
    """
    What predictions say about the scale.

    Attributes:
        weight (`torch.DoubleTensor` of shape `(H,)`, *optional*):
            Weight of the scale head, or `None` if the scale should be constant.
        log_scale (`torch.DoubleTensor` of shape `(P, 2)`):
            Cross-fitted log(σ / unit) of both sides, with the best ridge. Zeros if there is none.
        gain (`float`):
            By how much it makes what people said more likely than a constant scale does, in nats.
        standard_error (`float`):
            Standard error of the gain.
    """

    weight: Tensor | None
    log_scale: Tensor
    gain: float
    standard_error: float

    def log_scale_of(self, head: RewardHead, predictions: Predictions) -> Tensor:
        """log(σ / unit) of both sides `(P, 2)` of pairs that it was not fitted to."""
        states = predictions.scale_states.double() - head.scale.mean_hidden.detach().cpu().double()
        return torch.zeros(states.shape[:2]).double() if self.weight is None else states @ self.weight


class Evidence:
    """
    Log-likelihood of what people said as a function of the scales.

    Everything else that the likelihood depends on is fitted along: a factor of the locations, which are predictions of
    a model that was still being trained, and the quantities of the head's
    [`~disco_trl.models.likelihood_head.LikelihoodHead`]. Each has a prior worth about one judgement.

    Args:
        head ([`~disco_trl.models.reward_head.RewardHead`]):
            Head that made the predictions.
        family ([`~disco_trl.distributions.families.Family`]):
            Family of its rewards.
        predictions ([`Predictions`]):
            Pairs.
        unit (`torch.DoubleTensor` of shape `(H,)`):
            Unit of each feature.
    """

    def __init__(self, head: RewardHead, family: Family, predictions: Predictions, unit: Tensor):
        self.features = (predictions.scale_states.double() - head.scale.mean_hidden.detach().cpu().double()) / unit
        self.location = predictions.location.double()
        self.shape = family.shape_from_raw(predictions.raw_shape.double()) if family.shape_names else None
        self.family = family
        self.unit_scale = head.scale.unit_scale
        self.answers = numbered(predictions.answers)
        self.judgements = self.all_judgements = predictions.judgements
        self.likelihood: LikelihoodHead | None = None
        if head.likelihood is not None:
            self.likelihood = copy.deepcopy(head.likelihood).cpu().double().requires_grad_()
        self.start = {} if self.likelihood is None else _copies(self.likelihood)
        self.scale_level, self.location_error = 1.0, 0.0

        # Each answer's ratings once, though they stand in every row with the answer
        counts = predictions.rating_counts.flatten(0, 1)
        self.rated = _last_of_each(torch.cat([self.answers.flatten()[:, None], counts], dim=1), has_spread(counts))
        self.rated_answers, self.rated_features = (x.flatten(0, 1)[self.rated] for x in (self.answers, self.features))
        self.rating_counts = counts[self.rated]
        self.rated_shape = None if self.shape is None else self.shape.flatten(0, 1)[self.rated]
        is_graded = predictions.strength_counts.sum(dim=-1) + predictions.judgements.ties > 0
        is_graded &= predictions.strength_counts.shape[-1] > 0
        if len(self.rated) or is_graded.any():
            self.judgements = self.judgements.only(is_graded)

    @functools.cached_property
    def spread(self) -> SpreadTable | None:
        """Log-likelihood of each answer's ratings, which takes seconds to tabulate, or `None` if there are none."""
        if self.likelihood is None or not len(self.rated):
            return None
        thresholds = self.likelihood.values()["thresholds"].detach()
        return SpreadTable(self.family, self.rated_shape, self.rating_counts, thresholds)

    def select(self, keep: Tensor) -> Evidence:
        """
        The evidence of some of the answers.

        Args:
            keep (`torch.BoolTensor` of shape `(answers,)`):
                Which answers, by their numbers. Pairs are kept with both of their answers.
        """
        part = copy.copy(self)
        kept_ratings, keep = keep[self.rated_answers], keep[self.answers].all(dim=1)
        part.rated_features, part.rated_answers = self.rated_features[kept_ratings], self.rated_answers[kept_ratings]
        part.spread = None if self.spread is None else self.spread.select(kept_ratings)
        part.features, part.location = self.features[keep], self.location[keep]
        part.shape = None if self.shape is None else self.shape[keep]
        part.judgements = self.judgements.select(keep)
        return part

    def fit(self, ridge: float, weight: Tensor) -> Tensor | None:
        """
        Find the most likely weight, with a ridge.

        Args:
            ridge (`float`):
                Precision of the prior of the weight.
            weight (`torch.DoubleTensor` of shape `(H,)`):
                Weight to start from. (The problem is not convex. A constant scale is a good start.)

        Returns:
            `torch.DoubleTensor` of shape `(H,)`, *optional*: The weight, or `None` if the fit does not converge.
        """
        weight = weight.clone().requires_grad_()
        # About an optimum the objective bends at least as the ridge does, so the gradient bounds the distance to it.
        # In log σ a distance of the weight is √H times shorter.
        slope = self._minimize(
            lambda: (self.features @ weight, self.rated_features @ weight),
            [weight],
            lambda: ridge * weight.square().sum() / 2,
        )
        # (A slope of nan is not below the tolerance.)
        is_converged = slope is not None and slope.norm() / ridge / len(weight) ** 0.5 < TOLERANCE
        return weight.detach() if is_converged else None

    def log_probs(self, log_scale: Tensor) -> Tensor:
        """
        Evaluate the weighted log-likelihood of each pair and of each answer's ratings, with everything but the scales
        at its best.

        Args:
            log_scale (`torch.DoubleTensor` of shape `(P, 2)`):
                log(σ / unit) of both sides, of the evidence of all pairs.

        Returns:
            `torch.DoubleTensor` of shape `(P + R,)`: In nats, for R answers with several ratings.
        """
        both = log_scale, log_scale.flatten()[self.rated]
        self._minimize(lambda: both, [], lambda: torch.zeros((), dtype=torch.float64))
        with torch.no_grad():
            return torch.cat([self._log_probs(both[0], self.log_factor), self._log_spread(both[1])])

    @property
    def clusters(self) -> Tensor:
        """Answers that each term of [`Evidence.log_probs`] is about, of shape `(P + R, 2)`."""
        alone = self.answers.max() + 1 + torch.arange(len(self.rated))
        return torch.cat([self.answers, torch.stack([self.rated_answers, alone], dim=1)])

    def settle(
        self, head: RewardHead, weight: Tensor, factor: float, scale_level: float, location_error: float
    ) -> None:
        """
        Fit what a head's likelihood learns beside the rewards to all that was said, in place, given everything else.

        Args:
            head ([`~disco_trl.models.reward_head.RewardHead`]):
                Head whose [`~disco_trl.models.likelihood_head.LikelihoodHead`] is changed. One without it is left as
                it is.
            weight (`torch.DoubleTensor` of shape `(H,)`):
                Weight of the scale, for features in the unit of this evidence.
            factor, scale_level, location_error (`float`):
                Factors of locations and scales, and the model's own error, in reward units.
        """
        if self.likelihood is None:
            return
        self.scale_level, self.location_error, self.judgements = scale_level, location_error, self.all_judgements
        log_factor = torch.tensor(factor, dtype=torch.float64).log()
        log_scale = self.features @ weight
        # The error of the locations has been fitted to which answers people prefer.
        fitted = {n: p for n, p in self.likelihood.named_parameters() if n != "location_error"}
        minimize(lambda: self._prior_of_others() - self._log_probs(log_scale, log_factor).sum(), [*fitted.values()])
        with torch.no_grad():
            for name, parameter in fitted.items():
                cast(LikelihoodHead, head.likelihood).get_parameter(name).copy_(parameter)

    def _prior_of_others(self) -> Tensor:
        """Negative log prior of the quantities of the likelihood: what they were, within a factor of e or so."""
        total = torch.zeros((), dtype=torch.float64)
        if self.likelihood is None:
            return total
        for name, parameter in self.likelihood.named_parameters():
            total = total + (parameter - self.start[name]).square().sum() / 2
        penalty = width_penalty(self.likelihood.values(), self.unit_scale)
        return total if penalty is None else total + penalty

    def _minimize(self, log_scale: Any, weights: list[Tensor], prior: Any) -> Tensor | None:
        """Minimize over the weights and all else, in place. Returns the gradient of the first weight."""
        self.log_factor, self.log_rating_unit = (
            torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2)
        )
        others = [self.log_factor, self.log_rating_unit]
        if self.likelihood is not None:
            self.likelihood.load_state_dict(self.start)
            others += list(self.likelihood.parameters())

        def objective() -> Tensor:
            own = self.log_factor.square() / 2 + self.log_rating_unit.square() / 2 + self._prior_of_others()
            of_pairs, of_rated = log_scale()
            said = self._log_probs(of_pairs, self.log_factor).sum() + self._log_spread(of_rated).sum()
            return prior() + own - said

        minimize(objective, [*weights, *others])
        return weights[0].grad if weights else None

    def _log_spread(self, log_scale: Tensor) -> Tensor:
        """Log-likelihood `(R,)` of the spread of each answer's ratings."""
        if self.spread is None:
            return log_scale
        # The thresholds are in the unit of the locations, in which the scale may be another one on average.
        return self.spread(self.unit_scale * self.log_rating_unit.exp() * bounded_exp(log_scale))

    def _log_probs(self, log_scale: Tensor, log_factor: Tensor) -> Tensor:
        learned = {} if self.likelihood is None else self.likelihood.values()
        location = self.location * log_factor.exp()
        scale = self.unit_scale * self.scale_level * bounded_exp(log_scale)
        error = learned.get("location_error")
        if self.location_error:
            shared = location.new_tensor([self.location_error])
            error = shared if error is None else torch.hypot(error, shared)
        error = None if error is None else error.expand_as(location)
        # The errors of the locations go into the scales. For normal rewards and one judgement a pair that is exact.
        # Otherwise it is near enough for what is the same for all answers, and an integral over the errors takes a
        # hundred times as long.
        rewards = RewardDistribution(location, scale, self.family, self.shape, error).total()
        log_probs = log_likelihood(rewards[:, 0], rewards[:, 1], self.judgements, to_responses(learned))
        return self.judgements.weight.double() * log_probs


def fit_scale(head: RewardHead, family: Family, predictions: Predictions) -> ScaleFit:
    """
    Fit the weight of a head's scale to predictions, and judge it by cross-fitting.

    Args:
        head ([`~disco_trl.models.reward_head.RewardHead`]):
            Head that made the predictions. It is not changed.
        family ([`~disco_trl.distributions.families.Family`]):
            Family of its rewards.
        predictions ([`Predictions`]):
            Pairs, and what was said about them.

    Returns:
        [`ScaleFit`]: The weight that the predictions support.
    """
    states = predictions.scale_states.double().flatten(0, 1)
    # Features are in units of their standard deviations, divided by √H, so that one ridge suits every hidden size.
    unit = states.std(dim=0).clamp_min(1e-12) * states.shape[-1] ** 0.5
    evidence = Evidence(head, family, predictions, unit)
    generator = torch.Generator().manual_seed(0)
    fold_of = torch.randperm(int(evidence.answers.max()) + 1, generator=generator) % FOLDS
    folds = fold_of[evidence.answers]
    constant = torch.zeros_like(evidence.location)
    # For each ridge, as far as the fits of all folds converge
    log_scales = {ridge: constant.clone() for ridge in RIDGES}
    for fold in range(FOLDS):
        part, weight = evidence.select(fold_of != fold), torch.zeros_like(unit)
        for ridge in list(log_scales):  # each starts from the one before, which was held closer to zero
            found = part.fit(ridge, weight)
            if found is None:
                log_scales = {kept: values for kept, values in log_scales.items() if kept > ridge}
                break
            weight = found
            log_scales[ridge][folds == fold] = (evidence.features @ weight)[folds == fold]
    reference = evidence.log_probs(constant)
    best, best_ridge = ScaleFit(None, constant, 0.0, 0.0), None
    for ridge, log_scale in log_scales.items():
        gains = evidence.log_probs(log_scale) - reference
        gain = gains.sum().item()
        if best_ridge is None or gain > best.gain:
            best, best_ridge = ScaleFit(None, log_scale, gain, dyadic_standard_error(gains, evidence.clusters)), ridge
    if best_ridge is None or not best.gain > LEAST_Z * best.standard_error:
        best.log_scale = constant
        return best
    weight = torch.zeros_like(unit)
    for ridge in RIDGES[: RIDGES.index(best_ridge) + 1]:
        found = evidence.fit(ridge, weight)
        if found is None:
            break
        weight = found
    best.weight = weight / unit
    return best


def _last_of_each(rows: Tensor, is_wanted: Tensor) -> Tensor:
    """Places `(R,)` of the last of each set of equal rows, among those that are wanted."""
    places = is_wanted.nonzero()[:, 0]
    _, number = rows[places].unique(dim=0, return_inverse=True)
    count = int(number.max()) + 1 if len(number) else 0
    last = torch.zeros(count, dtype=torch.long).scatter_reduce(0, number, torch.arange(len(places)), "amax")
    return places[last]


def dyadic_standard_error(values: Tensor, answers: Tensor) -> float:
    """
    Estimate the standard error of a sum over pairs, of which two may be dependent if they share an answer.

    Args:
        values (`torch.DoubleTensor` of shape `(P,)`):
            Terms of the sum.
        answers (`torch.LongTensor` of shape `(P, 2)`):
            Which answers are equal, numbered from 0.

    Returns:
        `float`: Square root of the sum, over all pairs of pairs that share an answer, of the products of their
            deviations from the mean.
    """
    deviation = values - values.mean()
    count = int(answers.max()) + 1
    of_answers = deviation.new_zeros(count)
    for side in (0, 1):
        of_answers.index_add_(0, answers[:, side], deviation)
    # Two rows about the same two answers share both, and have been counted twice.
    low, high = answers.min(dim=1).values, answers.max(dim=1).values
    _, same = (low * count + high).unique(return_inverse=True)
    of_same = deviation.new_zeros(int(same.max()) + 1).index_add_(0, same, deviation)
    return (of_answers.square().sum() - of_same.square().sum()).clamp_min(0).sqrt().item()


def minimize(objective: Any, parameters: list[Tensor]) -> None:
    """
    Minimize a function over tensors, in place, and leave its gradient there.

    Args:
        objective (`Callable[[], torch.Tensor]`):
            Function of the tensors, of shape `()`.
        parameters (`list[torch.Tensor]`):
            Tensors that require gradients.
    """
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        total = objective()
        total.backward()
        return total

    optimizer.step(step)
    step()


def _copies(likelihood: LikelihoodHead) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in likelihood.state_dict().items()}
