"""Scales of answers for DPO, from columns of the data or from a reward model that scores them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from ..data.columns import SCALES
from ..data.judgements import SURVEYED_OF_STREAM
from ..data.tokenization import tokenize_answers
from ..models.inference import load_trained, score
from .dpo_config import DiscoDPOConfig


logger = get_logger(__name__)


class AnswerScales:
    """
    The scales that answers have of their own: none, those of columns, or those that a reward model gives.

    They are divided by their geometric mean over the training rows, so that β keeps its meaning. The training dataset
    has to be given first.

    Args:
        args ([`DiscoDPOConfig`]):
            Configuration of the trainer.

    Attributes:
        mean (`float`, *optional*):
            The geometric mean, in the unit of the scales. `None` if the training data have no scales.
    """

    def __init__(self, args: DiscoDPOConfig):
        self.args = args
        self.mean: float | None = None
        self._scorer: tuple[Any, Any] | None = None

    def give(self, pairs: Dataset | IterableDataset, dataset_name: str) -> Dataset | IterableDataset:
        """
        Have the answers of a dataset scales, if those of the training data are to.

        Args:
            pairs ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                Pairs, whose rows have been checked.
            dataset_name (`str`):
                Name used in errors. That of the training data is `"train"`.

        Returns:
            [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The pairs, with `scale_chosen` and
            `scale_rejected` if a model has given them.

        Raises:
            `ValueError`: If the scales are both given and to be learned, if a scale is not a positive, finite number,
                if the dataset lacks what the training data have, or if a stream is to be scored.
        """
        if self.args.scale_model is not None:
            pairs = self._scored(pairs, self.args.scale_model, dataset_name)
        has_scales = {*SCALES} <= {*(pairs.column_names or ())} and self.args.fixed_scale is None
        if has_scales and self.args.scale_training is not None:
            raise ValueError(
                f"{dataset_name} dataset: {' and '.join(SCALES)} give the scales that "
                f"scale_training={self.args.scale_training!r} would learn; leave the columns out, or scale_training"
            )
        if dataset_name == "train" and has_scales:
            self.mean = geometric_mean_of_scales(pairs, dataset_name)
            if self.args.scale_model is None:
                logger.warning(
                    f"train dataset: {' and '.join(SCALES)} are the scales of the answers, divided by their "
                    f"geometric mean, {self.mean:.3g}. Set fixed_scale to leave them unread."
                )
        elif self.mean is not None and not has_scales:
            raise ValueError(
                f"{dataset_name} dataset: it lacks {' and '.join(SCALES)}, which the training data have; score it "
                "with the same model (`disco-trl score`), or set fixed_scale to train without them"
            )
        return pairs

    def relative(self, scales: torch.Tensor | None) -> torch.Tensor | float:
        """
        Divide the scales of a batch by their geometric mean.

        Args:
            scales (`torch.Tensor` of shape `(2 * P,)`, *optional*):
                The scales of the batch, if it has any.

        Returns:
            `torch.Tensor` of the same shape, or 1 if the training data have no scales.

        Raises:
            `ValueError`: If the training data have scales and the batch lacks them.
        """
        if self.mean is None:
            return 1.0
        if scales is None:
            raise ValueError(
                f"a batch lacks {' and '.join(SCALES)}, which the rows have: the data_collator passed does not "
                "read them; pass a DataCollatorForDiscoDPO (disco_trl.data.dpo_collator), or set fixed_scale"
            )
        return scales / self.mean

    def forget_model(self) -> None:
        """Free the memory of the reward model, once all datasets have their scales."""
        self._scorer = None

    def _scored(self, pairs: Dataset | IterableDataset, path: str, dataset_name: str) -> Dataset:
        """The pairs with the scales that a reward model gives, which is loaded once for all datasets."""
        if isinstance(pairs, IterableDataset):
            raise ValueError(
                f"{dataset_name} dataset: a stream is not scored by scale_model; score it in advance with `disco-trl "
                f"score`, which adds {' and '.join(SCALES)}, and leave scale_model out"
            )
        if self._scorer is None:
            self._scorer = load_trained(path), AutoTokenizer.from_pretrained(path)
        model, tokenizer = self._scorer
        sequences = [list(ids) for row in pairs for ids in tokenize_answers(row, tokenizer)]
        scales = score(model, sequences, description=f"Scales of {dataset_name} dataset").scale.double().tolist()
        pairs = pairs.remove_columns([name for name in SCALES if name in pairs.column_names])
        for side, name in enumerate(SCALES):
            pairs = pairs.add_column(name, scales[side::2])
        return pairs


def geometric_mean_of_scales(dataset: Dataset | IterableDataset, dataset_name: str) -> float:
    """
    Check the scales of a dataset and take their geometric mean.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Pairs with `scale_chosen` and `scale_rejected`. Of a stream, the first 1,000 rows are read.
        dataset_name (`str`):
            Name used in the error.

    Returns:
        `float`: The mean, in the unit of the scales.

    Raises:
        `ValueError`: If a scale is not a positive, finite number; it names row, column and fix.
    """
    rows: Any = dataset.take(SURVEYED_OF_STREAM) if isinstance(dataset, IterableDataset) else dataset
    logarithms = []
    for number, row in enumerate(rows.select_columns([*SCALES])):
        for name in SCALES:
            value = row[name]
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(
                    f"{dataset_name} dataset, row {number}, column {name!r}: {value!r} is not a positive, finite "
                    "number; score the rows anew, or leave both columns out"
                )
            logarithms.append(math.log(value))
    if np.ptp(logarithms) < 1e-6:
        logger.warning(f"{dataset_name} dataset: all answers have the same scale, which changes nothing")
    return math.exp(float(np.mean(logarithms)))
