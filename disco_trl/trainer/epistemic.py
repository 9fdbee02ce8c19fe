"""
Epistemic uncertainty: the posterior of the last layer, fitted when training ends.

The scale of a reward is people's disagreement, which is aleatoric. It does not say how well the model knows the
location. The location is linear in the hidden state, μ = w · h, so a normal approximation about the trained w
(Laplace; D. MacKay, 1992) has a closed form: its precision A is the sum over training pairs of the curvature of
−log likelihood, plus a ridge. The standard deviation of the location of an answer is then √(φᵀ A⁻¹ φ). It is small
where hidden states of training answers have pointed the same way, and large elsewhere.

What flows: training pairs → hidden states of both sides, as `disco_trl.trainer.predictions.PredictionMemory` has kept
them (no pass of its own) → curvature of each pair in its two locations, `[2, 2]` → the precision A `[H, H]` → its
strongest directions, in the checkpoint. From there on the model's rewards have a `location_error`.

Only the last layer is uncertain here. The language model below it, which may map unfamiliar texts onto familiar
states, is taken as known.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..distributions.judgements import Judgements
from ..distributions.likelihood import Responses, log_likelihood
from ..distributions.reward_distribution import Family, RewardDistribution
from ..models.outputs import overall
from ..models.reward_head import RewardHead
from .calibration import Calibration, announce, recalibrate_unit
from .head_fit import HeadFit, NothingToFit
from .predictions import Predictions


MOST_DIRECTIONS = 512
"""Number of directions of the posterior that are kept. In the others, where the data say least, the prior holds."""
MOST_ROUNDS = 5
"""How often the posterior and the unit are fitted in turn, unless the unit moves by less than 1 % before."""


def curvature(
    family: Family, location: Tensor, scale: Tensor, shape: Tensor | None, judgements: Judgements, responses: Responses
) -> Tensor:
    """
    Compute the curvature of −log likelihood of pairs in their two locations.

    Args:
        family ([`~disco_trl.distributions.families.Family`]):
            Family of the rewards.
        location, scale (`torch.DoubleTensor` of shape `(P, 2)`):
            Locations and scales of both sides.
        shape (`torch.DoubleTensor` of shape `(P, 2, S)`, *optional*):
            Shape parameters of families that have them.
        judgements ([`~disco_trl.distributions.judgements.Judgements`]):
            What was said about the pairs.
        responses ([`~disco_trl.distributions.likelihood.Responses`]):
            How people answer.

    Returns:
        `torch.DoubleTensor` of shape `(P, 2, 2)`: Positive semidefinite matrices. Where the likelihood curves the
            wrong way, it counts as flat, because a precision cannot be negative.
    """
    location = location.detach().clone().requires_grad_()
    rewards = RewardDistribution(location, scale, family, shape)
    log_probs = log_likelihood(rewards[:, 0], rewards[:, 1], judgements, responses)
    total = -(judgements.weight * log_probs).sum()
    (slope,) = torch.autograd.grad(total, location, create_graph=True)
    rows = [torch.autograd.grad(slope[:, side].sum(), location, retain_graph=True)[0] for side in (0, 1)]
    values, vectors = torch.linalg.eigh(torch.stack(rows, dim=1).detach())
    return vectors @ (values.clamp_min(0)[..., None] * vectors.mT)


def prior_precision(informations: Tensor, weight: Tensor) -> float:
    """
    Find the ridge λ with the highest evidence, by D. MacKay's fixed point λ = γ / |w|², γ = Σ e / (e + λ).

    Args:
        informations (`torch.Tensor` of shape `(H,)`):
            Eigenvalues e of the information in the data.
        weight (`torch.Tensor` of shape `(H,)`):
            Trained weight w, in the same features.

    Returns:
        `float`: The ridge, at least 1e-6.
    """
    square = weight.square().sum().item()
    strength = 1.0
    for _ in range(100):
        known = (informations / (informations + strength)).sum().item()
        strength, last = max(known / square, 1e-6), strength
        if abs(strength - last) < 1e-6 * last:
            break
    return strength


def fit_posterior(head: RewardHead, family: Family, predictions: Predictions, pairs: float | None = None) -> None:
    """
    Fit the posterior of a head's location row, in place.

    Args:
        head ([`~disco_trl.models.reward_head.RewardHead`]):
            Head with an [`~disco_trl.models.epistemic_head.EpistemicHead`].
        family ([`~disco_trl.distributions.families.Family`]):
            Family of its rewards.
        predictions ([`Predictions`]):
            Training pairs, of which the hidden states and what was said are used.
        pairs (`float`, *optional*):
            Number of pairs that the model was trained on, if the predictions are a sample of them.

    Raises:
        [`NothingToFit`]: If nothing was said about the pairs.
    """
    epistemic = head.epistemic
    assert epistemic is not None
    states = predictions.hidden_states.double()
    mean = states.flatten(0, 1).mean(dim=0)
    # In units of their own deviation, so that one ridge suits all.
    unit = states.flatten(0, 1).std(dim=0).clamp_min(1e-12)
    features = (states - mean) / unit
    with torch.no_grad():
        device = head.weight.device
        output = head.rewards(states.to(device).float(), predictions.scale_states.to(device))
    location, scale = (overall(values).cpu().double() for values in (output.location, output.scale))
    shape = None if output.raw_shape is None else family.shape_from_raw(output.raw_shape.cpu().double())
    bends = curvature(family, location, scale, shape, predictions.judgements, head.responses())
    values, vectors = torch.linalg.eigh(bends)
    # Rows whose outer products sum to what the data say
    rows = (values.clamp_min(0).sqrt()[..., None] * (vectors.mT @ features)).flatten(0, 1)
    informations, directions = torch.linalg.eigh(rows.mT @ rows * ((pairs or len(predictions)) / len(predictions)))
    informations, directions = informations.clamp_min(0).flip(0), directions.mT.flip(0)
    if not informations[0] > 0:
        raise NothingToFit("people said nothing about the pairs that are kept; check the columns of the dataset")
    strength = prior_precision(informations, head.weight[0].detach().cpu().double() * unit)
    rank = len(epistemic.variances)
    with torch.no_grad():
        epistemic.mean.copy_(mean)
        epistemic.unit.copy_(unit)
        epistemic.directions.copy_(directions[:rank])
        epistemic.variances.copy_(1 / (informations[:rank] + strength))
        epistemic.prior_variance.fill_(1 / strength)


class Posterior(HeadFit):
    """
    Fits the posterior of a head's location row when training ends; see [`fit_posterior`].

    Args:
        calibration ([`~disco_trl.trainer.calibration.Calibration`], *optional*):
            Calibration of the head, after which the unit of the locations is fitted again. If `None`, it is not.
        whole_head, family, memory, log, attribute:
            As in [`HeadFit`].
    """

    without = "The epistemic uncertainty is not fitted"

    def __init__(self, *args: Any, calibration: Calibration | None):
        super().__init__(*args)
        self.calibration = calibration

    def fit(self, predictions: Predictions, args: Any, state: Any) -> dict[str, float]:
        """Fit the posterior, and where the head is calibrated the unit in turn with it."""
        head, memory = self.head, self.memory
        assert memory is not None
        # A pair that was seen in several epochs counts once.
        pairs = memory.seen * args.world_size / max(1.0, state.epoch or 1.0)
        hindsight = predictions.in_hindsight()
        fit_posterior(head, self.family, hindsight, pairs)
        if self.calibration is None or not self.calibration.is_fitted:
            return {}
        # The unit as it is stands for all errors of the model, those of the posterior included. What is known of the
        # prior depends on the unit, so that the two are fitted in turn.
        forecasts = self.calibration.forecasts
        assert forecasts is not None
        for _ in range(MOST_ROUNDS):
            factor = recalibrate_unit(head, self.family, forecasts, self.calibration.factor_width)
            forecasts.location.mul_(factor)
            memory.rescale(factor, self.attribute)
            self.follow(factor)
            fit_posterior(head, self.family, hindsight, pairs)
            if abs(math.log(factor)) < 0.01:
                break
        announce(memory.factors[self.attribute], self.attribute)
        return {"calibration_factor_with_errors": memory.factors[self.attribute]}
