"""Scales of answers for DPO, from columns of the data or from a reward model that scores them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from ..data.columns import SCALES
from ..data.judgements import SURVEYED_OF_STREAM
from ..data.tokenization import tokenize_answers
from ..models.inference import load_trained, score


logger = get_logger(__name__)


def with_scales(dataset: Dataset | IterableDataset, model: str, dataset_name: str) -> Dataset:
    """
    Add the scales that a reward model gives to the answers of pairs.

    Args:
        dataset ([`~datasets.Dataset`]):
            Pairs, whose rows have been checked.
        model (`str`):
            Hub id or directory of a disco reward model.
        dataset_name (`str`):
            Name used in the error and in the progress bar.

    Returns:
        [`~datasets.Dataset`]: The pairs with `scale_chosen` and `scale_rejected`.

    Raises:
        `ValueError`: If the dataset is a stream, or if a row cannot be tokenized.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{dataset_name} dataset: a stream is not scored by scale_model; score it in advance with `disco-trl "
            f"score`, which adds {' and '.join(SCALES)}, and leave scale_model out"
        )
    scorer, tokenizer = load_trained(model), AutoTokenizer.from_pretrained(model)
    sequences = [list(ids) for row in dataset for ids in tokenize_answers(row, tokenizer)]
    scales = score(scorer, sequences, description=f"Scales of {dataset_name} dataset").scale.double().tolist()
    dataset = dataset.remove_columns([name for name in SCALES if name in dataset.column_names])
    for side, name in enumerate(SCALES):
        dataset = dataset.add_column(name, scales[side::2])
    return dataset


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
