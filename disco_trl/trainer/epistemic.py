"""
What a reward model does not know: the posterior of its last layer, fitted after training.

The scale of a reward is people's disagreement; it says nothing of how well the model knows the location. The
location is linear in the hidden state, μ = w · h, so a normal approximation about the trained w (Laplace; D. MacKay,
1992) has a closed form: its precision A is the sum over training pairs of the curvature of −log likelihood, plus a
ridge. The model's error about an answer is then √(φᵀ A⁻¹ φ), small where training answers have pointed the same way
and large elsewhere.

What flows: training pairs → hidden states of both sides, as `disco_trl.trainer.calibration.HeadMemory` has kept them
(no pass of its own) → curvature of each pair in its two locations, `[2, 2]` → the precision A `[H, H]` → its strongest
directions, in the checkpoint. From there on the model's rewards have a `location_error`.

Only the last layer is uncertain here. The language model below, which may map strange texts onto familiar states, is
taken for granted.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast
from torch import Tensor
from transformers import TrainerCallback

from ..distributions.judgements import Judgements
from ..distributions.likelihood import Responses, log_likelihood
from ..distributions.reward_distribution import Family, RewardDistribution
from ..models.heads import DiscoHead
from ..models.outputs import overall
from .calibration import Predictions, recalibrate_unit, why_not_fitted


logger = get_logger(__name__)

MOST_DIRECTIONS = 512
"""Of the posterior that are kept; in the others, where the data say least, the prior is."""


def curvature(
    family: Family, location: Tensor, scale: Tensor, shape: Tensor | None, judgements: Judgements, responses: Responses
) -> Tensor:
    """
    The curvature of −log likelihood of pairs in their two locations.

    Args:
        family: of the rewards.
        location, scale: `[P, 2]`, float64.
        shape: `[P, 2, S]`, of families that have shape parameters.
        judgements: what was said of the P pairs.
        responses: how people answer.

    Returns:
        `[P, 2, 2]`, positive semidefinite: where the likelihood curves the wrong way, it counts as flat.
    """
    location = location.detach().clone().requires_grad_()
    chosen, rejected = (
        RewardDistribution(location[:, side], scale[:, side], family.name, None if shape is None else shape[:, side])
        for side in (0, 1)
    )
    log_probs = log_likelihood(family, chosen, rejected, judgements, responses)
    total = -(judgements.weight * log_probs).sum()
    (slope,) = torch.autograd.grad(total, location, create_graph=True)
    rows = [torch.autograd.grad(slope[:, side].sum(), location, retain_graph=True)[0] for side in (0, 1)]
    values, vectors = torch.linalg.eigh(torch.stack(rows, dim=1).detach())
    return vectors @ (values.clamp_min(0)[..., None] * vectors.mT)


def prior_precision(informations: Tensor, weight: Tensor) -> float:
    """
    The ridge λ with the highest evidence, by D. MacKay's fixed point λ = γ / |w|², γ = Σ e / (e + λ).

    Args:
        informations: eigenvalues `[H]` of what the data say, e.
        weight: `[H]`, w in the same features.
    """
    square = weight.square().sum().item()
    strength = 1.0
    for _ in range(100):
        known = (informations / (informations + strength)).sum().item()
        strength, last = max(known / square, 1e-6), strength
        if abs(strength - last) < 1e-6 * last:
            break
    return strength


def fit_posterior(
    head: DiscoHead, family: Family, predictions: Predictions, responses: Responses, pairs: float | None = None
) -> None:
    """
    Fit the head's :class:`~disco_trl.models.heads.EpistemicHead`, in place.

    Args:
        head: with room for it (`add_epistemic`).
        family: of the rewards.
        predictions: training pairs; of them the hidden states and what was said.
        responses: how people answer.
        pairs: how many the model was trained on, if the predictions are a sample of them.
    """
    epistemic = head.epistemic
    assert epistemic is not None
    states = predictions.hidden_states.double()
    mean = states.flatten(0, 1).mean(dim=0)
    # In units of their own deviation, so that one ridge suits all.
    unit = states.flatten(0, 1).std(dim=0).clamp_min(1e-12)
    features = (states - mean) / unit
    with torch.no_grad():
        output = head(states.to(head.weight.device).float(), full_output=True)
    location, scale = (overall(values).cpu().double() for values in (output.location, output.scale))
    shape = None if output.raw_shape is None else family.shape_from_raw(output.raw_shape.cpu().double())
    said = Judgements.of_table(predictions.said)
    bends = curvature(family, location, scale, shape, said, responses)
    values, vectors = torch.linalg.eigh(bends)
    # Rows whose outer products sum to what the data say
    rows = (values.clamp_min(0).sqrt()[..., None] * (vectors.mT @ features)).flatten(0, 1)
    informations, directions = torch.linalg.eigh(rows.mT @ rows * ((pairs or len(predictions)) / len(predictions)))
    informations, directions = informations.clamp_min(0).flip(0), directions.mT.flip(0)
    strength = prior_precision(informations, head.weight[0].detach().cpu().double() * unit)
    rank = len(epistemic.variances)
    with torch.no_grad():
        epistemic.mean.copy_(mean)
        epistemic.unit.copy_(unit)
        epistemic.directions.copy_(directions[:rank])
        epistemic.variances.copy_(1 / (informations[:rank] + strength))
        epistemic.prior_variance.fill_(1 / strength)


class Posterior(TrainerCallback):
    """Fits the posterior of the head of a `DiscoRewardTrainer` when training ends."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        refusal = why_not_fitted(trainer)
        if refusal is not None:
            logger.warning(f"what the model does not know is not fitted: {refusal}")
            return
        head = trainer._reward_model.reward_head
        if trainer._memory is not None and (predictions := trainer._memory.predictions()) is not None:
            # A pair that was seen in several epochs says what it says once.
            pairs = trainer._memory.seen * args.world_size / max(1.0, state.epoch or 1.0)
            responses = head.responses()
            fit_posterior(head, trainer._family, predictions.in_hindsight(), responses, pairs)
            if trainer._memory.factor is not None:
                trainer._memory.rescale(recalibrate_unit(head, trainer._family, predictions, responses))
                trainer.log({"calibration_factor_with_errors": trainer._memory.factor})
        for tensor in (head.weight.data, head.bias, *head.epistemic.buffers()):
            if tensor is not None:
                broadcast(tensor)
