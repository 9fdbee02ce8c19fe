"""
Calibration: the unit of reward and the scale, fitted again when training ends.

One pass of small steps leaves the scale half-way, and makes the model overconfident about texts that it has never
seen. The predictions that it made of its training pairs before it learned from them
(`disco_trl.trainer.predictions`) are free of that, and `calibrate` fits to them

- the weight of the scale head, by maximum a posteriori with a ridge on log σ. It uses predictions in hindsight, in
  which an answer that came again in a later pair counts as it was predicted last: where a location is wrong, its votes
  look divided, so better locations leave more of the disagreement that is real;
- one factor for all that is learned in reward units (temperature scaling; C. Guo et al., 2017): the locations and,
  with them, rating thresholds, tie width and location error. It has a prior as well, and uses predictions in advance
  (A. P. Dawid, 1984).

The last fifth of the pairs chooses between the strengths of the ridge and the scale that training has left, and drops
a factor that does harm there. If the predictions say next to nothing about the factor, the head is left as it was.

The gauge holds: the geometric mean of the scales stays the family's unit, and the locations take the factor.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from scipy.optimize import minimize_scalar
from torch import Tensor
from transformers import TrainerState

from ..distributions.likelihood import log_likelihood
from ..distributions.reward_distribution import Family, RewardDistribution
from ..models.heads import DiscoHead, to_responses
from ..models.scale_head import bounded_exp
from .head_fit import HeadFit, NothingToFit
from .predictions import Predictions


logger = get_logger(__name__)

LEAST_PAIRS = 512
"""Smallest number of predictions that a head is calibrated by."""
STRENGTHS = (1e4, 1000.0, 300.0, 100.0, 30.0, 10.0, 3.0)
"""Strengths of the ridge that are tried. At strength s the prior standard deviation of log σ is about 1/√s."""
FACTOR_DEVIATION = 1.0
"""Prior standard deviation of the log of the factor: 19 of 20 factors are taken to lie between 1/7 and 7. It weighs
as much as six pairs or so that are forecast with probabilities of about 0.7, and little against 512."""
LARGEST_FACTOR = 100.0
"""Largest factor, and the inverse of the smallest. A head that is further off has not been trained."""
LEAST_STANDARD_ERRORS = 4.0
"""How many standard errors the factor has to lie above 0, at which the predictions are worth nothing. (Where they are
worth nothing, the prior alone holds it two to three above.)"""
TOLERANCE = 0.01
"""Largest distance to its optimum, in log σ, at which a fit of the scale counts as converged."""


def calibrate(head: DiscoHead, family: Family, predictions: Predictions) -> float:
    """
    Fit the unit of the locations and the scale to predictions, in place.

    Args:
        head ([`~disco_trl.models.heads.DiscoHead`]):
            Head that is changed, by [`~disco_trl.models.heads.DiscoHead.refit`].
        family ([`~disco_trl.distributions.families.Family`]):
            Family of its rewards.
        predictions ([`Predictions`]):
            What the head predicted in advance, and what people said.

    Returns:
        `float`: Factor that the locations were multiplied by.

    Raises:
        [`NothingToFit`]: If the predictions say too little, in which case the head is left as it was.
    """
    if len(predictions) < LEAST_PAIRS:
        raise NothingToFit(
            f"{len(predictions)} predictions are kept on the first process, and {LEAST_PAIRS} are needed; train on "
            "more pairs, or check the probabilities with `disco-trl evaluate`"
        )
    centre = head.scale.mean_hidden.detach().cpu().double()
    # Features are in units of their standard deviations, divided by √H, so that one ridge suits every hidden size.
    unit = (predictions.hidden_states.double() - centre).flatten(0, 1).std(dim=0).clamp_min(1e-12) * len(centre) ** 0.5

    def problem(pairs: Predictions) -> _Problem:
        return _Problem(head, family, pairs, unit)

    cut = 4 * len(predictions) // 5
    early, late = problem(predictions[:cut].recent()), problem(predictions[cut:])
    own_weight = head.scale.weight[0].detach().cpu().double() * unit
    weights = {None: own_weight, **problem(predictions[:cut].in_hindsight()).weights()}
    best, keeps_unit, least = None, True, math.inf
    for strength, weight in weights.items():
        kept, fitted = late.losses(weight, 0.0), late.losses(weight, early.log_factor(weight))
        worse = fitted - kept
        # The factor is one number, which few pairs determine: what the last fifth gains by it may be less than chance
        # gives and takes. Where the model has changed since the first pairs it loses more than that.
        is_worse = not worse.sum() < worse.std() * len(late.location) ** 0.5
        loss = (kept if is_worse else fitted).sum().item()
        if loss < least:
            best, keeps_unit, least = strength, is_worse, loss
    if best is None and keeps_unit:
        raise NothingToFit(
            f"a factor or a scale fitted to the first {cut} predictions forecasts the last {len(predictions) - cut} "
            "worse than the head as it is, as the model has changed too much in between; train on more pairs"
        )
    # The best strength may still fail to converge on all pairs.
    weight = own_weight if best is None else problem(predictions.in_hindsight()).weights(down_to=best).get(best)
    if weight is None:
        raise NothingToFit("the fit of the scale does not converge; lower learning_rate if the loss was unstable")
    log_factor = 0.0
    if not keeps_unit:
        recent = problem(predictions.recent())
        log_factor = recent.log_factor(weight)
        recent.check_factor(weight, log_factor)
    factor = math.exp(log_factor)
    states = predictions.hidden_states.flatten(0, 1)
    head.refit(states, factor, (weight / unit)[None])
    return factor


def recalibrate_unit(head: DiscoHead, family: Family, predictions: Predictions) -> float:
    """
    Fit the unit of the locations again, in place, for a head with epistemic uncertainty.

    P(a ≻ b) counts the epistemic uncertainty of each answer. The factor that [`calibrate`] has found stands for all
    errors of the model, these included, so that with both the probabilities would be too close to ½.

    Args:
        head ([`~disco_trl.models.heads.DiscoHead`]):
            Calibrated head whose [`~disco_trl.models.heads.EpistemicHead`] is fitted.
        family ([`~disco_trl.distributions.families.Family`]):
            Family of its rewards.
        predictions ([`Predictions`]):
            Predictions in advance, in the unit that the head has now.

    Returns:
        `float`: Factor that the locations were multiplied by.

    Raises:
        [`NothingToFit`]: If the predictions say too little, in which case the head is left as it was.
    """
    assert head.epistemic is not None
    states = predictions.hidden_states
    errors = head.epistemic(states.to(head.weight.device)).cpu().double()  # [P, 2, H]
    weight = head.scale.weight[0].detach().cpu().double()
    problem = _Problem(head, family, predictions, torch.ones_like(weight), errors)
    log_factor = problem.log_factor(weight)
    problem.check_factor(weight, log_factor)
    factor = math.exp(log_factor)
    head.refit(states.flatten(0, 1), factor)
    return factor


class _Problem:
    """
    −log likelihood of predictions, as a function of the scale's weight `[H]` and the log of the factor.

    The weight is that of features `(h - mean_hidden) / unit`. The scale is the very function of it that the head
    computes. `error_factor`, `[P, 2, H]`, is not multiplied by the factor: it is in the unit that it leads to.
    """

    def __init__(
        self,
        head: DiscoHead,
        family: Family,
        predictions: Predictions,
        unit: Tensor,
        error_factor: Tensor | None = None,
    ):
        self.features = (predictions.hidden_states.double() - head.scale.mean_hidden.cpu().double()) / unit
        self.location = predictions.location.double()
        self.shape = family.shape_from_raw(predictions.raw_shape.double()) if family.shape_names else None
        self.judgements = predictions.judgements
        self.family = family
        self.unit_scale = head.scale.unit_scale
        self.error_factor = error_factor
        self.location_error = None if error_factor is None else error_factor.norm(dim=-1)
        with torch.no_grad():
            learned = {} if head.likelihood is None else head.likelihood.values()
        self.learned = {name: value.cpu().double() for name, value in learned.items()}
        self.multiplied = () if head.likelihood is None else head.likelihood.in_unit_of_locations

    def _scale(self, weight: Tensor) -> Tensor:
        return self.unit_scale * bounded_exp(self.features @ weight)

    def _losses(self, scale: Tensor, log_factor: Tensor) -> Tensor:
        factor = log_factor.exp()
        location = self.location * factor
        learned = {name: value * factor if name in self.multiplied else value for name, value in self.learned.items()}
        error = self.location_error
        if "location_error" in learned:
            shared = learned["location_error"].expand_as(location)
            error = shared if error is None else torch.hypot(error, shared)
        chosen, rejected = (
            RewardDistribution(
                location[:, side],
                scale[:, side],
                self.family,
                None if self.shape is None else self.shape[:, side],
                None if error is None else error[:, side],
                None if self.error_factor is None else self.error_factor[:, side],
            )
            for side in (0, 1)
        )
        log_probs = log_likelihood(chosen, rejected, self.judgements, to_responses(learned))
        return -self.judgements.weight * log_probs

    @torch.no_grad()
    def losses(self, weight: Tensor, log_factor: float) -> Tensor:
        """The weighted loss of each pair, in nats."""
        return self._losses(self._scale(weight), torch.tensor(log_factor, dtype=torch.float64))

    def weights(self, down_to: float = STRENGTHS[-1]) -> dict[float | None, Tensor]:
        """
        Maximum a posteriori of the weight for each strength down to one, each together with the best factor for it.

        A fit that does not converge is left out, and so are those with weaker ridges.
        """
        found: dict[float | None, Tensor] = {}
        weight = torch.zeros(self.features.shape[-1], dtype=torch.float64, requires_grad=True)
        log_factor = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for strength in STRENGTHS:  # each starts from the one before, which was held closer to zero

            def objective(strength: float = strength) -> Tensor:
                prior = strength * weight.square().sum() + (log_factor / FACTOR_DEVIATION).square()
                return self._losses(self._scale(weight), log_factor).sum() + prior / 2

            _minimize(objective, [weight, log_factor])
            # About an optimum the objective bends at least as the ridge does, so the gradient bounds the distance to
            # it. In log σ a distance of the weight is √H times shorter.
            slope = cast(Tensor, weight.grad)
            if not slope.norm() / strength / len(slope) ** 0.5 < TOLERANCE:  # nan is not, either
                break
            found[strength] = weight.detach().clone()
            if strength == down_to:
                break
        return found

    @torch.no_grad()
    def log_factor(self, weight: Tensor) -> float:
        """Log of the maximum a posteriori of the factor for a weight."""
        scale, bound = self._scale(weight), math.log(LARGEST_FACTOR)

        def objective(log_factor: float) -> float:
            loss = self._losses(scale, torch.tensor(log_factor, dtype=torch.float64)).sum().item()
            return loss + (log_factor / FACTOR_DEVIATION) ** 2 / 2

        return float(minimize_scalar(objective, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-4}).x)

    def check_factor(self, weight: Tensor, log_factor: float) -> None:
        """Raise [`NothingToFit`] if the data do not determine the factor."""
        if abs(log_factor) > math.log(LARGEST_FACTOR) - 0.01:
            raise NothingToFit(
                f"the factor that fits best is {LARGEST_FACTOR:g} or more, as if every prediction were right, or "
                "training had hardly begun; train on more pairs, or raise learning_rate"
                if log_factor > 0
                else f"the factor that fits best is {1 / LARGEST_FACTOR:g} or less, as if no prediction were better "
                "than chance; change learning_rate, or train on more pairs"
            )
        step = 0.05
        left, middle, right = (self.losses(weight, log_factor + shift).sum().item() for shift in (-step, 0.0, step))
        # The curvature in the log of a factor is the square of its distance from 0 in standard errors.
        information = (left - 2 * middle + right) / step**2
        if not information >= LEAST_STANDARD_ERRORS**2:
            raise NothingToFit(
                f"{len(self.location)} predictions say next to nothing about the unit of reward: the factor that fits "
                f"best is {math.exp(log_factor):.2g}, {math.sqrt(max(information, 0.0)):.1f} standard errors from 0, "
                "as the model predicts hardly better than chance; change learning_rate, or train on more pairs"
            )


def _minimize(objective: Callable[[], Tensor], parameters: list[Tensor]) -> None:
    """Minimize the objective over the parameters, in place, and leave its gradient there."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        total = objective()
        total.backward()
        return total

    optimizer.step(step)
    step()


