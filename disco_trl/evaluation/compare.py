"""Comparison of Bradley–Terry, trained by TRL's own trainer, with variants of disco on the same data, order and
budget: the computation behind `disco-trl compare`.

Each run, a variant with a seed, is a process of its own (`disco_trl.evaluation.compare_run`). A run that fails or
exhausts the memory does not take the others with it, and its peak memory is measured separately. Each run leaves a
folder, and a comparison that is started again continues with the missing runs.

What flows: variants and seeds → a folder for each → the figures of each, of which `disco_trl.evaluation.verdicts`
makes tables.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging
from trl import RewardConfig

from ..distributions.reward_distribution import FAMILIES, RewardDistribution
from ..trainer.reward_config import DiscoRewardConfig
from .child import run_child
from .compare_run import FIGURES_FILE, UNTIL_INPUT_ENDS, Run, load_attributes, load_rewards, read_figures, read_run
from .controls import BRADLEY_TERRY, CONTROLS, GRADES, SIGN
from .scored import Scored


DEFINE_FAMILY = ("reward_family",)
DEFINE_BRADLEY_TERRY = (*DEFINE_FAMILY, "fixed_scale", "location_error", "attributes")
OF_CONTROL = ("labels", "members")
OF_BATCHES = ("weigh_by", "prefix_sharing", "max_tokens_per_batch")
"""Fields of [`DiscoRewardConfig`] that apply to Bradley–Terry in our trainer as well: they say what weighs how much,
and what is computed at once."""
RUN_FILE = "run.json"
LAST_WORDS = 2000


@dataclass(frozen=True)
class Variant:
    """Variant to train: Bradley–Terry, a control or a family, optionally with settings of its own.

    Attributes:
        name (`str`):
            The variant as it was given, such as `normal:prefix_sharing=false`.
        base (`str`):
            One of [`~disco_trl.evaluation.controls.CONTROLS`] or the name of a family.
        settings (`dict`, *optional*, defaults to `{}`):
            Fields of [`DiscoRewardConfig`].
        of_control (`dict`, *optional*, defaults to `{}`):
            `labels` and `members` of a control; see [`~disco_trl.evaluation.compare_run.Run`].
    """

    name: str
    base: str
    settings: dict[str, Any] = field(default_factory=dict)
    of_control: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Parses a variant from the command line.

        Args:
            text (`str`):
                `BASE` or `BASE:KEY=VALUE,KEY=VALUE`.

        Returns:
            [`Variant`]: The variant.

        Raises:
            `ValueError`: If the base is neither Bradley–Terry, nor a control, nor a family, or a setting is invalid.
        """
        base, _, rest = text.partition(":")
        argument = f"--variants {text}"
        is_control = base in CONTROLS
        if not is_control and base not in FAMILIES:
            raise ValueError(f"{argument}: {base!r} is none of {', '.join((*CONTROLS, *FAMILIES))}")
        # Commas in brackets belong to a value.
        items = re.split(r",(?![^\[]*\])", rest) if rest else []
        settings = parse_settings(items, argument, OF_CONTROL if is_control else ())
        if base == BRADLEY_TERRY and settings:
            raise ValueError(
                f"{argument}: Bradley–Terry is what the others are compared with, and has none; give them to a "
                f"control: {', '.join(name for name in CONTROLS if name != BRADLEY_TERRY)}"
            )
        if defined := [name for name in (DEFINE_BRADLEY_TERRY if is_control else DEFINE_FAMILY) if name in settings]:
            raise ValueError(f"{argument}: {defined[0]} is what makes it {base}; leave it out, or choose another base")
        settings = CONTROLS.get(base, {}) | settings
        of_control = {name: settings.pop(name) for name in OF_CONTROL if name in settings}
        _check_control(of_control, settings, argument)
        return cls(text, base, settings, of_control)

    @property
    def folder(self) -> str:
        """Name of the variant with the characters that are safe in file names."""
        return "".join(letter if letter.isalnum() or letter in "-._=" else "_" for letter in self.name)

    def applied(self, common: dict[str, Any]) -> dict[str, Any]:
        """Settings of its runs.

        Args:
            common (`dict`):
                Settings for all variants. Those of the distribution do not apply to Bradley–Terry and its controls.

        Returns:
            `dict`: Fields of [`DiscoRewardConfig`].
        """
        if self.base in CONTROLS:
            common = {
                name: common[name]
                for name in common
                if name in RewardConfig.__dataclass_fields__ or name in OF_BATCHES
            }
        return common | self.settings


