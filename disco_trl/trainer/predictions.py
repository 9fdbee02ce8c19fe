"""
Predictions that a training run makes of its pairs before it learns from them.

While training goes through its data for the first time, each prediction is a forecast: the model has not seen the
answer yet. `PredictionMemory` keeps the latest of them together with the hidden states that they came from, so what is
fitted at the end of training (`disco_trl.trainer.calibration`, `disco_trl.trainer.epistemic`) needs no pass of its
own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data.columns import OVERALL
from ..distributions.correlation import products_of_ratings
from ..distributions.judgements import Judgements
from ..models.outputs import RewardModelOutput


MEMORY_FILE = "predictions.safetensors"
"""Name of the file in a checkpoint that holds a `PredictionMemory`."""
MOST_PAIRS = 8192
"""Number of latest pairs that are kept, in memory and in checkpoints, with two hidden states each."""
FETCHED_AT_ONCE = 32
"""Number of batches that wait on their device until they are fetched together."""


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
        products (`torch.Tensor` of shape `(P, 2, 2, A, A)`):
            What the ratings of either side say about how people's opinions of two of A attributes go together: sums of
            products, and degrees of freedom ([`~disco_trl.distributions.correlation.products_of_ratings`]).
    """

    hidden_states: Tensor
    scale_states: Tensor
    location: Tensor
    raw_shape: Tensor
    said: Tensor
    rating_counts: Tensor
    strength_counts: Tensor
    answers: Tensor
    products: Tensor = field(default=None)  # type: ignore[assignment]  # by default of no attributes

    def __post_init__(self) -> None:
        if self.products is None:
            self.products = self.location.new_zeros(len(self.location), 2, 2, 0, 0)

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

    def judged(self) -> Predictions:
        """The pairs about which anything was said, as they are if that is all."""
        wins, losses, ties = self.said[:, :3].unbind(dim=1)
        is_judged = (wins + losses + ties > 0) | (self.rating_counts.sum(dim=(1, 2)) > 0)
        return self if bool(is_judged.all()) else self[is_judged]

    def __getitem__(self, pairs: slice | Tensor) -> Predictions:
        return Predictions(**{one.name: getattr(self, one.name)[pairs] for one in fields(self)})

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


_STATES = ("hidden_states", "scale_states", "answers", "products")
"""What predictions of all attributes of the same pairs have in common."""


@dataclass
class _Batch:
    """Predictions of some pairs: their states, and the rest by attribute."""

    states: dict[str, Tensor]
    by_attribute: dict[str, dict[str, Tensor]]

    def __len__(self) -> int:
        return len(self.states["answers"])

    @staticmethod
    def fetch(batches: Sequence[_Batch]) -> None:
        """Move batches to the host, in place. The host waits once for each kind of tensor."""
        groups = [[batch.states for batch in batches]]
        groups += [[batch.by_attribute[name] for batch in batches] for name in batches[0].by_attribute]
        for group in groups:
            for name in group[0]:
                whole = torch.cat([tensors[name] for tensors in group]).cpu()
                for tensors, part in zip(group, whole.split([len(batch) for batch in batches]), strict=True):
                    tensors[name] = part


class _Batches(deque[_Batch]):
    """The latest batches of predictions, of up to `MOST_PAIRS` pairs."""

    def __init__(self, batches: Iterable[_Batch] = ()) -> None:
        super().__init__()
        self.pairs = 0
        for batch in batches:
            self.add(batch)

    def add(self, batch: _Batch) -> None:
        """Add a batch, and forget the oldest ones."""
        self.append(batch)
        self.pairs += len(batch)
        while self.pairs - len(self[0]) >= MOST_PAIRS:
            self.pairs -= len(self.popleft())

    def together(self, attribute: str) -> Predictions | None:
        """The pairs of all batches, the oldest first, or `None` if there are none."""
        if not self:
            return None
        parts = [batch.states | batch.by_attribute[attribute] for batch in self]
        return Predictions(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def to_tensors(self, attributes: Sequence[str]) -> dict[str, Tensor]:
        """What a file holds of them. The names of the overall predictions are plain, others have a number before."""
        tensors = {"sizes": torch.tensor([len(batch) for batch in self], dtype=torch.long)}
        for number, attribute in enumerate(attributes):
            for name, tensor in {} if not self else vars(self.together(attribute)).items():
                if number == 0:
                    tensors[name] = tensor
                elif name not in _STATES:
                    tensors[f"{number}-{name}"] = tensor
        return tensors

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], attributes: Sequence[str]) -> _Batches:
        """From what [`_Batches.to_tensors`] returned."""
        sizes = tensors["sizes"].tolist()
        parts = {name: tensor.split(sizes) for name, tensor in tensors.items() if name != "sizes"}
        own = [one.name for one in fields(Predictions) if one.name not in _STATES]
        found = cls()
        for place in range(len(sizes)):
            by_attribute = {
                attribute: {name: parts[f"{number}-{name}" if number else name][place] for name in own}
                for number, attribute in enumerate(attributes)
            }
            found.add(_Batch({name: parts[name][place] for name in _STATES}, by_attribute))
        return found


