"""
What is common to all that is fitted to a head when training ends.

The first process fits, to the predictions that it has kept (`disco_trl.trainer.predictions`), and every other one
receives the result. A head that the data say nothing about is left as it was, and one line in the log says why, for
all attributes that it is the reason for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from accelerate.utils import broadcast, broadcast_object_list
from transformers import TrainerState, TrainingArguments

from ..data.columns import OVERALL
from ..distributions.reward_distribution import Family
from ..models.distributed import is_in_shards
from ..models.heads import DiscoHead
from ..models.reward_head import RewardHead
from .predictions import PredictionMemory, Predictions


class NothingToFit(ValueError):
    """The predictions do not determine what was to be fitted. The message says why, and what to do."""


def check_finite(predictions: Predictions) -> None:
    """Raise [`NothingToFit`] if a prediction is not finite."""
    if not all(bool(values.isfinite().all()) for values in vars(predictions).values()):
        raise NothingToFit("a prediction that training has made is not finite; look at the loss of the run")


class HeadFit(ABC):
    """
    Something that is fitted to a head when training ends. [`~disco_trl.trainer.head_fits.HeadFits`] calls it.

    Args:
        whole_head ([`~disco_trl.models.heads.DiscoHead`]):
            Head of the model, which is changed in place.
        family ([`~disco_trl.distributions.families.Family`]):
            Family of its rewards.
        memory ([`PredictionMemory`], *optional*):
            Predictions to fit to. Only the first process keeps them; every other one passes `None` and receives the
            result.
        log (`Callable[[dict[str, float]], None]`):
            Function that logs metrics, such as [`~transformers.Trainer.log`].
        attribute (`str`, *optional*, defaults to `"overall"`):
            Attribute whose head is fitted.
        refusal (`str`, *optional*):
            Reason known before training why nothing will be fitted. It is logged when training ends.

    Attributes:
        head ([`~disco_trl.models.reward_head.RewardHead`]):
            Head that is fitted.
        changed (`bool`):
            Whether the last run of training ended with a change of the head, on all processes alike.
        is_fitted (`bool`):
            Whether it was fitted.
        left_out (`str`, *optional*):
            Why nothing was fitted, in whole sentences.
        metrics (`dict[str, float]`):
            What was logged then.
    """

    without: ClassVar[str]
    """Start of the line that is logged if nothing is fitted."""

    def __init__(
        self,
        whole_head: DiscoHead,
        family: Family,
        memory: PredictionMemory | None,
        log: Callable[[dict[str, float]], None],
        attribute: str = OVERALL,
        refusal: str | None = None,
    ):
        self.whole_head = whole_head
        self.attribute = attribute
        self.family = family
        self.memory = memory
        self.log = log
        self.refusal = refusal
        self.changed = self.is_fitted = False
        self.left_out: str | None = None
        self.metrics: dict[str, float] = {}

    @property
    def head(self) -> RewardHead:
        return self.whole_head.by_attribute()[self.attribute]

    @abstractmethod
    def fit(self, predictions: Predictions, args: TrainingArguments, state: TrainerState) -> dict[str, float]:
        """
        Fit the head, in place. Only the first process does.

        Args:
            predictions ([`Predictions`]):
                Predictions that are kept.
            args ([`~transformers.TrainingArguments`]):
                Arguments of the run.
            state ([`~transformers.TrainerState`]):
                State of the run at its end.

        Returns:
            `dict[str, float]`: Metrics to log.

        Raises:
            [`NothingToFit`]: If the head is left as it was.
        """

    def why_not(self, args: TrainingArguments, state: TrainerState) -> str | None:
        """
        Say why nothing can be fitted, where every process knows.

        Args:
            args ([`~transformers.TrainingArguments`]):
                Arguments of the run.
            state ([`~transformers.TrainerState`]):
                State of the run at its end.

        Returns:
            `str` or `None`: The reason, or `None` if the head can be fitted.
        """
        if self.refusal is not None:
            return self.refusal
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            return (
                "load_best_model_at_end has put back other weights than those that training ended with; set it to "
                "False to have the last ones fitted"
            )
        if is_in_shards(self.head.weight):  # it would be fitted piece by piece
            return "the head is sharded, and is needed whole; train with replicas (DDP, ZeRO-1 or ZeRO-2) if they fit"
        return None

    def kept(self, memory: PredictionMemory) -> Predictions | None:
        """
        Choose the predictions that the head is fitted to: by default the latest.

        Args:
            memory ([`PredictionMemory`]):
                Predictions of the run.

        Returns:
            [`Predictions`], *optional*: `None` if there are none.
        """
        return memory.predictions(self.attribute)

    def follow(self, factor: float) -> None:
        """
        Have the overall reward follow an attribute whose location was multiplied, or stay as it is.

        Args:
            factor (`float`):
                The factor.
        """
        if self.attribute != OVERALL and self.whole_head.attributes is not None:
            self.whole_head.attributes.compensate(self.attribute, factor)
        self.whole_head.fold()

    def give_up(self) -> str:
        """
        Change the head where nothing can be fitted, on each process. By default it is left as it was.

        Returns:
            `str`: Further sentences for the line in the log.
        """
        return ""

    def begin(self) -> None:
        """Forget the outcome of an earlier run, such as that of another trial of a search."""
        self.changed, self.is_fitted, self.left_out, self.metrics = False, False, None, {}

    def end(self, args: TrainingArguments, state: TrainerState) -> None:
        """
        Fit the head on all processes alike, or note why it is left as it was.

        Args:
            args ([`~transformers.TrainingArguments`]):
                Arguments of the run.
            state ([`~transformers.TrainerState`]):
                State of the run at its end.
        """
        refusal = self.why_not(args, state)
        if refusal is None:
            ((refusal, self.metrics),) = broadcast_object_list([self._try_to_fit(args, state)])
        if refusal is not None:
            self.left_out = f"{refusal}.{self.give_up()}"
            return
        # All of the head, as what is fitted to an attribute may change how much it counts overall.
        for tensor in self.whole_head.tensors():
            broadcast(tensor)
        self.changed = self.is_fitted = True
        if self.attribute != OVERALL:
            self.metrics = {f"{name}/{self.attribute}": value for name, value in self.metrics.items()}
        if self.metrics:
            self.log(dict(self.metrics))  # the Trainer adds the epoch to it

    def _try_to_fit(self, args: Any, state: Any) -> tuple[str | None, dict[str, float]]:
        if self.memory is None:
            return None, {}
        predictions = self.kept(self.memory)
        try:
            if predictions is None:
                raise NothingToFit("no predictions have been kept")
            check_finite(predictions)
            return None, self.fit(predictions.judged(), args, state)
        except NothingToFit as error:
            return str(error), {}
