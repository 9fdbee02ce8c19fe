"""
The end of training: unit and scale, fitted again to what the model predicted of its training pairs.

One pass of small steps leaves the scale half-way, and by its end the model is too sure of texts that it has never
seen. While training goes through its data for the first time, though, each prediction is made before the model learns
from the pair. `HeadMemory` keeps the latest of them, with the hidden states that they came from (no pass of its own is
needed), and `calibrate` chooses

- the scale head's weight, by maximum a posteriori with a ridge on log σ, from predictions in hindsight: an answer that
  came again in a later pair counts as it was predicted last. Where a location is wrong, its votes look divided; the
  better the locations, the more of what is left is disagreement;
- one factor for all locations (their unit; temperature scaling, C. Guo et al., 2017), and the strength of the ridge,
  from predictions in advance (A. P. Dawid, 1984), the latter from the last fifth of the pairs.

The gauge holds: the geometric mean of the scales stays the family's unit, and the locations take the factor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..distributions.judgements import Judgements
from ..distributions.likelihood import Responses, log_likelihood
from ..distributions.reward_distribution import Family, RewardDistribution
from ..models.heads import DiscoHead


logger = get_logger(__name__)

MEMORY_FILE = "predictions.safetensors"
"""In a checkpoint: what `HeadMemory` holds."""
LEAST_PAIRS = 512
"""Fewer predictions say too little to choose by."""
MOST_PAIRS = 8192
"""Of the latest predictions; they are kept in memory and in checkpoints, two hidden states each."""
STRENGTHS = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 1e4)
"""Of the ridge. At strength s the prior standard deviation of log σ is about 1/√s."""


@dataclass
class Predictions:
    """
    Pairs as they were predicted, oldest first.

    Attributes:
        hidden_states: `[P, 2, H]`, pooled, of chosen and rejected.
        location: `[P, 2]`.
        raw_shape: `[P, 2, S]`, S often 0.
        said: `[P, 6]`, the `Judgements.table`.
        answers: `[P, 2]`, integers; equal ones stand for equal answers, those below 0 for an answer of its own each.
    """

    hidden_states: Tensor
    location: Tensor
    raw_shape: Tensor
    said: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.location)

    def __getitem__(self, pairs: slice) -> Predictions:
        return Predictions(**{field.name: getattr(self, field.name)[pairs] for field in fields(self)})

    def in_hindsight(self) -> Predictions:
        """The same pairs, with each answer as it was predicted last."""
        answers = self.answers.flatten()
        place = torch.arange(len(answers))
        _, number = torch.where(answers < 0, -1 - place, answers).unique(return_inverse=True)
        last = torch.zeros_like(place).scatter_reduce(0, number, place, "amax")[number].view_as(self.answers)
        hidden_states, location, raw_shape = (
            tensor.flatten(0, 1)[last] for tensor in (self.hidden_states, self.location, self.raw_shape)
        )
        return Predictions(hidden_states, location, raw_shape, self.said, self.answers)


class HeadMemory:
    """The latest predictions of a training run, each made before the model has learned from its pair."""

    def __init__(self) -> None:
        self._batches: deque[Predictions] = deque()
        self._pairs = 0
        self.seen = 0
        """Pairs that were ever added."""
        self.factor: float | None = None
        """What the locations were multiplied by, with those of the head, when that was calibrated."""

    @torch.no_grad()
    def add(
        self,
        hidden_states: Tensor,
        location: Tensor,
        raw_shape: Tensor | None,
        judgements: Judgements,
        answers: Tensor | None = None,
    ) -> None:
        """
        Keep a batch of P pairs, and forget the oldest beyond `MOST_PAIRS`.

        Args:
            hidden_states, location, raw_shape: `[2 * P, H]`, `[2 * P, 1]` and `[2 * P, S]`, chosen sides first.
            judgements: of the P pairs.
            answers: `[2 * P]`, as in `Predictions`; None if nobody knows which are equal.
        """
        count = len(location) // 2

        def in_pairs(tensor: Tensor) -> Tensor:
            return torch.stack([tensor[:count], tensor[count:]], dim=1).cpu()

        shape = location.new_zeros(2 * count, 0) if raw_shape is None else raw_shape
        answers = torch.full((2 * count,), -1) if answers is None else answers
        self._batches.append(
            Predictions(
                hidden_states=in_pairs(hidden_states.float()),
                location=in_pairs(location[:, 0].float()),
                raw_shape=in_pairs(shape.float()),
                said=judgements.table.cpu(),
                answers=in_pairs(answers),
            )
        )
        self._pairs += count
        self.seen += count
        while self._pairs - len(self._batches[0]) >= MOST_PAIRS:
            self._pairs -= len(self._batches.popleft())

    def rescale(self, factor: float) -> None:
        """Go along with a head whose locations were multiplied by a factor."""
        for batch in self._batches:
            batch.location.mul_(factor)
        self.factor = factor * (1.0 if self.factor is None else self.factor)

    def predictions(self) -> Predictions | None:
        """All that is kept, or None if that is nothing."""
        return Predictions(**self._tensors()) if self._batches else None

    def _tensors(self) -> dict[str, Tensor]:
        names = [field.name for field in fields(Predictions)]
        return {name: torch.cat([getattr(batch, name) for batch in self._batches]) for name in names}

    def save(self, path: Path) -> None:
        """Write what is kept, for a run that is resumed."""
        if self._batches:
            sizes = torch.tensor([len(batch) for batch in self._batches])
            save_file({"sizes": sizes, "seen": torch.tensor(self.seen), **self._tensors()}, path)

    def load(self, path: Path) -> None:
        """Read what :meth:`save` wrote."""
        tensors = load_file(path)
        sizes = tensors.pop("sizes").tolist()
        self.seen = int(tensors.pop("seen"))
        parts = {name: tensor.split(sizes) for name, tensor in tensors.items()}
        batches = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
        self._batches = deque(Predictions(**batch) for batch in batches)
        self._pairs = sum(sizes)


def calibrate(head: DiscoHead, family: Family, predictions: Predictions, responses: Responses) -> float:
    """
    Fit unit and scale to predictions, in place.

    Args:
        head: its location row and the weight of its scale are changed.
        family: of the rewards.
        predictions: what it predicted, and what was said.
        responses: how people answer; left as it is.

    Returns:
        The factor that the locations were multiplied by.
    """
    centre = head.scale.mean_hidden.cpu().double()
    # Features are in units of their own deviations, and such that the ridge means the same for every hidden size.
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
    Fit the unit of the locations again, in place, for a head that knows its own errors.

    P(a ≻ b) counts the error of each answer. The factor that :func:`calibrate` found stands for all that the model had
    wrong, these errors included; with both, the probabilities would be too modest.

    Args:
        head: calibrated, with its :class:`~disco_trl.models.heads.EpistemicHead` fitted.
        family, responses: as for :func:`calibrate`.
        predictions: in advance, in the units that the head has now.

    Returns:
        The factor that the locations were multiplied by.
    """
    assert head.epistemic is not None
    states = predictions.hidden_states
    errors = head.epistemic(states.to(head.weight.device)).cpu().double()
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
    −log likelihood of predictions as a function of the scale's weight `[H]` and the log of the factor. Errors of the
    locations, `[P, 2]`, do not take the factor.
    """

    def __init__(
        self,
        features: Tensor,
        predictions: Predictions,
        family: Family,
        unit_scale: float,
        responses: Responses,
        location_error: Tensor | None = None,
    ):
        self.features = features
        self.location = predictions.location.double()
        self.shape = family.shape_from_raw(predictions.raw_shape.double()) if family.shape_names else None
        self.judgements = Judgements.of_table(predictions.said)
        self.family = family
        self.unit_scale = unit_scale
        self.responses = responses
        self.location_error = location_error

    def loss(self, weight: Tensor, log_factor: Tensor) -> Tensor:
        """The sum over pairs, each with its weight."""
        # (Bounded as in the head, but by a clamp: a weight that gets there is out of the question.)
        scale = self.unit_scale * torch.exp((self.features @ weight).clamp(-5, 5))
        location = self.location * log_factor.exp()
        chosen, rejected = (
            RewardDistribution(
                location[:, side],
                scale[:, side],
                self.family.name,
                None if self.shape is None else self.shape[:, side],
                None if self.location_error is None else self.location_error[:, side],
            )
            for side in (0, 1)
        )
        log_probs = log_likelihood(self.family, chosen, rejected, self.judgements, self.responses)
        return -(self.judgements.weight * log_probs).sum()

    def weight(self, strength: float) -> Tensor:
        """The maximum a posteriori of the weight, with whatever factor goes best with it."""
        weight, log_factor = self._zeros(self.features.shape[-1]), self._zeros()
        _minimize(lambda: self.loss(weight, log_factor) + strength / 2 * weight.square().sum(), [weight, log_factor])
        return weight.detach()

    def log_factor(self, weight: Tensor) -> Tensor:
        """The factor that goes best with a weight."""
        log_factor = self._zeros()
        _minimize(lambda: self.loss(weight, log_factor), [log_factor])
        return log_factor.detach()

    @staticmethod
    def _zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, requires_grad=True)


def _minimize(objective: Callable[[], Tensor], parameters: list[Tensor]) -> None:
    """Change the parameters to where the objective is least."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        total = objective()
        total.backward()
        return total

    optimizer.step(step)


