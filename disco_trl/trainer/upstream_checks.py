"""
Checks that TRL and transformers still do what the reward trainer relies on.

The trainer overrides methods that have no public interface and reads what TRL logs (`docs/upstream.md` lists both). If
a release renames such a method, stops calling it, or orders a batch in another way, training goes on and means
something else: votes are dropped, rows are not checked, logged margins are wrong. setup.cfg bounds the releases that
pip installs. The checks here find such a change whatever is installed, before the first optimizer step, and each ends
in the one error of [`upstream_error`].

| when | what is checked |
| --- | --- |
| before construction | the methods that are overridden are there, and take the arguments that ours take |
| after construction | our preparation of the datasets ran, and the model that is trained is the one that was adopted |
| when a dataloader is made | its samplers are ours, our columns are kept for the collator, and TRL reads no others |
| first batch | what the rows say has reached the loss, and TRL reads the two sides of a pair as we do |
| first optimizer step | batches go through our `_prepare_input`, which keeps margins and votes in float32 |
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import transformers
import trl
from accelerate.logging import get_logger
from packaging.specifiers import SpecifierSet
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOTrainer, RewardTrainer

from ..data.collator import ANSWERS
from ..data.columns import JUDGEMENT_COLUMNS, RANKED_IDS, ROW_COLUMN, TOKENIZED_PAIR
from ..data.judgements import has_judgements


logger = get_logger(__name__)

SUPPORTED = {"trl": ">=1.12.0,<1.17", "transformers": ">=5.18.0,<6"}
"""Releases that the tests run with or between, those of setup.cfg."""

HOOKS = (
    *("_prepare_dataset", "_set_signature_columns_if_needed", "_prepare_input", "create_accelerator_and_postprocess"),
    *("_get_train_sampler", "_get_eval_sampler", "get_train_dataloader", "get_eval_dataloader"),
    *("_save_checkpoint", "_load_optimizer_and_scheduler", "_save", "evaluation_loop", "log", "compute_loss"),
)
"""Methods that TRL's trainer or transformers' must have and call, as ours do their work in them."""


class UpstreamError(RuntimeError):
    """TRL or transformers, as installed or as changed by another library, does not do what is relied on."""


def upstream_error(problem: str) -> UpstreamError:
    """
    Make the error of all checks: what is wrong, which releases are installed, which are supported, and what to do.

    Args:
        problem (`str`):
            What does not hold, as a clause.

    Returns:
        [`UpstreamError`]: The error, to be raised.
    """
    supported = " and ".join(f"{name} {releases}" for name, releases in SUPPORTED.items())
    replaced = {"RewardTrainer": RewardTrainer, "DPOTrainer": DPOTrainer}
    replaced = {name: kind for name, kind in replaced.items() if not kind.__module__.startswith("trl.")}
    if replaced:
        name, kind = next(iter(replaced.items()))
        fix = (
            f"Another library has put {kind.__module__}.{kind.__name__} in the place of "
            f"trl.{name}; import disco_trl before that library"
        )
    elif outside_of_support():
        fix = "Install releases that are supported: pip install " + " ".join(
            f"'{name}{releases}'" for name, releases in SUPPORTED.items()
        )
    else:
        fix = (
            "These releases are supported, so something has changed them: import disco_trl before libraries that "
            "patch TRL, or install them anew"
        )
    return UpstreamError(
        f"{problem}. Installed: trl {trl.__version__} and transformers {transformers.__version__}; "
        f"supported: {supported}. {fix}."
    )


def outside_of_support() -> list[str]:
    """The installed releases, such as `trl 1.17.0`, that are outside of those in [`SUPPORTED`]."""
    installed = {"trl": trl.__version__, "transformers": transformers.__version__}
    return [
        f"{name} {installed[name]}"
        for name, releases in SUPPORTED.items()
        if not SpecifierSet(releases).contains(installed[name], prereleases=True)
    ]


def check_overrides(trainer_class: Any, upstream: Any, names: Iterable[str]) -> None:
    """
    Check, before anything is constructed, that the methods that a trainer overrides are there and take what ours take.

    A release that is outside of [`SUPPORTED`] is warned of.

    Args:
        trainer_class (`type`):
            Class of the trainer.
        upstream (`type`):
            TRL's trainer that it is a subclass of.
        names (`Iterable[str]`):
            Names of the methods.

    Raises:
        [`UpstreamError`]: If a method is not there, or takes other arguments.
    """
    if outside := outside_of_support():
        logger.warning(
            f"{' and '.join(outside)} has not been tried with this release of disco-trl, which supports "
            f"{' and '.join(f'{name} {releases}' for name, releases in SUPPORTED.items())}."
        )
    named = upstream.__name__
    for name in names:
        theirs = getattr(upstream, name, None)
        if theirs is None:
            raise upstream_error(f"trl's {named} has no method {name}, which Disco{named} overrides")
        ours = next(vars(kind)[name] for kind in _classes_of_ours(trainer_class) if name in vars(kind))
        _check_arguments(named, name, ours, theirs)


def hook(method: Callable[..., Any]) -> Any:
    """Note in the trainer's [`UpstreamChecks`] that upstream has called a method of ours."""

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._upstream.called.add(method.__name__)
        return method(self, *args, **kwargs)

    called.is_hook = True  # type: ignore[attr-defined]
    return called


