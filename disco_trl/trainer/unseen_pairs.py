"""
Pairs that a trainer does not train on, so that a head can be calibrated after several passes.

In a single pass every prediction is made before the model has learned from the pair. After several, none that training
has made is a forecast of the finished model, which knows its training pairs by heart as far as it can. So a few pairs
are set aside before training (`disco_trl.data.calibration_set`), and predicted when it has ended.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import Trainer
from transformers.utils import logging

from ..data.calibration_set import LEAST_ROWS, SHARE, split_calibration_set
from ..data.collator import ANSWERS, BY_RATER
from ..data.columns import ROW_COLUMN
from ..distributions.judgements import Judgements
from .calibration import ONE_PASS, why_no_forecasts
from .predictions import PredictionMemory, Predictions


logger = get_logger(__name__)


class UnseenPairs(Trainer):
    """
    A trainer of pairs that sets some of them aside, and predicts them.

    It is inherited beside one of TRL's trainers and before it.
    """

    model: Any
    train_dataset: Any  # a `Dataset` where it is read here: of a stream, the number of passes is not known
    _unseen: Dataset | None = None
    _unseen_memory: PredictionMemory | None = None

    def _set_pairs_aside(self, passes: float, seed: int) -> str | None:
        """
        Take pairs out of the training data.

        Args:
            passes (`float`):
                Number of passes through the training data.
            seed (`int`):
                Seed of the choice.

        Returns:
            `str`, *optional*: Why that cannot be done, and what to do; `None` if it is done.
        """
        count = len(self.train_dataset)
        with PartialState().main_process_first():
            self.train_dataset, self._unseen = split_calibration_set(self.train_dataset, seed)
        if self._unseen is None:
            return (
                f"{why_no_forecasts(passes)}, and a tenth of the rows has not {LEAST_ROWS} that share no answer with "
                f"others, to be set aside; train on {round(LEAST_ROWS / SHARE):,} rows or more, or {ONE_PASS}"
            )
        logger.warning(
            f"{len(self._unseen):,} of the {count:,} rows of the train dataset are not trained on. The rewards are "
            f"calibrated by them when training ends, as it goes through its data {passes:.3g} times. To train on all, "
            "set calibrate=False, or num_train_epochs=1."
        )
        return None

    def _predict_unseen(self, attribute: str) -> Predictions:
        """Predict the pairs that were set aside, on this process, by a model that is whole."""
        if self._unseen_memory is None:  # once a run, for all attributes
            self._unseen_memory = self._make_memory()
            self._remember_unseen(self._unseen_memory)
        found = self._unseen_memory.predictions(attribute)
        assert found is not None
        return found

    @abstractmethod
    def _make_memory(self) -> PredictionMemory:
        """An empty memory for predictions of this model."""

    @abstractmethod
    def _judgements_of(self, inputs: dict[str, Any]) -> dict[str, Judgements]:
        """Take what was said, by attribute, out of a batch."""

    @torch.no_grad()
    def _remember_unseen(self, memory: PredictionMemory) -> None:
        """Predict the pairs that were set aside, for all attributes."""
        dataset, model = self._unseen, self.model
        assert dataset is not None
        was_training = model.training
        model.eval()
        size = self.args.per_device_eval_batch_size
        starts = range(0, len(dataset), size)
        for start in logging.tqdm(starts, desc="Predicting unseen pairs", disable=self.args.disable_tqdm):
            batch = self.data_collator([dataset[row] for row in range(start, min(start + size, len(dataset)))])
            answers, by_rater = (batch.pop(name, None) for name in (ANSWERS, BY_RATER))
            batch.pop(ROW_COLUMN, None)
            inputs: dict[str, Any] = dict(self._prepare_inputs(batch))
            judgements = self._judgements_of(inputs)
            inputs.pop("margin", None)
            memory.add_output(model(**inputs, use_cache=False), judgements, answers, by_rater=by_rater)
        model.train(was_training)
