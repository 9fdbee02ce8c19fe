"""
How much each attribute counts in the overall reward, fitted when training ends.

The location row of the overall reward is Σ w_a W_a + rest. While both are trained, the data determine their sum, and
not how it is divided: whatever a weight explains, the rest could. The weights are therefore those of a regression of
the overall locations on those of the attributes, so that they explain as much as they can, and the rest is what is
left. The overall reward stays as it is.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from scipy.optimize import lsq_linear

from ..data.columns import OVERALL
from .head_fit import HeadFit, NothingToFit
from .predictions import Predictions, last_of_each


LEAST_ANSWERS = 64
"""Smallest number of answers that weights are fitted to."""
LEAST_SHARE = 1e-3
"""Smallest weight, as a share of its start: it keeps its sign, and its logarithm."""


class AttributeWeights(HeadFit):
    """
    Fits the weights of the attributes in the overall reward, within the signs that they start with.

    An attribute whose weight starts at 0 keeps it.

    Args:
        whole_head, family, memory, log, attribute, refusal:
            As in [`HeadFit`].
    """

    without: ClassVar[str] = "The weights of the attributes stay as they were trained"

    @torch.no_grad()
    def fit(self, predictions: Predictions, args: Any, state: Any) -> dict[str, float]:
        attributes, memory = self.whole_head.attributes, self.memory
        assert attributes is not None and memory is not None
        kept = [found for name in (OVERALL, *attributes.names) if (found := memory.predictions(name)) is not None]
        answers = kept[0].answers.flatten()
        places = last_of_each(answers, torch.ones_like(answers, dtype=torch.bool))
        if len(places) < LEAST_ANSWERS:
            raise NothingToFit(f"{len(places)} different answers are too few, and {LEAST_ANSWERS} are needed")
        columns = torch.stack([found.location.flatten()[places].double() for found in kept], dim=1).numpy()
        # Where a reward is 0 is arbitrary, in each attribute.
        columns -= columns.mean(axis=0)
        start = np.array(attributes.start)
        used = start != 0
        # In shares of the start, which has the sign.
        found = lsq_linear(columns[:, 1:][:, used] * start[used], columns[:, 0], bounds=(LEAST_SHARE, np.inf)).x
        shares = np.ones(len(start))
        shares[used] = found
        attributes.divide(torch.from_numpy(shares))
        self.whole_head.fold()
        return {
            f"attribute_weight/{name}": weight.item()
            for name, weight in zip(attributes.names, attributes.weights(), strict=True)
        }