def why_not_fitted(trainer: Any) -> str | None:
    """Why nothing can be fitted to the last layer of a `DiscoRewardTrainer`'s model when training ends, or None."""
    weight = trainer._reward_model.reward_head.weight
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        return "load_best_model_at_end has put back other weights than those that training ended with"
    if isinstance(weight, DTensor) or hasattr(weight, "ds_id"):
        return "the head is sharded, and is needed whole"
    return None


class Calibration(TrainerCallback):
    """Calibrates the head of a `DiscoRewardTrainer` when training has gone through its data once."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if not trainer._calibrates or (state.epoch or 0) > 1 + 1e-6:
            return
        refusal = why_not_fitted(trainer)
        if refusal is not None:
            logger.warning(f"the rewards are not calibrated: {refusal}")
            return
        head = trainer._reward_model.reward_head
        predictions = None if trainer._memory is None else trainer._memory.predictions()
        factor = torch.zeros((), device=head.weight.device)  # 0 says that it was left out
        if predictions is not None and len(predictions) >= LEAST_PAIRS:
            factor.fill_(calibrate(head, trainer._family, predictions, head.responses()))
            trainer._memory.rescale(factor.item())
        if broadcast(factor) == 0:
            return
        for parameter in (head.weight, head.scale.weight, head.bias):
            if parameter is not None:
                broadcast(parameter.data)
        trainer.log({"calibration_factor": factor.item()})