def _check_control(of_control: dict[str, Any], settings: dict[str, Any], argument: str) -> None:
    """Raises `ValueError` if what a control is made of is invalid."""
    members, labels = of_control.get("members", 1), of_control.get("labels", SIGN)
    if type(members) is not int or members < 1:
        raise ValueError(f"{argument}: members={members} must be a whole number, 2 or more for an ensemble")
    if members > 1 and settings.get("epistemic"):
        raise ValueError(f"{argument}: the error of an ensemble is the spread of its members; leave epistemic out")
    is_table = isinstance(labels, list) and labels and all(type(label) in (int, float) for label in labels)
    if labels not in (SIGN, GRADES) and not (
        is_table and labels == sorted(labels) and 0.5 <= labels[0] <= labels[-1] <= 1
    ):
        raise ValueError(
            f"{argument}: labels={labels} must be {SIGN}, {GRADES}, or a list of the probability of each grade, "
            "ascending from 0.5 to 1"
        )


def parse_settings(items: Sequence[str], argument: str, more: Sequence[str] = ()) -> dict[str, Any]:
    """Parses settings of the form `KEY=VALUE`.

    Args:
        items (`Sequence[str]`):
            Settings. A value is read as JSON; what is not JSON is a string.
        argument (`str`):
            Name of the command-line argument, for error messages.
        more (`Sequence[str]`, *optional*, defaults to `()`):
            Keys beside the fields of [`DiscoRewardConfig`].

    Returns:
        `dict`: Values by the name of the field.

    Raises:
        `ValueError`: If an item has no `=`, or its key is unknown.
    """
    known = {*(one.name for one in fields(DiscoRewardConfig)), *more}
    settings = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or key not in known:
            others = f", {' or '.join(more)}" if more else ""
            raise ValueError(
                f"{argument}: {item!r} is no setting; write KEY=VALUE with a field of DiscoRewardConfig{others}"
            )
        settings[key] = _value_of(value)
    return settings


def _value_of(text: str) -> Any:
    for spelling in (text, text.lower()):  # accepts Python's True and None as well as JSON's true and null
        try:
            return json.loads(spelling)
        except json.JSONDecodeError:
            continue
    return text


@dataclass
class Result:
    """Finished run.

    Attributes:
        variant ([`Variant`]):
            What was trained.
        seed (`int`):
            Seed of the run.
        figures (`dict`):
            Content of the run's `metrics.json`.
        rewards ([`RewardDistribution`]):
            Rewards of the held-out answers, of shape `(N,)`.
        attributes (`dict[str, Scored]`, *optional*, defaults to `{}`):
            What the model says about each attribute that it knows.
    """

    variant: Variant
    seed: int
    figures: dict[str, Any]
    rewards: RewardDistribution
    attributes: dict[str, Scored] = field(default_factory=dict)

    @property
    def tie_width(self) -> float | None:
        """Half-width of the band in which two rewards count as a tie, if the model knows it."""
        return self.figures["tie_width"]

    def about(self, attribute: str) -> Result:
        """The run of a model that has the rewards for an attribute alone."""
        scored = self.attributes[attribute]
        return replace(self, rewards=scored.rewards, figures=self.figures | {"tie_width": scored.tie_width})

    @classmethod
    def load(cls, variant: Variant, seed: int, folder: Path) -> Result:
        """Loads a finished run from its folder.

        Args:
            variant ([`Variant`]):
                What was trained.
            seed (`int`):
                Seed of the run.
            folder (`Path`):
                Folder of the run.

        Returns:
            [`Result`]: The run.

        Raises:
            `ValueError`: As [`~disco_trl.evaluation.compare_run.read_run`].
        """
        figures = read_run(folder)
        rewards = load_rewards(folder, figures["family"])
        return cls(variant, seed, figures, rewards, load_attributes(folder, figures))


