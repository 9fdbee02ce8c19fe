"""What is fitted to the heads of a model when training ends, in the order in which one result needs another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback

from ..data.columns import OVERALL
from ..models.modeling import DiscoRewardModel
from .attribute_weights import AttributeWeights
from .calibration import Calibration
from .correlation import Correlation
from .epistemic import Posterior
from .head_fit import HeadFit
from .predictions import PredictionMemory, Predictions
from .reward_config import DiscoRewardConfig


logger = get_logger(__name__)


class HeadFits(TrainerCallback):
    """
    Fits everything when training ends, and logs each reason why something is left as it was once.

    Args:
        model ([`~disco_trl.DiscoRewardModel`]):
            The model.
        args ([`DiscoRewardConfig`]):
            Configuration of the trainer.
        memory ([`PredictionMemory`], *optional*):
            Predictions to fit to, as in [`HeadFit`].
        log (`Callable[[dict[str, float]], None]`):
            Function that logs metrics, such as [`~transformers.Trainer.log`].
        calibrates (`bool`):
            Whether the rewards are to be calibrated.
        refusal (`str`, *optional*):
            Reason known before training why they will not be.
        predict_unseen (`Callable[[str], Predictions]`, *optional*):
            As in [`Calibration`].

    Attributes:
        fits (`list[HeadFit]`):
            What is fitted, in this order.
    """

    def __init__(
        self,
        model: DiscoRewardModel,
        args: DiscoRewardConfig,
        memory: PredictionMemory | None,
        log: Callable[[dict[str, float]], None],
        calibrates: bool,
        refusal: str | None,
        predict_unseen: Callable[[str], Predictions] | None,
    ):
        self.fits: list[HeadFit] = []
        common = (model.reward_head, model.family, memory, log)
        off = None if args.calibrate is not False else "calibrate=False turns off what is fitted when training ends"
        if model.learns_attribute_weights:
            self.fits.append(AttributeWeights(*common, OVERALL, off))  # before calibration multiplies the locations
        # An overall reward that is the weighted sum of the attributes has nothing of its own to be fitted.
        for attribute in [*model.attributes, *(() if model.is_weighted_sum else (OVERALL,))]:
            calibration = None
            if calibrates:
                calibration = Calibration(*common, attribute, refusal, predict_unseen=predict_unseen)
                self.fits.append(calibration)
            if args.epistemic:
                self.fits.append(Posterior(*common, attribute, calibration=calibration))
        if len(model.attributes) > 1:
            self.fits.append(Correlation(*common, OVERALL, off))

    @property
    def changed(self) -> bool:
        """Whether the last run of training ended with a change of a head, on all processes alike."""
        return any(fit.changed for fit in self.fits)

    @property
    def calibration_factor(self) -> float | None:
        """What the overall rewards were multiplied by in the end, or `None` if they were not calibrated."""
        metrics = {name: value for fit in self.fits for name, value in fit.metrics.items()}
        return metrics.get("calibration_factor_with_errors", metrics.get("calibration_factor"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the outcome of an earlier run."""
        for fit in self.fits:
            fit.begin()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fit everything."""
        attributes_of: dict[tuple[str, str], list[str]] = defaultdict(list)
        for fit in self.fits:
            fit.end(args, state)
            if fit.left_out is not None:
                attributes_of[fit.without, fit.left_out].append(fit.attribute)
        for (without, reason), attributes in attributes_of.items():
            about = "" if attributes == [OVERALL] else f" ({', '.join(attributes)})"
            logger.warning(f"{without}{about}: {reason}")