class PredictionMemory:
    """
    The latest predictions of a training run, and the latest of those that were made in advance: before the model has
    learned from the pair. While training goes through its data for the first time, the two are the same.

    Args:
        rating_levels, strength_levels (`Mapping[str, int]`, *optional*):
            Number L of ratings, and of strengths, that the model knows, by attribute. It must know the overall
            judgement, with 0 if it knows none.
        keeps_hidden_states (`bool`, *optional*, defaults to `False`):
            Whether to keep the states that the location is read from beside those that the scale is read from. If
            `False`, [`Predictions.hidden_states`] are empty.
    """

    def __init__(
        self,
        rating_levels: Mapping[str, int] | None = None,
        strength_levels: Mapping[str, int] | None = None,
        keeps_hidden_states: bool = False,
    ) -> None:
        self.rating_levels = dict(rating_levels or {OVERALL: 0})
        self.strength_levels = {name: (strength_levels or {}).get(name, 0) for name in self.rating_levels}
        self.keeps_hidden_states = keeps_hidden_states
        self._latest, self._forecasts = _Batches(), _Batches()
        self._on_device: list[_Batch] = []
        self.seen = 0
        """Number of pairs that were ever added."""
        self.factors = dict.fromkeys(self.rating_levels, 1.0)
        """Factors that the locations here and in the heads were multiplied by since the last prediction."""

    @torch.no_grad()
    def add(
        self,
        hidden_states: Tensor,
        scale_states: Tensor,
        rewards: Mapping[str, tuple[Tensor, Tensor | None]],
        judgements: Mapping[str, Judgements],
        answers: Tensor | None = None,
        in_advance: bool = True,
        by_rater: Tensor | None = None,
    ) -> None:
        """
        Add a batch of P pairs, and forget the oldest ones beyond `MOST_PAIRS`.

        Args:
            hidden_states, scale_states (`torch.Tensor` of shape `(2 * P, H)`):
                States that location and scale are read from, chosen sides first.
            rewards (`Mapping[str, tuple]`):
                By attribute, the locations, of shape `(2 * P, 1)`, and raw shape parameters, of shape `(2 * P, S)`, of
                families that have them.
            judgements (`Mapping[str, Judgements]`):
                What was said about the pairs, by attribute.
            answers (`torch.LongTensor` of shape `(2 * P,)`, *optional*):
                Which answers are equal, as in [`Predictions`]. If `None`, no two of them are.
            in_advance (`bool`, *optional*, defaults to `True`):
                Whether the model has not learned from the pairs yet.
            by_rater (`torch.Tensor` of shape `(2 * P, R, A)`, *optional*):
                Levels that each of R people gave to A attributes; `nan` where there is none.
        """
        count = len(hidden_states) // 2

        def in_pairs(tensor: Tensor) -> Tensor:
            return torch.stack([tensor[:count], tensor[count:]], dim=1)

        def of_attribute(name: str) -> dict[str, Tensor]:
            (location, shape), said = rewards[name], judgements[name]
            shape = location.new_zeros(2 * count, 0) if shape is None else shape
            ratings, strengths = said.rating_counts, said.strength_counts
            if ratings is None:
                ratings = location.new_zeros(2 * count, self.rating_levels[name])
            if strengths is None:
                strengths = location.new_zeros(count, 2 * self.strength_levels[name])
            return {
                "location": in_pairs(location[:, 0].float()),
                "raw_shape": in_pairs(shape.float()),
                "said": said.table,
                "rating_counts": in_pairs(ratings.float()),
                "strength_counts": strengths.float(),
            }

        if by_rater is None:
            attributes = len(self.rating_levels) - 1
            products = hidden_states.new_zeros(2 * count, 2, attributes, attributes, dtype=torch.float)
        else:
            products = torch.stack(products_of_ratings(by_rater.float()), dim=1)
        states = {
            "hidden_states": in_pairs(hidden_states.float()[:, : None if self.keeps_hidden_states else 0]),
            "scale_states": in_pairs(scale_states.float()),
            "answers": in_pairs(torch.full((2 * count,), -1) if answers is None else answers),
            "products": in_pairs(products),
        }
        batch = _Batch(states, {name: of_attribute(name) for name in self.rating_levels})
        for batches in (self._latest, self._forecasts) if in_advance else (self._latest,):
            batches.add(batch)
        self.seen += count
        self._on_device.append(batch)
        if len(self._on_device) == FETCHED_AT_ONCE:
            self._fetch()

    def _fetch(self) -> None:
        """Move what is still on its device to the host."""
        if self._on_device:
            _Batch.fetch(self._on_device)
            self._on_device = []

    def add_output(
        self,
        output: RewardModelOutput,
        judgements: Mapping[str, Judgements],
        answers: Tensor | None = None,
        in_advance: bool = True,
        by_rater: Tensor | None = None,
    ) -> None:
        """
        Add a batch of P pairs as a model has predicted it.

        Args:
            output ([`~disco_trl.models.outputs.RewardModelOutput`]):
                What `forward` returned for both sides, chosen sides first.
            judgements, answers, in_advance, by_rater:
                As in [`PredictionMemory.add`].
        """
        assert output.pooled_hidden_state is not None and output.scale_state is not None
        states = output.pooled_hidden_state, output.scale_state
        parts = zip(self.rating_levels, output.by_attribute(), strict=True)
        rewards = {name: (part.location, part.raw_shape) for name, part in parts}
        self.add(*states, rewards, judgements, answers, in_advance, by_rater)

    def clear(self) -> None:
        """Forget everything, as before the first batch."""
        self._on_device = []
        self._latest, self._forecasts = _Batches(), _Batches()
        self.seen = 0
        self.factors = dict.fromkeys(self.rating_levels, 1.0)

    def rescale(self, factor: float, attribute: str = OVERALL) -> None:
        """
        Multiply the locations by the factor that those of a head were multiplied by.

        Args:
            factor (`float`):
                The factor.
            attribute (`str`, *optional*, defaults to `"overall"`):
                Attribute of the head.
        """
        self._fetch()
        for batch in {id(batch): batch for batch in (*self._latest, *self._forecasts)}.values():
            batch.by_attribute[attribute]["location"].mul_(factor)
        self.factors[attribute] *= factor

    def predictions(self, attribute: str = OVERALL) -> Predictions | None:
        """All pairs that are kept of the latest, or `None` if there are none."""
        self._fetch()
        return self._latest.together(attribute)

    def forecasts(self, attribute: str = OVERALL) -> Predictions | None:
        """All pairs that are kept of those predicted in advance, or `None` if there are none."""
        self._fetch()
        return self._forecasts.together(attribute)

    def save(self, path: Path) -> None:
        """Write what is kept to a safetensors file, for a run that is resumed."""
        self._fetch()
        if not self._latest:
            return
        parts, attributes = {"latest": self._latest}, [*self.rating_levels]
        if [*map(id, self._latest)] != [*map(id, self._forecasts)]:
            parts["forecasts"] = self._forecasts
        tensors = {
            f"{part}.{name}": tensor
            for part, batches in parts.items()
            for name, tensor in batches.to_tensors(attributes).items()
        }
        save_file({"seen": torch.tensor(self.seen), **tensors}, path)

    def load(self, path: Path) -> None:
        """Read what :meth:`save` wrote."""
        self._on_device = []
        tensors = load_file(path)
        self.seen = int(tensors.pop("seen"))
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, name = key.split(".")
            parts.setdefault(part, {})[name] = tensor
        attributes = [*self.rating_levels]
        self._latest = _Batches.of_tensors(parts["latest"], attributes)
        # In the first pass they are the same.
        self._forecasts = _Batches(self._latest)
        if "forecasts" in parts:
            self._forecasts = _Batches.of_tensors(parts["forecasts"], attributes)


def last_of_each(answers: Tensor, is_wanted: Tensor) -> Tensor:
    """
    Find the latest prediction of each answer.

    Args:
        answers (`torch.LongTensor` of shape `(N,)`):
            Which answers are equal, as in [`Predictions`], the oldest first.
        is_wanted (`torch.BoolTensor` of shape `(N,)`):
            Which are of interest.

    Returns:
        `torch.LongTensor` of shape `(M,)`: Places of the last of each set of equal answers among those.
    """
    last = {}
    for place in is_wanted.nonzero()[:, 0].tolist():
        answer = int(answers[place])
        last[answer if answer >= 0 else -1 - place] = place
    return torch.tensor(sorted(last.values()), dtype=torch.long)
