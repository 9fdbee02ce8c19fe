"""
Calibration: the unit of reward and the scale, fitted again when training ends.

One pass of small steps leaves the scale half-way, and makes the model overconfident about texts that it has never
seen. The predictions that it made of its training pairs before it learned from them
(`disco_trl.trainer.predictions`) are free of that, and `calibrate` fits to them

- the weight of the scale head, by maximum a posteriori with a ridge on log σ. It uses predictions in hindsight, in
  which an answer that came again in a later pair counts as it was predicted last: where a location is wrong, its votes
  look divided, so better locations leave more of the disagreement that is real;
- one factor for all locations (temperature scaling; C. Guo et al., 2017) and the strength of the ridge. These use
  predictions in advance (A. P. Dawid, 1984), the latter from the last fifth of the pairs.

The gauge holds: the geometric mean of the scales stays the family's unit, and the locations take the factor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..distributions.judgements import Judgements
from ..distributions.likelihood import Responses, log_likelihood
from ..distributions.reward_distribution import Family, RewardDistribution
from ..models.heads import DiscoHead
from .predictions import PredictionMemory, Predictions


logger = get_logger(__name__)

LEAST_PAIRS = 512
"""Smallest number of predictions that a head is calibrated by."""
STRENGTHS = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 1e4)
"""Strengths of the ridge that are tried. At strength s the prior standard deviation of log σ is about 1/√s."""


def calibrate(head: DiscoHead, family: Family, predictions: Predictions, responses: Responses) -> float:
    """
    Fit the unit of the locations and the scale to predictions, in place.

    Args:
        head ([`~disco_trl.models.heads.DiscoHead`]):
            Head whose location row and scale weight are changed.
        family ([`~disco_trl.distributions.families.Family`]):
            Family of its rewards.
        predictions ([`Predictions`]):
            What the head predicted in advance, and what people said.
        responses ([`~disco_trl.distributions.likelihood.Responses`]):
            How people answer. It is not changed.

    Returns:
        `float`: Factor that the locations were multiplied by.
    """
    centre = head.scale.mean_hidden.cpu().double()
    # Features are in units of their standard deviations, divided by √H, so that one ridge suits every hidden size.
    unit = (predictions.hidden_states.double() - centre).flatten(0, 1).std(dim=0).clamp_min(1e-12) * len(centre) ** 0.5

    def problem(pairs: Predictions) -> _Problem:
        features = (pairs.hidden_states.double() - centre) / unit
        return _Problem(features, pairs, family, head.scale.unit_scale, responses)

    cut = 4 * len(predictions) // 5
    early, early_in_hindsight, late = map(
        problem, (predictions[:cut], predictions[:cut].in_hindsight(), predictions[cut:])
    )
    losses = {}
    for strength in STRENGTHS:
        weight = early_in_hindsight.weight(strength)
        losses[strength] = late.loss(weight, early.log_factor(weight)).item()
    weight = problem(predictions.in_hindsight()).weight(min(losses, key=losses.__getitem__))
    factor = problem(predictions).log_factor(weight).exp().item()
    with torch.no_grad():
        head.scale.weight.copy_((weight / unit)[None])
    _multiply_locations(head, factor)
    return factor


@torch.no_grad()
def recalibrate_unit(head: DiscoHead, family: Family, predictions: Predictions, responses: Responses) -> float:
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
        responses ([`~disco_trl.distributions.likelihood.Responses`]):
            How people answer.

    Returns:
        `float`: Factor that the locations were multiplied by.
    """
    assert head.epistemic is not None
    states = predictions.hidden_states
    errors = head.epistemic(states.to(head.weight.device)).cpu().double()  # [P, 2, H]
    features = states.double() - head.scale.mean_hidden.cpu().double()
    problem = _Problem(features, predictions, family, head.scale.unit_scale, responses, errors)
    with torch.enable_grad():
        factor = problem.log_factor(head.scale.weight[0].cpu().double()).exp().item()
    _multiply_locations(head, factor)
    return factor


@torch.no_grad()
def _multiply_locations(head: DiscoHead, factor: float) -> None:
    head.weight.mul_(factor)
    if head.bias is not None:
        head.bias.mul_(factor)