class SearchError(RuntimeError):
    """A search for settings failed."""


def find_settings(runs: list[tuple[Variant, int, Run]], trials: int) -> list[tuple[Variant, int, Run]]:
    """Searches for the best settings of each variant, with the seed of its first run.

    Args:
        runs (`list[tuple[Variant, int, Run]]`):
            Variant, seed and specification of each run.
        trials (`int`):
            Number of trials of each search.

    Returns:
        `list[tuple[Variant, int, Run]]`: The runs with the settings that were found for their variant.

    Raises:
        `SearchError`: If a search fails. The message ends with the last lines of its log.
    """
    found: dict[str, dict[str, Any]] = {}
    for variant, _, run in logging.tqdm(runs, desc="Searches", unit="run"):
        if variant.name not in found:
            folder = Path(run.output).with_name(f"{variant.folder}-search")
            words = launch(replace(run, search=trials, output=str(folder)))
            if words is not None:
                raise SearchError(f"the search for {variant.name} failed:\n{words}")
            found[variant.name] = read_figures(folder)["best"]
    return [(variant, seed, replace(run, settings=run.settings | found[variant.name])) for variant, seed, run in runs]


def run_all(runs: list[tuple[Variant, int, Run]]) -> tuple[list[Result], dict[str, str]]:
    """Executes the runs that are not finished, each in a process of its own.

    Args:
        runs (`list[tuple[Variant, int, Run]]`):
            Variant, seed and specification of each run.

    Returns:
        `tuple[list[Result], dict[str, str]]`: The finished runs, and the end of the log of each run that failed, by
        `VARIANT, seed N`.

    Raises:
        `ValueError`: If a folder contains a finished run with other settings.
    """
    # All folders are checked before the first run, which may take hours.
    for _, _, run in runs:
        _check_same(run)
    results, failures = [], {}
    with logging.tqdm(total=len(runs), desc="Runs", unit="run") as bar:
        for variant, seed, run in runs:
            words = launch(run)
            if words is None:
                results.append(Result.load(variant, seed, Path(run.output)))
            else:
                failures[f"{variant.name}, seed {seed}"] = words
            bar.update()
    return results, failures


def launch(run: Run) -> str | None:
    """Executes a run in a process of its own, unless it is finished. The members of an ensemble are runs of their own,
    which come before it.

    Args:
        run ([`~disco_trl.evaluation.compare_run.Run`]):
            Specification of the run.

    Returns:
        `str` or `None`: `None` on success, otherwise the end of the run's log.

    Raises:
        `ValueError`: If the folder contains a finished run with other settings.
    """
    _check_same(run)
    folder = Path(run.output)
    if (folder / FIGURES_FILE).exists():
        return None
    for member in run.of_members:
        if (words := launch(member)) is not None:
            return f"member {member.member}: {words}"
    folder.mkdir(parents=True, exist_ok=True)
    specification = folder / RUN_FILE
    specification.write_text(json.dumps(asdict(run), indent=2) + "\n", encoding="utf-8")
    # A new interpreter per run: its memory is returned when it exits, and a crash in native code ends this run only.
    # Whatever ends this process ends the run as well.
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "disco_trl.evaluation.compare_run", str(specification), UNTIL_INPUT_ENDS]
        status = run_child(command, log)
    if status == 0:
        return None
    words = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip()[-LAST_WORDS:]
    return words or f"exit status {status}"


def _check_same(run: Run) -> None:
    for member in run.of_members:
        _check_same(member)
    file = Path(run.output) / RUN_FILE
    if not (file.parent / FIGURES_FILE).exists():
        return  # An unfinished run is simply repeated.
    if not run.search:
        read_run(file.parent)
    before = asdict(Run(**json.loads(file.read_text(encoding="utf-8"))))
    changed = [name for name, value in asdict(run).items() if value != before[name]]
    if changed:
        raise ValueError(
            f"{file.parent} holds a run with another {' and '.join(changed)}; remove it, or choose another "
            "--output_dir"
        )
