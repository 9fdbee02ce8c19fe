"""Evaluation of a reward model on held-out data, with intervals: the computation behind `disco-trl evaluate`.

Any scalar reward model is evaluated by the same code: a classifier with one label counts as Bradley–Terry.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from .._version import versions_of
from ..data.columns import OVERALL
from ..distributions.reward_distribution import RewardDistribution
from .agreement import spread_by_scale, with_grades, with_raters, with_shares
from .attributes import of_attributes, of_correlations, remarks_on
from .bootstrap import resamples
from .calibration import reliability_curve
from .figures import Figure, figure_of
from .held_out import HeldOut
from .metrics import METRICS, risk_coverage_curve
from .ratings import with_ratings
from .report import EXPLAINED, as_cell
from .scored import Scored


DRAWS = 1000
BY_SUBSET = ("accuracy", "nll", "calibration_error")
VERSIONS = ("disco-trl", "trl", "transformers", "torch", "peft", "datasets")
CURVE_POINTS = 200


@dataclass
class Evaluation:
    """Results of an evaluation.

    Attributes:
        attribute (`str`):
            What the judgements are about, `"overall"` or an attribute. All fields but the last three are about it.
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
        attributes (`dict[str, dict[str, Figure]]`):
            Figures of each attribute that both the model and the data know, see
            [`~disco_trl.evaluation.attributes.of_attributes`].
        correlations (`dict[str, Figure]`):
            How people's opinions of two attributes go together, see
            [`~disco_trl.evaluation.attributes.of_correlations`].
        remarks (`list[str]`):
            What could not be evaluated, in words.
    """

    attribute: str
    counts: dict[str, float]
    metrics: dict[str, Figure]
    subsets: dict[str, dict[str, Figure]]
    benchmark: dict[str, Figure]
    agreement: dict[str, Figure]
    scale: dict[str, float]
    reliability: dict[str, list[float]]
    risk_coverage: dict[str, list[float]]
    spread_by_scale: dict[str, list[float]]
    attributes: dict[str, dict[str, Figure]]
    correlations: dict[str, Figure]
    remarks: list[str]


def evaluate(scored: Scored, held_out: HeldOut, draws: int = DRAWS, seed: int = 0) -> Evaluation:
    """Evaluates what a model says about held-out data.

    Strengths of preference and ties need what the model knows of how people answer. If it knows nothing, strengths are
    votes for either answer, or ties, and P(first ≻ second) is what is expected of them.

    Args:
        scored ([`~disco_trl.evaluation.scored.Scored`]):
            What the model says about `held_out.sequences`.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            The data. If they are about one attribute ([`~disco_trl.evaluation.held_out.HeldOut.about`]), so are the
            results; otherwise these contain the figures of each attribute beside the overall ones.
        draws (`int`, *optional*, defaults to `1000`):
            Number of bootstrap resamples over `held_out.groups`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        [`Evaluation`]: The results.

    Raises:
        `ValueError`: If a strength of preference is beyond those that the model knows.
    """
    rewards = scored.rewards
    forecasts = held_out.forecasts(rewards, scored.tie_width)
    # All metrics see the same resamples, so that their intervals describe one and the same bootstrap.
    counts = resamples(forecasts.groups, draws, seed)
    subset_of = np.array([item.subset for item in held_out.items])[held_out.item]
    subsets = np.unique(subset_of)
    curve = reliability_curve(forecasts)
    coverage, risk = risk_coverage_curve(forecasts)
    # A curve of tens of thousands of points makes the report slow to open, and 200 look the same.
    thin = np.unique(np.linspace(0, len(coverage) - 1, CURVE_POINTS).astype(int))[: len(coverage)]
    is_compared = bool(held_out.weight.any())
    is_whole = held_out.attribute == OVERALL
    where = "overall" if is_whole else f"in {held_out.attribute!r}"
    remarks = [] if is_compared else [f"Nobody compared two answers {where}."]
    return Evaluation(
        attribute=held_out.attribute,
        counts={
            "items": len(held_out.items),
            "answers": len(held_out.sequences),
            "comparisons": int((forecasts.weight > 0).sum()),
            "ties": int(((forecasts.target == 0.5) & (forecasts.weight > 0)).sum()),
        },
        metrics={name: figure_of(name, forecasts, counts) for name in METRICS if is_compared},
        subsets={
            str(subset): {name: figure_of(name, forecasts[of], counts[:, of]) for name in BY_SUBSET}
            for subset in subsets
            if len(subsets) > 1 and is_compared
            for of in [np.flatnonzero(subset_of == subset)]
        },
        benchmark=_benchmark(rewards, held_out, draws, seed),
        agreement=with_shares(forecasts, counts, draws, seed)
        | with_grades(rewards, held_out, scored.responses, counts)
        | with_ratings(scored, held_out, draws, seed)
        | with_raters(rewards, held_out, draws, seed),
        scale=_summary(rewards),
        reliability={name: values.tolist() for name, values in vars(curve).items()},
        risk_coverage={"coverage": coverage[thin].tolist(), "risk": risk[thin].tolist()},
        spread_by_scale=spread_by_scale(rewards, held_out),
        attributes=of_attributes(scored, held_out, draws, seed) if is_whole else {},
        correlations=of_correlations(scored, held_out, draws, seed) if is_whole else {},
        remarks=remarks + (remarks_on(scored.attributes, held_out) if is_whole else []),
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


def about_attribute(attribute: str) -> str:
    """What judgements are about, in brackets behind a heading; nothing if it is the overall judgement."""
    return "" if attribute == OVERALL else f" (attribute {attribute})"


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
        + (f", {counts['ties']:,} of them ties" if counts["ties"] else "")
        + about_attribute(found.attribute),
    ]
    of_attributes = [(f"attribute {name}", figures) for name, figures in found.attributes.items()]
    blocks = [("", found.metrics), ("", found.benchmark), ("", found.agreement), *of_attributes]
    blocks.append(("correlation of attributes", found.correlations))
    names = {name for _, block in blocks for name in block}
    width = max(map(len, [*names, *found.scale, *found.subsets]))
    for heading, block in blocks:
        if block:
            lines += ["", *([f"  {heading}"] if heading else [])]
            lines += [f"  {name:{width}}  {figure}" for name, figure in block.items()]
    if found.subsets:
        lines += ["", f"  {'subset':{width}}  accuracy"]
        lines += [f"  {name or '(none)':{width}}  {figures['accuracy']}" for name, figures in found.subsets.items()]
    lines += ["", *(f"  {name:{width}}  {value:.4f}" for name, value in found.scale.items())]
    lines += ["", *(f"  {remark}" for remark in found.remarks)] if found.remarks else []
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
        f"{found.counts['comparisons']:,} comparisons of `{Path(data).name}`"
        f"{about_attribute(as_cell(found.attribute))}; 95 % intervals.",
        "",
    ]
    lines += ["| Metric | Value | Interval |", "| --- | ---: | ---: |"]
    groups = {"": found.metrics | found.benchmark | found.agreement} | found.attributes
    groups["Correlation"] = found.correlations
    for group, figures in groups.items():
        for name, figure in figures.items():
            title = EXPLAINED[name][0] if name in EXPLAINED else name.capitalize() if not group else name
            value = figure.note if np.isnan(figure.value) and figure.note else f"{figure.value:.4f}"
            ends = "–" if np.isnan(figure.low) else f"{figure.low:.4f} to {figure.high:.4f}"
            lines.append(f"| {as_cell(f'{group}: {title}' if group else title)} | {value} | {ends} |")
    return "\n".join([*lines, *(f"\n{as_cell(remark)}" for remark in found.remarks)])


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
