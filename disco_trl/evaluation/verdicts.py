"""Verdicts and tables of `disco-trl compare`.

What flows: finished runs → means over seeds, and paired differences over comparisons and seeds, from Bradley–Terry in
the overall judgement and from the first variant that knows it in an attribute → tables.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from .clusters import paired_difference
from .compare import Result
from .controls import BRADLEY_TERRY
from .held_out import HeldOut
from .metrics import METRICS
from .ratings import rating_losses, why_unread
from .report import EXPLAINED, Verdict, as_cell, note_on_seeds


OF_EACH = {"nll": "nll", "accuracy": "right", "brier": "squared_error"}
"""Figures that are means over comparisons and can therefore be compared pair by pair, and the attribute of
[`~disco_trl.evaluation.forecasts.Forecasts`] that each is the mean of."""
COMPARED = tuple(OF_EACH)
LOWER_IS_BETTER = {"nll": True, "brier": True, "accuracy": False}


def paired(ours: list[Result], theirs: list[Result], held_out: HeldOut, name: str) -> Verdict:
    """Whether a figure of one model is better or worse than that of another. It is undecided if the interval of the
    [`~disco_trl.evaluation.clusters.paired_difference`] contains 0.

    Args:
        ours (`list[Result]`):
            Runs of the first model.
        theirs (`list[Result]`):
            Runs of the second model with the same seeds, in the same order.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            Data of the runs.
        name (`str`):
            One of [`COMPARED`].

    Returns:
        [`~disco_trl.evaluation.report.Verdict`]: The verdict.
    """
    forecasts = [[held_out.forecasts(run.rewards, run.tie_width) for run in runs] for runs in (ours, theirs)]
    # The weights, which are the same for all runs, are those of the metric of this name.
    weight = forecasts[0][0].decided if name == "accuracy" else forecasts[0][0].weight
    first, second = (np.stack([getattr(of_run, OF_EACH[name]) for of_run in runs]) for runs in forecasts)
    return verdict_on(first, second, weight, held_out.groups, LOWER_IS_BETTER[name])


def verdict_on(
    ours: np.ndarray, theirs: np.ndarray, weight: np.ndarray, groups: np.ndarray, lower_is_better: bool
) -> Verdict:
    """Whether a figure that is a mean is better or worse, see [`paired`].

    Args:
        ours, theirs (`np.ndarray` of shape `(seeds, N)`):
            What the figure of each run is the mean of.
        weight (`np.ndarray` of shape `(N,)`):
            Weights in the mean.
        groups (`np.ndarray` of shape `(N,)` or `(N, 2)`):
            What they share, see [`~disco_trl.evaluation.clusters.clustered_covariance`].
        lower_is_better (`bool`):
            Whether a lower figure is a better one.

    Returns:
        [`~disco_trl.evaluation.report.Verdict`]: The verdict.
    """
    mean, low, high = paired_difference(ours, theirs, weight, groups)
    word = "undecided"
    if low > 0 or high < 0:
        word = "better" if (mean < 0) == lower_is_better else "worse"
    return Verdict(word, mean, low, high, len(ours))


def compare(results: list[Result], held_out: HeldOut) -> dict[str, dict[str, Verdict]]:
    """Compares each variant with Bradley–Terry over the seeds that both have.

    Args:
        results (`list[Result]`):
            Finished runs.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            Data of the runs.

    Returns:
        `dict[str, dict[str, Verdict]]`: Verdicts by variant and figure. Empty if nobody compared two answers.
    """
    if not held_out.weight.any():
        return {}
    # Paired by seed: the same seed draws the same order of the data, which is part of what both have in common.
    reference = {result.seed: result for result in results if result.variant.base == BRADLEY_TERRY}
    found = {}
    for variant in dict.fromkeys(result.variant.name for result in results if result.variant.base != BRADLEY_TERRY):
        ours = [result for result in results if result.variant.name == variant and result.seed in reference]
        if ours:
            theirs = [reference[result.seed] for result in ours]
            found[variant] = {name: paired(ours, theirs, held_out, name) for name in COMPARED}
    return found


def compare_attributes(results: list[Result], held_out: HeldOut) -> dict[str, dict[str, dict[str, Verdict]]]:
    """Compares the variants that know an attribute, over the seeds that they share.

    Bradley–Terry has none, so that the reference is the first variant that knows the attribute.

    Args:
        results (`list[Result]`):
            Finished runs.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            Data of the runs.

    Returns:
        `dict[str, dict[str, dict[str, Verdict]]]`: Verdicts by variant and figure, which are [`COMPARED`] and
        `rating_nll` as far as the data have them. By attribute and reference, such as `"tone, less normal"`.
    """
    found = {}
    for attribute in held_out.attributes:
        data = held_out.about(attribute)
        runs: dict[str, dict[int, Result]] = {}
        for result in results:
            if attribute in result.attributes:
                runs.setdefault(result.variant.name, {})[result.seed] = result
        reference, *others = runs or [""]
        verdicts = {}
        for variant in others:
            seeds = [seed for seed in runs[variant] if seed in runs[reference]]
            if seeds and (
                figures := _paired_in(data, *([of[seed] for seed in seeds] for of in (runs[variant], runs[reference])))
            ):
                verdicts[variant] = figures
        if verdicts:
            found[f"{attribute}, less {reference}"] = verdicts
    return found


def _paired_in(held_out: HeldOut, ours: list[Result], theirs: list[Result]) -> dict[str, Verdict]:
    """The figures of one attribute in which two models can be compared."""
    figures = {}
    if held_out.weight.any():
        first, second = ([run.about(held_out.attribute) for run in runs] for runs in (ours, theirs))
        figures = {name: paired(first, second, held_out, name) for name in COMPARED}
    scored = [[run.attributes[held_out.attribute] for run in runs] for runs in (ours, theirs)]
    if held_out.ratings() and all(why_unread(one, held_out) is None for runs in scored for one in runs):
        of_runs = [[rating_losses(one, held_out) for one in runs] for runs in scored]
        positions, _, people = of_runs[0][0]
        losses = [np.stack([of_answers for _, of_answers, _ in runs]) for runs in of_runs]
        groups = held_out.groups_of_sequences[positions]
        figures["rating_nll"] = verdict_on(losses[0], losses[1], people, groups, lower_is_better=True)
    return figures


def mean_over_seeds(results: list[Result]) -> dict[str, Any]:
    """Merges the runs of a variant into one set of figures.

    If there are several runs, each figure is their mean, and the range over seeds takes the place of the interval.
    Curves and subsets are those of the first seed.

    Args:
        results (`list[Result]`):
            Runs of one variant.

    Returns:
        `dict`: Figures in the form of `metrics.json`.
    """
    merged = json.loads(json.dumps(results[0].figures))  # a deep copy
    if len(results) == 1:
        return merged
    groups = [("metrics",), ("benchmark",), ("agreement",), ("correlations",)]
    for path in [*groups, *(("attributes", name) for name in merged["attributes"])]:
        group = reduce(dict.__getitem__, path, merged)
        for name in group:
            values = values_of(results, *path, name)
            if values:
                group[name] = {"value": float(np.mean(values)), "low": min(values), "high": max(values)}
    return merged


def values_of(results: list[Result], *path: str) -> list[float]:
    """Values of a figure in the runs that have it, given the keys that lead to it in their `metrics.json`."""
    found = [reduce(lambda group, key: group.get(key, {}), path, result.figures).get("value") for result in results]
    return [value for value in found if value is not None]


def verdict_table(verdicts: dict[str, dict[str, Verdict]], heading: str = "less Bradley–Terry") -> str:
    """Markdown table of verdicts: one row for each variant.

    Args:
        verdicts (`dict[str, dict[str, Verdict]]`):
            Verdicts by variant and figure, as returned by [`compare`].
        heading (`str`, *optional*, defaults to `"less Bradley–Terry"`):
            What the differences are.

    Returns:
        `str`: The table.
    """
    names = dict.fromkeys(name for figures in verdicts.values() for name in figures)
    lines = [f"| {as_cell(heading)} | seeds | " + " | ".join(EXPLAINED[name][0] for name in names) + " |"]
    lines.append("| --- |" + " ---: |" * (1 + len(names)))
    for variant, figures in verdicts.items():
        seeds = next(iter(figures.values())).seeds
        cells = [str(figures.get(name, "–")) for name in names]
        lines.append(f"| {variant} | {seeds} | " + " | ".join(cells) + " |")
    if note := note_on_seeds(verdicts):
        lines += ["", note]
    return "\n".join(lines)


def as_table(results: list[Result]) -> str:
    """Markdown table of figures: one row for each variant, with the mean and the range over seeds.

    Args:
        results (`list[Result]`):
            Finished runs.

    Returns:
        `str`: The table.
    """
    agreements = dict.fromkeys(name for result in results for name in result.figures["agreement"])
    paths = [*(("metrics", name) for name in METRICS), *(("agreement", name) for name in agreements)]
    return _table(results, "", paths, {"minutes": "minutes", "peak GiB": "peak_gib"})


def attribute_tables(results: list[Result]) -> list[str]:
    """Markdown tables of the figures of each attribute, and of how the attributes correlate, like [`as_table`].

    Args:
        results (`list[Result]`):
            Finished runs.

    Returns:
        `list[str]`: The tables. A variant that does not know an attribute has a dash in each cell.
    """
    tables = []
    for attribute in dict.fromkeys(name for result in results for name in result.figures["attributes"]):
        of_attribute = [result.figures["attributes"].get(attribute, {}) for result in results]
        names = dict.fromkeys(name for figures in of_attribute for name in figures)
        tables.append(_table(results, attribute, [("attributes", attribute, name) for name in names]))
    if pairs := dict.fromkeys(name for result in results for name in result.figures["correlations"]):
        tables.append(_table(results, "correlation", [("correlations", name) for name in pairs]))
    return tables


def _table(
    results: list[Result], heading: str, paths: Sequence[tuple[str, ...]], costs: dict[str, str] | None = None
) -> str:
    """A row for each variant, and a column for each figure that a path leads to in `metrics.json`, and for costs."""
    costs = costs or {}
    names = [path[-1] for path in paths]
    heads = [*(EXPLAINED[name][0] if name in EXPLAINED else as_cell(name) for name in names), *costs]
    lines = ["| " + " | ".join([f"{as_cell(heading)} | seeds".lstrip(), *heads]) + " |"]
    lines.append("| --- |" + " ---: |" * (len(heads) + 1))
    for variant in dict.fromkeys(result.variant.name for result in results):
        runs = [result for result in results if result.variant.name == variant]
        cells = [mean_and_range(values_of(runs, *path), "{:.3f}") for path in paths]
        cells += [mean_and_range([run.figures[name] for run in runs], "{:.1f}") for name in costs.values()]
        lines.append(f"| {variant} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_and_range(values: list[float], form: str) -> str:
    """The mean of a figure over seeds, with its range where there are several."""
    if not values:
        return "–"
    spread = f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else ""
    return form.format(np.mean(values)) + spread