class _Problem:
    """
    −log likelihood of predictions, as a function of the scale's weight `[H]` and the log of the factor.

    Factors of the locations' errors, `[P, 2, H]`, are not multiplied by the factor: they are in the unit that it leads
    to.
    """

    def __init__(
        self,
        features: Tensor,
        predictions: Predictions,
        family: Family,
        unit_scale: float,
        responses: Responses,
        error_factor: Tensor | None = None,
    ):
        self.features = features
        self.location = predictions.location.double()
        self.shape = family.shape_from_raw(predictions.raw_shape.double()) if family.shape_names else None
        self.judgements = Judgements.of_table(predictions.said)
        self.family = family
        self.unit_scale = unit_scale
        self.responses = responses
        self.error_factor = error_factor

    def loss(self, weight: Tensor, log_factor: Tensor) -> Tensor:
        """The weighted sum over pairs, in nats."""
        # Bounded as in the head, but by a clamp, as no weight that gets there would be chosen.
        scale = self.unit_scale * torch.exp((self.features @ weight).clamp(-5, 5))
        location = self.location * log_factor.exp()
        chosen, rejected = (
            RewardDistribution(
                location[:, side],
                scale[:, side],
                self.family,
                None if self.shape is None else self.shape[:, side],
                None if self.error_factor is None else self.error_factor[:, side].norm(dim=-1),
                None if self.error_factor is None else self.error_factor[:, side],
            )
            for side in (0, 1)
        )
        log_probs = log_likelihood(chosen, rejected, self.judgements, self.responses)
        return -(self.judgements.weight * log_probs).sum()

    def weight(self, strength: float) -> Tensor:
        """Maximum a posteriori of the weight, together with the best factor for it."""
        weight, log_factor = self._zeros(self.features.shape[-1]), self._zeros()
        _minimize(lambda: self.loss(weight, log_factor) + strength / 2 * weight.square().sum(), [weight, log_factor])
        return weight.detach()

    def log_factor(self, weight: Tensor) -> Tensor:
        """Log of the best factor for a weight."""
        log_factor = self._zeros()
        _minimize(lambda: self.loss(weight, log_factor), [log_factor])
        return log_factor.detach()

    @staticmethod
    def _zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, requires_grad=True)


def _minimize(objective: Callable[[], Tensor], parameters: list[Tensor]) -> None:
    """Minimize the objective over the parameters, in place."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        total = objective()
        total.backward()
        return total

    optimizer.step(step)


def why_not_fitted(head: DiscoHead, args: TrainingArguments, state: TrainerState) -> str | None:
    """
    Say why nothing can be fitted to a head when training ends.

    Args:
        head ([`~disco_trl.models.heads.DiscoHead`]):
            Head that would be fitted.
        args ([`~transformers.TrainingArguments`]):
            Arguments of the run.
        state ([`~transformers.TrainerState`]):
            State of the run at its end.

    Returns:
        `str` or `None`: The reason, or `None` if the head can be fitted.
    """
    if args.load_best_model_at_end and state.best_model_checkpoint is not None:
        return "load_best_model_at_end has put back other weights than those that training ended with"
    # A head in pieces would be fitted piece by piece. `ds_id` marks the parameters that ZeRO-3 has partitioned.
    if isinstance(head.weight, DTensor) or hasattr(head.weight, "ds_id"):
        return "the head is sharded, and is needed whole"
    return None


class HeadFit(TrainerCallback):
    """
    Base of the callbacks that fit something to a head when training ends.

    Args:
        head ([`~disco_trl.models.heads.DiscoHead`]):
            Head that is fitted, in place.
        family ([`~disco_trl.distributions.families.Family`]):
            Family of its rewards.
        memory ([`PredictionMemory`], *optional*):
            Predictions to fit to. Only the first process keeps them; every other one passes `None` and receives the
            result.
        log (`Callable[[dict[str, float]], None]`):
            Function that logs metrics, such as [`~transformers.Trainer.log`].
    """

    def __init__(
        self,
        head: DiscoHead,
        family: Family,
        memory: PredictionMemory | None,
        log: Callable[[dict[str, float]], None],
    ):
        self.head = head
        self.family = family
        self.memory = memory
        self.log = log


class Calibration(HeadFit):
    """Calibrates a head when training has gone through its data once; see [`calibrate`]."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fit the unit and the scale, on all processes alike, and log the factor."""
        # After a second pass the latest predictions are of pairs that the model has learned from: no forecasts.
        if (state.epoch or 0) > 1 + 1e-6:
            return
        refusal = why_not_fitted(self.head, args, state)
        if refusal is not None:
            logger.warning(f"the rewards are not calibrated: {refusal}")
            return
        predictions = None if self.memory is None else self.memory.predictions()
        factor = torch.zeros((), device=self.head.weight.device)  # 0 says that it was left out
        if self.memory is not None and predictions is not None and len(predictions) >= LEAST_PAIRS:
            factor.fill_(calibrate(self.head, self.family, predictions, self.head.responses()))
            self.memory.rescale(factor.item())
        if broadcast(factor) == 0:
            return
        for parameter in (self.head.weight, self.head.scale.weight, self.head.bias):
            if parameter is not None:
                broadcast(parameter.data)
        self.log({"calibration_factor": factor.item()})
