"""
Predictions that a training run makes of its pairs before it learns from them.

While training goes through its data for the first time, each prediction is a forecast: the model has not seen the
answer yet. `PredictionMemory` keeps the latest of them together with the hidden states that they came from, so what is
fitted at the end of training (`disco_trl.trainer.calibration`, `disco_trl.trainer.epistemic`) needs no pass of its
own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..distributions.judgements import Judgements
from ..models.outputs import RewardModelOutput


MEMORY_FILE = "predictions.safetensors"
"""Name of the file in a checkpoint that holds a `PredictionMemory`."""
MOST_PAIRS = 8192
"""Number of latest pairs that are kept, in memory and in checkpoints, with two hidden states each."""


@dataclass
class Predictions:
    """
    Pairs as they were predicted, the oldest first. Sides are chosen and rejected, in this order.

    Attributes:
        hidden_states (`torch.Tensor` of shape `(P, 2, H)`):
            Pooled hidden states, which the location is read from. H is 0 if they were not kept.
        scale_states (`torch.Tensor` of shape `(P, 2, H)`):
            States that the scale is read from.
        location (`torch.Tensor` of shape `(P, 2)`):
            Locations, in reward units.
        raw_shape (`torch.Tensor` of shape `(P, 2, S)`):
            Raw shape parameters. S is 0 for families without any.
        said (`torch.Tensor` of shape `(P, 6)`):
            What people said about the pairs, as [`~disco_trl.distributions.judgements.Judgements.table`].
        rating_counts (`torch.Tensor` of shape `(P, 2, L)`):
            How many people gave each of L ratings to either side. L is 0 for a model that knows no ratings.
        strength_counts (`torch.Tensor` of shape `(P, 2 * L)`):
            How many wins and losses were of each of L strengths. L is 0 for a model that knows no strengths.
        answers (`torch.LongTensor` of shape `(P, 2)`):
            Which answers are equal: those with equal numbers. Each negative number is an answer of its own.
    """

    hidden_states: Tensor
    scale_states: Tensor
    location: Tensor
    raw_shape: Tensor
    said: Tensor
    rating_counts: Tensor
    strength_counts: Tensor
    answers: Tensor

    @property
    def judgements(self) -> Judgements:
        """All that people said, for the likelihood."""
        chosen, rejected = self.rating_counts.unbind(dim=1)
        return Judgements.of_table(
            self.said,
            torch.cat([chosen, rejected]) if chosen.shape[-1] else None,
            self.strength_counts if self.strength_counts.shape[-1] else None,
        )

    def __len__(self) -> int:
        return len(self.location)

    def __getitem__(self, pairs: slice) -> Predictions:
        return Predictions(**{field.name: getattr(self, field.name)[pairs] for field in fields(self)})

    def recent(self) -> Predictions:
        """
        The later half of the pairs.

        Returns:
            [`Predictions`]: Predictions of a model that is nearer to the last one: rewards grow as training goes on.
        """
        return self[slice(len(self) // 2, None)]

    def in_hindsight(self) -> Predictions:
        """
        Replace the prediction of each answer by its last one.

        Returns:
            [`Predictions`]: The same pairs, in the same order, about which people said the same.
        """
        number = numbered(self.answers).flatten()
        place = torch.arange(len(number))
        last = torch.zeros_like(place).scatter_reduce(0, number, place, "amax")[number].view_as(self.answers)
        names = ("hidden_states", "scale_states", "location", "raw_shape")
        return replace(self, **{name: getattr(self, name).flatten(0, 1)[last] for name in names})


def numbered(answers: Tensor) -> Tensor:
    """
    Number answers from 0, each negative number as an answer of its own.

    Args:
        answers (`torch.LongTensor` of shape `(P, 2)`):
            [`Predictions.answers`].

    Returns:
        `torch.LongTensor` of shape `(P, 2)`: Numbers from 0 without gaps.
    """
    flat = answers.flatten()
    place = torch.arange(len(flat))
    _, number = torch.where(flat < 0, -1 - place, flat).unique(return_inverse=True)
    return number.view_as(answers)


class _Batches(deque[Predictions]):
    """The latest batches of predictions, of up to `MOST_PAIRS` pairs."""

    def __init__(self, batches: Iterable[Predictions] = ()) -> None:
        super().__init__()
        self.pairs = 0
        for batch in batches:
            self.add(batch)

    def add(self, batch: Predictions) -> None:
        """Add a batch, and forget the oldest ones."""
        self.append(batch)
        self.pairs += len(batch)
        while self.pairs - len(self[0]) >= MOST_PAIRS:
            self.pairs -= len(self.popleft())

    def together(self) -> Predictions | None:
        """The pairs of all batches, the oldest first, or `None` if there are none."""
        names = [field.name for field in fields(Predictions)]
        return Predictions(**{n: torch.cat([getattr(b, n) for b in self]) for n in names}) if self else None

    def to_tensors(self) -> dict[str, Tensor]:
        """What a file holds of them."""
        sizes, together = torch.tensor([len(batch) for batch in self], dtype=torch.long), self.together()
        return {"sizes": sizes, **({} if together is None else vars(together))}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> _Batches:
        """From what [`_Batches.to_tensors`] returned."""
        sizes = tensors["sizes"].tolist()
        parts = {name: tensor.split(sizes) for name, tensor in tensors.items() if name != "sizes"}
        return cls(Predictions(**dict(zip(parts, of, strict=True))) for of in zip(*parts.values(), strict=True))


class PredictionMemory:
    """
    The latest predictions of a training run, and the latest of those that were made in advance: before the model has
    learned from the pair. While training goes through its data for the first time, the two are the same.

    Args:
        rating_levels (`int`, *optional*, defaults to `0`):
            Number L of ratings that the model knows.
        strength_levels (`int`, *optional*, defaults to `0`):
            Number L of strengths that the model knows.
        keeps_hidden_states (`bool`, *optional*, defaults to `False`):
            Whether to keep the states that the location is read from beside those that the scale is read from. If
            `False`, [`Predictions.hidden_states`] are empty.
    """

    def __init__(self, rating_levels: int = 0, strength_levels: int = 0, keeps_hidden_states: bool = False) -> None:
        self.rating_levels = rating_levels
        self.strength_levels = strength_levels
        self.keeps_hidden_states = keeps_hidden_states
        self._latest, self._forecasts = _Batches(), _Batches()
        self.seen = 0
        """Number of pairs that were ever added."""
        self.factor = 1.0
        """Factor that the locations here and in the head were multiplied by since the last prediction."""

    @torch.no_grad()
    def add(
        self,
        hidden_states: Tensor,
        scale_states: Tensor,
        location: Tensor,
        raw_shape: Tensor | None,
        judgements: Judgements,
        answers: Tensor | None = None,
        in_advance: bool = True,
    ) -> None:
        """
        Add a batch of P pairs, and forget the oldest ones beyond `MOST_PAIRS`.

        Args:
            hidden_states, scale_states (`torch.Tensor` of shape `(2 * P, H)`):
                States that location and scale are read from, chosen sides first.
            location (`torch.Tensor` of shape `(2 * P, 1)`):
                Locations.
            raw_shape (`torch.Tensor` of shape `(2 * P, S)`, *optional*):
                Raw shape parameters of families that have them.
            judgements ([`~disco_trl.distributions.judgements.Judgements`]):
                What was said about the pairs.
            answers (`torch.LongTensor` of shape `(2 * P,)`, *optional*):
                Which answers are equal, as in [`Predictions`]. If `None`, no two of them are.
            in_advance (`bool`, *optional*, defaults to `True`):
                Whether the model has not learned from the pairs yet.
        """
        count = len(location) // 2

        def in_pairs(tensor: Tensor) -> Tensor:
            return torch.stack([tensor[:count], tensor[count:]], dim=1).cpu()

        shape = location.new_zeros(2 * count, 0) if raw_shape is None else raw_shape
        ratings, strengths = judgements.rating_counts, judgements.strength_counts
        if ratings is None:
            ratings = location.new_zeros(2 * count, self.rating_levels)
        if strengths is None:
            strengths = location.new_zeros(count, 2 * self.strength_levels)
        answers = torch.full((2 * count,), -1) if answers is None else answers
        batch = Predictions(
            hidden_states=in_pairs(hidden_states.float()[:, : None if self.keeps_hidden_states else 0]),
            scale_states=in_pairs(scale_states.float()),
            location=in_pairs(location[:, 0].float()),
            raw_shape=in_pairs(shape.float()),
            said=judgements.table.cpu(),
            rating_counts=in_pairs(ratings.float()),
            strength_counts=strengths.float().cpu(),
            answers=in_pairs(answers),
        )
        for batches in (self._latest, self._forecasts) if in_advance else (self._latest,):
            batches.add(batch)
        self.seen += count

    def add_output(
        self,
        output: RewardModelOutput,
        judgements: Judgements,
        answers: Tensor | None = None,
        in_advance: bool = True,
    ) -> None:
        """
        Add a batch of P pairs as a model has predicted it.

        Args:
            output ([`~disco_trl.models.outputs.RewardModelOutput`]):
                What `forward` returned for both sides, chosen sides first.
            judgements, answers, in_advance:
                As in [`PredictionMemory.add`].
        """
        assert output.pooled_hidden_state is not None and output.scale_state is not None and output.logits is not None
        states = output.pooled_hidden_state, output.scale_state
        self.add(*states, output.logits, output.raw_shape, judgements, answers, in_advance)

    def clear(self) -> None:
        """Forget everything, as before the first batch."""
        self._latest, self._forecasts = _Batches(), _Batches()
        self.seen = 0
        self.factor = 1.0

    def rescale(self, factor: float) -> None:
        """
        Multiply the locations by the factor that those of the head were multiplied by.

        Args:
            factor (`float`):
                The factor.
        """
        for batch in {id(batch): batch for batch in (*self._latest, *self._forecasts)}.values():
            batch.location.mul_(factor)
        self.factor *= factor

    def predictions(self) -> Predictions | None:
        """All pairs that are kept of the latest, or `None` if there are none."""
        return self._latest.together()

    def forecasts(self) -> Predictions | None:
        """All pairs that are kept of those predicted in advance, or `None` if there are none."""
        return self._forecasts.together()

    def save(self, path: Path) -> None:
        """Write what is kept to a safetensors file, for a run that is resumed."""
        if not self._latest:
            return
        parts = {"latest": self._latest}
        if [*map(id, self._latest)] != [*map(id, self._forecasts)]:
            parts["forecasts"] = self._forecasts
        tensors = {f"{part}.{name}": t for part, batches in parts.items() for name, t in batches.to_tensors().items()}
        save_file({"seen": torch.tensor(self.seen), **tensors}, path)

    def load(self, path: Path) -> None:
        """Read what :meth:`save` wrote."""
        tensors = load_file(path)
        self.seen = int(tensors.pop("seen"))
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, name = key.split(".")
            parts.setdefault(part, {})[name] = tensor
        self._latest = _Batches.of_tensors(parts["latest"])
        # In the first pass they are the same.
        self._forecasts = _Batches.of_tensors(parts["forecasts"]) if "forecasts" in parts else _Batches(self._latest)