def announce(factor: float) -> None:
    """
    Tell a person of a factor, as a warning where it is more than a tenth.

    Args:
        factor (`float`):
            Factor that the rewards were multiplied by.
    """
    logger.log(
        logging.WARNING if abs(math.log(factor)) > 0.1 else logging.INFO,
        f"Calibration has multiplied the rewards by {factor:.3g}. What was tuned to rewards that are not calibrated, "
        "such as those logged during training (a KL coefficient, a threshold), has to be multiplied by that, too.",
    )


def has_repeated(state: TrainerState) -> bool:
    """Whether training went on to a second pass, after which the latest predictions are no forecasts."""
    return (state.epoch or 0) > 1 + 1e-6


def why_no_forecasts(epochs: float) -> str:
    """
    Say why a head cannot be calibrated after several passes, and what to do.

    Args:
        epochs (`float`):
            Number of passes.
    """
    # After a second pass the latest predictions are of pairs that the model has learned from.
    return (
        f"training goes through its data {epochs:.3g} times, and what the model predicts of pairs that it has learned "
        "from is no forecast; set num_train_epochs=1 (TRL's default is 3), or max_steps to one pass or less"
    )


class Calibration(HeadFit):
    """Calibrates a head when training has gone through its data once; see [`calibrate`]."""

    without = "The rewards are not calibrated"

    def why_not(self, args: Any, state: Any) -> str | None:
        reason = super().why_not(args, state)
        return why_no_forecasts(state.epoch) if reason is None and has_repeated(state) else reason

    def fit(self, predictions: Predictions, args: Any, state: Any) -> dict[str, float]:
        assert self.memory is not None
        factor = calibrate(self.head, self.family, predictions)
        self.memory.rescale(factor)
        announce(factor)
        return {"calibration_factor": factor}
