"""Evaluation of a reward model on held-out data, with intervals: the computation behind `disco-trl evaluate`.

Any scalar reward model is evaluated by the same code: a classifier with one label counts as Bradley–Terry.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset

from .._version import versions_of
from ..distributions.likelihood import Responses
from ..distributions.reward_distribution import RewardDistribution
from .agreement import spread_by_scale, with_grades, with_raters, with_shares
from .bootstrap import resamples
from .calibration import reliability_curve
from .figures import Figure, figure_of
from .held_out import HeldOut
from .metrics import METRICS, risk_coverage_curve
from .report import EXPLAINED


DRAWS = 1000
BY_SUBSET = ("accuracy", "nll", "calibration_error")
VERSIONS = ("disco-trl", "trl", "transformers", "torch", "peft", "datasets")
CURVE_POINTS = 200


@dataclass
class Evaluation:
    """Results of an evaluation.

    Attributes:
        counts (`dict[str, float]`):
            Numbers of items, answers, comparisons and ties.
        metrics (`dict[str, Figure]`):
            Values of [`~disco_trl.evaluation.metrics.METRICS`].
        subsets (`dict[str, dict[str, Figure]]`):
            Some of the metrics by subset. Empty if there is only one subset.
        benchmark (`dict[str, Figure]`):
            The benchmark's own figures. Empty if the data are no known benchmark.
        agreement (`dict[str, Figure]`):
            Figures of `disco_trl.evaluation.agreement`, where the data have what they need: several votes, soft
            labels, strengths of preference or ratings.
        scale (`dict[str, float]`):
            Quantiles of the scales and of the location errors (the epistemic uncertainty), in units of the reward.
        reliability (`dict[str, list[float]]`):
            `predicted`, `observed` and `count` of each bin.
        risk_coverage (`dict[str, list[float]]`):
            `coverage` and `risk`, thinned to at most 200 points.
        spread_by_scale (`dict[str, list[float]]`):
            Spread of people's ratings in groups of answers, see
            [`~disco_trl.evaluation.agreement.spread_by_scale`].
    """

    counts: dict[str, float]
    metrics: dict[str, Figure]
    subsets: dict[str, dict[str, Figure]]
    benchmark: dict[str, Figure]
    agreement: dict[str, Figure]
    scale: dict[str, float]
    reliability: dict[str, list[float]]
    risk_coverage: dict[str, list[float]]
    spread_by_scale: dict[str, list[float]]


def evaluate(
    rewards: RewardDistribution,
    held_out: HeldOut,
    draws: int = DRAWS,
    seed: int = 0,
    responses: Responses | None = None,
) -> Evaluation:
    """Evaluates the rewards of a model on held-out data.

    Args:
        rewards ([`RewardDistribution`]):
            Rewards of `held_out.sequences`, of shape `(N,)`.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            The data.
        draws (`int`, *optional*, defaults to `1000`):
            Number of bootstrap resamples over `held_out.groups`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.
        responses ([`~disco_trl.distributions.likelihood.Responses`], *optional*, defaults to `None`):
            How people answer, according to the model
            ([`~disco_trl.models.heads.DiscoHead.responses`]): needed for strengths of preference and ties. If `None`,
            strengths are votes for either answer, or ties, and P(first ≻ second) is what is expected of them.

    Returns:
        [`Evaluation`]: The results.

    Raises:
        `ValueError`: If a strength of preference is beyond those that the model knows.
    """
    responses = responses or Responses()
    forecasts = held_out.forecasts(rewards, tie_width_of(responses))
    # All metrics see the same resamples, so that their intervals describe one and the same bootstrap.
    counts = resamples(forecasts.groups, draws, seed)
    subset_of = np.array([item.subset for item in held_out.items])[held_out.item]
    subsets = np.unique(subset_of)
    curve = reliability_curve(forecasts)
    coverage, risk = risk_coverage_curve(forecasts)
    # A curve of tens of thousands of points makes the report slow to open, and 200 look the same.
    thin = np.unique(np.linspace(0, len(coverage) - 1, CURVE_POINTS).astype(int))
    return Evaluation(
        counts={
            "items": len(held_out.items),
            "answers": len(held_out.sequences),
            "comparisons": int((forecasts.weight > 0).sum()),
            "ties": int(((forecasts.target == 0.5) & (forecasts.weight > 0)).sum()),
        },
        metrics={name: figure_of(name, forecasts, counts) for name in METRICS},
        subsets={
            str(subset): {name: figure_of(name, forecasts[of], counts[:, of]) for name in BY_SUBSET}
            for subset in subsets
            if len(subsets) > 1
            for of in [np.flatnonzero(subset_of == subset)]
        },
        benchmark=_benchmark(rewards, held_out, draws, seed),
        agreement=with_shares(forecasts, counts, draws, seed)
        | with_grades(rewards, held_out, responses, counts)
        | with_raters(rewards, held_out, draws, seed),
        scale=_summary(rewards),
        reliability={name: values.tolist() for name, values in vars(curve).items()},
        risk_coverage={"coverage": coverage[thin].tolist(), "risk": risk[thin].tolist()},
        spread_by_scale=spread_by_scale(rewards, held_out),
    )


def _benchmark(rewards: RewardDistribution, held_out: HeldOut, draws: int, seed: int) -> dict[str, Figure]:
    if held_out.benchmark is None:
        return {}
    items, of_items = held_out.items, held_out.rewards_of_items(rewards.location.numpy())
    summarize = held_out.benchmark.summarize
    figures = summarize(items, of_items, np.ones(len(items)))
    # A benchmark defines its figures over items, often as means of means, so that items are drawn and not comparisons.
    drawn = [summarize(items, of_items, weight) for weight in resamples(np.arange(len(items)), draws, seed)]
    return {name: Figure.of(value, [draw[name] for draw in drawn]) for name, value in figures.items()}


def _summary(rewards: RewardDistribution) -> dict[str, float]:
    levels = {"5 %": 0.05, "50 %": 0.5, "95 %": 0.95}
    location = rewards.location.double().numpy()
    figures = {f"scale, {name}": np.quantile(rewards.scale.double().numpy(), at) for name, at in levels.items()}
    figures["standard deviation of the locations"] = location.std()
    if rewards.location_error is not None:
        errors = rewards.location_error.double().numpy()
        figures |= {f"location error, {name}": np.quantile(errors, at) for name, at in levels.items()}
    return {name: float(value) for name, value in figures.items()}


def responses_of(model: Any) -> Responses:
    """How people answer, according to a model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A disco model, or any sequence classifier with one label.

    Returns:
        [`~disco_trl.distributions.likelihood.Responses`]: Without any entry for a classifier, which does not say.
    """
    inner = model.get_base_model() if is_peft_model(model) else model
    return inner.reward_head.responses() if hasattr(inner.config, "disco") else Responses()


def tie_width_of(responses: Responses) -> float | None:
    """Half-width of the band in which two rewards count as a tie, or `None` if the model does not say."""
    return None if responses.tie_width is None else responses.tie_width.item()


def plain_view(rewards: RewardDistribution) -> RewardDistribution:
    """The model as a tool sees it that knows only scalar rewards: Bradley–Terry with the same locations.

    Args:
        rewards ([`RewardDistribution`]):
            Rewards of shape `(N,)`.

    Returns:
        [`RewardDistribution`]: Rewards of the logistic family with every scale at 1/√2.
    """
    return RewardDistribution(rewards.location, torch.full_like(rewards.location, 2**-0.5), "logistic")


# Files


def save_scores(path: Path, rewards: RewardDistribution, held_out: HeldOut) -> None:
    """Writes the reward of every answer to a Parquet file with the columns `item`, `answer`, `subset`, `name`,
    `location`, `scale` and, if the model has it, `location_error`.

    Args:
        path (`Path`):
            File to write.
        rewards ([`RewardDistribution`]):
            Rewards of `held_out.sequences`.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            The data.
    """
    # A sequence that occurs in several items was scored once; here it gets a row for each.
    positions = np.concatenate(held_out.answers)
    columns: dict[str, Any] = {
        "item": np.repeat(np.arange(len(held_out.items)), list(map(len, held_out.answers))),
        "answer": np.concatenate([np.arange(len(of_item)) for of_item in held_out.answers]),
        "subset": [item.subset for item in held_out.items for _ in item.answers],
        "name": [item.name for item in held_out.items for _ in item.answers],
        "location": rewards.location.numpy()[positions],
        "scale": rewards.scale.numpy()[positions],
    }
    if rewards.location_error is not None:
        columns["location_error"] = rewards.location_error.numpy()[positions]
    Dataset.from_dict(columns).to_parquet(str(path))


def as_text(found: Evaluation, title: str) -> str:
    """Formats the results for the terminal.

    Args:
        found ([`Evaluation`]):
            Results to format.
        title (`str`):
            First line.

    Returns:
        `str`: The text.
    """
    counts = found.counts
    lines = [
        title,
        f"  {counts['comparisons']:,} comparisons of {counts['answers']:,} answers in {counts['items']:,} items"
        + (f", {counts['ties']:,} of them ties" if counts["ties"] else ""),
    ]
    width = max(map(len, [*found.metrics, *found.agreement, *found.benchmark, *found.scale, *found.subsets]))
    for block in (found.metrics, found.benchmark, found.agreement):
        lines += ["", *(f"  {name:{width}}  {figure}" for name, figure in block.items())] if block else []
    if found.subsets:
        lines += ["", f"  {'subset':{width}}  accuracy"]
        lines += [f"  {name or '(none)':{width}}  {figures['accuracy']}" for name, figures in found.subsets.items()]
    lines += ["", *(f"  {name:{width}}  {value:.4f}" for name, value in found.scale.items())]
    return "\n".join(lines)


def as_markdown(found: Evaluation, data: str) -> str:
    """Formats the results for a model card.

    Args:
        found ([`Evaluation`]):
            Results to format.
        data (`str`):
            Path or Hub id of the data. Only its last part is shown.

    Returns:
        `str`: A Markdown table.
    """
    lines = [
        f"{found.counts['comparisons']:,} comparisons of `{Path(data).name}`; 95 % intervals.",
        "",
    ]
    lines += ["| Metric | Value | Interval |", "| --- | ---: | ---: |"]
    for name, figure in (found.metrics | found.benchmark | found.agreement).items():
        title = EXPLAINED[name][0] if name in EXPLAINED else name.capitalize()
        value = figure.note if np.isnan(figure.value) and figure.note else f"{figure.value:.4f}"
        ends = "–" if np.isnan(figure.low) else f"{figure.low:.4f} to {figure.high:.4f}"
        lines.append(f"| {title} | {value} | {ends} |")
    return "\n".join(lines)


def as_json(found: Evaluation) -> dict[str, Any]:
    """Converts the results to JSON values, as written to `metrics.json`.

    Args:
        found ([`Evaluation`]):
            Results to convert.

    Returns:
        `dict`: Fields of [`Evaluation`]. Each figure is `{"value": ..., "low": ..., "high": ...}`; an undefined number
        is `None`, and `"note"` says why if that is not obvious.
    """

    def fields_of(figure: Figure) -> dict[str, Any]:
        return {name: value for name, value in vars(figure).items() if value != ""}

    # JSON has no NaN: Python writes it all the same, and `parse_constant` makes it null.
    return json.loads(json.dumps(vars(found), default=fields_of), parse_constant=lambda _: None)


def versions() -> dict[str, str]:
    """Versions of the packages that results may depend on.

    Returns:
        `dict[str, str]`: Versions by package name.
    """
    return versions_of(VERSIONS)