class UpstreamChecks(TrainerCallback):
    """
    The checks of one trainer.

    Args:
        trainer_class (`type`):
            Class of the trainer. Its overrides of [`HOOKS`] are compared with the methods that they override.

    Raises:
        [`UpstreamError`]: If a method is not there, or takes other arguments.
    """

    def __init__(self, trainer_class: Any):
        self.trainer_class = trainer_class
        self.called: set[str] = set()
        # Columns of the dataset whose first batch has not come yet, by mode
        self._awaited: dict[str, set[str]] = {}
        # Modes in which TRL's metrics of a batch have been compared with ours
        self._compared: set[str] = set()
        check_overrides(trainer_class, RewardTrainer, HOOKS)

    def after_construction(self, trainer: Any) -> None:
        """
        Check what TRL's constructor has done.

        Args:
            trainer ([`DiscoRewardTrainer`]):
                The trainer, right after TRL's constructor.
        """
        if not {"train", "eval"} <= getattr(trainer, "_metrics", {}).keys():
            raise upstream_error("trl's RewardTrainer does not keep its metrics in `_metrics`, as 'train' and 'eval'")
        adopted = trainer._adoption.model
        if not any(module is adopted for module in trainer.model.modules()):
            raise upstream_error(
                f"the model that trl's RewardTrainer trains, a {type(trainer.model).__name__}, is not the one that "
                "was given a scale"
            )
        self._expect_calls(["_prepare_dataset"], "so the rows would be neither checked nor tokenized as documented")
        self._expect_calls(["create_accelerator_and_postprocess"], "so the head could be rounded to bfloat16")
        evaluated = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
        for dataset in (trainer.train_dataset, *evaluated.values()):
            columns = getattr(dataset, "column_names", None)
            if "_prepare_dataset" in self.called and columns is not None and ROW_COLUMN not in columns:
                raise upstream_error("trl's RewardTrainer has not kept the datasets that `_prepare_dataset` returned")

    def after_dataloader(self, trainer: Any, mode: str, dataset: Any) -> None:
        """
        Check a dataloader that transformers has just made, and await its first batch.

        Args:
            trainer ([`DiscoRewardTrainer`]):
                The trainer.
            mode (`str`):
                `"train"` or `"eval"`.
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                What it reads, before columns are removed.
        """
        if trainer.args.remove_unused_columns:
            self._expect_calls(["_set_signature_columns_if_needed"], "so votes, ratings and margins would be dropped")
        if hasattr(dataset, "__len__"):
            self._expect_calls([f"_get_{mode}_sampler"], "so its batches would not be those asked for")
        columns = self._awaited[mode] = {*(getattr(dataset, "column_names", None) or ())}
        kept = {*(trainer._signature_columns or ())} if trainer.args.remove_unused_columns else set()
        if unread := sorted(columns & kept - {*TOKENIZED_PAIR, ROW_COLUMN, RANKED_IDS, "ranks", *JUDGEMENT_COLUMNS}):
            raise upstream_error(
                f"trl's RewardTrainer reads the column {', '.join(unread)} of the dataset, which DiscoRewardTrainer "
                "does not know and would ignore; leave the column out to train without it"
            )

    def check_batch(self, mode: str, batch: dict[str, Any]) -> None:
        """
        Check that the first batch of a dataloader holds what its dataset says.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            batch (`dict[str, Any]`):
                The batch, before anything is taken out of it. One without `answers` comes from a collator of the
                user's own, and is not checked.
        """
        columns = self._awaited.pop(mode, set())
        if ANSWERS not in batch:
            return
        expected = {ROW_COLUMN: ROW_COLUMN in columns, "margin": "margin" in columns}
        expected["judgements"] = has_judgements(columns)
        missing = [name for name, is_expected in expected.items() if is_expected and name not in batch]
        if missing:
            raise upstream_error(
                f"the first batch ({mode}) lacks {', '.join(missing)}, which the columns of the dataset give: "
                "transformers has removed columns that the loss is about"
            )

    def check_layout(self, trainer: Any, mode: str, chosen: Tensor, rejected: Tensor) -> None:
        """
        Check, for the first batch of a mode, that TRL has read the chosen and rejected sides where they are.

        Args:
            trainer ([`DiscoRewardTrainer`]):
                The trainer, when TRL has logged the batch.
            mode (`str`):
                `"train"` or `"eval"`.
            chosen, rejected (`torch.Tensor` of shape `(P,)`):
                Locations of the two sides in this batch, of all processes.
        """
        # At the end of a dataloader accelerate leaves repeated rows of several processes out of what TRL logs.
        accelerator = trainer.accelerator
        if mode in self._compared or (accelerator.num_processes > 1 and accelerator.gradient_state.end_of_dataloader):
            return
        self._compared.add(mode)
        logged = trainer._metrics[mode]
        if not logged.get("accuracy") or not logged.get("margin"):
            raise upstream_error("trl's RewardTrainer does not log `accuracy` and `margin` of a batch")
        difference = chosen - rejected
        off = abs(logged["margin"][-1] - difference.mean().item())
        # (What is not finite is not larger. The guard against such numbers names the rows.)
        if off > 1e-3 * difference.abs().mean().item() + 1e-5 * max(chosen.abs().max(), rejected.abs().max()).item():
            raise upstream_error(
                f"trl's RewardTrainer finds a margin of {logged['margin'][-1]:.6g} in the first batch ({mode}), which "
                f"is {difference.mean().item():.6g}: it does not read the chosen sides as the first half of a batch "
                "and the rejected ones as the second"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check how transformers has handled the batches of the first optimizer step."""
        if self.trainer_class._prepare_inputs is not RewardTrainer._prepare_inputs:
            return  # a subclass of the user's
        self._expect_calls(["_prepare_input"], "so margins and votes could be rounded to bfloat16")

    def _expect_calls(self, names: Iterable[str], meaning: str) -> None:
        for name in names:
            # A subclass may have a method of its own, which need not call ours.
            is_ours = hasattr(getattr(self.trainer_class, name), "is_hook")
            if is_ours and name not in self.called:
                raise upstream_error(f"neither trl nor transformers calls `{name}` of the trainer any more, {meaning}")


def _classes_of_ours(trainer_class: type) -> list[type]:
    """Those among the bases of a trainer that are this package's."""
    return [kind for kind in trainer_class.__mro__ if kind.__module__.startswith(f"{__package__.partition('.')[0]}.")]


def _check_arguments(trainer: str, name: str, ours: Any, theirs: Any) -> None:
    """Check that ours can be called as theirs is."""
    parameters = inspect.signature(ours).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    added = [argument for argument in inspect.signature(theirs).parameters if argument not in parameters]
    if added:
        raise upstream_error(
            f"the method {name} of trl's {trainer} takes {', '.join(added)}, which that of Disco{trainer} does not "
            "know"
        )
