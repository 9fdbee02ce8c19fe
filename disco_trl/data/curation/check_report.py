"""What `disco-trl data check` shows: the figures of `disco_trl.data.curation.check.check_dataset` as text, and a
picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .survey import DataSurvey


CHOSEN_COLOR, REJECTED_COLOR, PLAIN_COLOR = "#2a6fb0", "#d98032", "#5b7f95"
# The terms of the likelihood, as `DataSurvey` counts them, and how a person calls them
TERMS = {
    "forced choices": "forced choices of one person",
    "votes": "votes",
    "strengths": "strengths of preference",
    "soft labels": "soft labels",
    "ties": "ties",
    "rankings": "rankings",
    "ratings": "ratings",
    "not compared": "not compared",
    "weights": "with a weight",
    "margins": "with a margin",
}


def render(found: dict[str, Any], name: str) -> str:
    """
    Write the figures of a dataset as text.

    Args:
        found (`dict[str, Any]`):
            Figures, as [`~disco_trl.data.curation.check.check_dataset`] returns them.
        name (`str`):
            Name of the dataset, for the title.

    Returns:
        `str`: Blocks of lines, each with a title.
    """
    blocks = [_block(name, _schema_lines(found))]
    blocks.append(_block("What was judged", _judgement_lines(found)))
    if attributes := found.get("attributes"):
        blocks.append(_block("Attributes", [_attribute_line(name, of) for name, of in attributes.items()]))
    blocks.append(_block("What can be learned", _learned_lines(found)))
    if (scale := found.get("scale")) is not None:
        blocks.append(_block("What can be learned of the scale", _scale_lines(scale)))
    blocks.append(_block("Lengths", _length_lines(found)))
    if repeats := _repetition_lines(found):
        blocks.append(_block("The same pair more than once", repeats))
    if (common := found.get("in_common")) is not None:
        lines = [f"the same {what}: {rows_of(common[what]['rows'])}" for what in ("prompt", "answer", "row")]
        blocks.append(_block(f"In common with {common['with']}", lines))
    if found["warnings"]:
        blocks.append(_block("Warnings", [f"- {warning}" for warning in found["warnings"]]))
    errors = [
        f"- {rows_of(error['rows'])}, column {error['column']!r}: {error['wrong']}; {error['fix']} "
        f"(row {', '.join(map(str, error['first']))}{', ...' if error['rows'] > len(error['first']) else ''})"
        for error in found["errors"]
    ]
    bad = sum(error["rows"] for error in found["errors"])
    blocks.append(_block(f"Errors: {rows_of(bad)}", errors) if errors else "No errors.")
    return "\n\n".join(blocks)


def _block(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)])


def rows_of(number: int) -> str:
    """A number of rows in words, such as `1 row` or `1,200 rows`."""
    return f"{number:,} row{'s' * (number != 1)}"


def _schema_lines(found: dict[str, Any]) -> list[str]:
    lines = [rows_of(found["rows"]), f"read: {', '.join(found['columns']['read'])}"]
    if found["columns"]["not_read"]:
        lines.append(f"not read: {', '.join(found['columns']['not_read'])}")
    lines += [f"in the likelihood: {names}: {what}" for names, what in found["columns"]["likelihood"].items()]
    return lines


def _judgement_lines(found: dict[str, Any]) -> list[str]:
    terms = found["terms"]
    lines = [f"{terms[term]:9,} rows  {what}" for term, what in TERMS.items() if term in terms]
    if votes := found.get("votes"):
        spread = votes["of a pair"]
        lines.append(
            f"votes of a pair: {votes['mean']:.1f} on average, {spread['min']:g} to {spread['max']:g}; "
            f"{votes['unanimous']:,} of {votes['several']:,} pairs with several are unanimous"
        )
    if strengths := found.get("strengths"):
        spread, values = strengths["of a pair"], strengths["values"]
        shares = ", ".join(f"{value} {count / strengths['given']:.0%}" for value, count in values.items())
        lines.append(f"strengths of a pair: {spread['min']:g} to {spread['max']:g} people; {shares}")
    if soft := found.get("soft_labels"):
        lines.append(
            f"soft labels: median {soft['quantiles']['50 %']:.2f}; {soft['between_0.4_and_0.6']:.0%} are undecided "
            "(0.4 to 0.6)"
        )
    if ratings := found.get("ratings"):
        lines.append(
            f"ratings: {ratings['answers']:,} rated answers, {ratings['of_an_answer']['50 %']:g} ratings each "
            f"(median); {len(ratings['values'])} different: {_shown(ratings['values'])}"
        )
        if "share_of_variance_between_answers" in ratings:
            deviations = ratings["standard_deviation_of_an_answer"]
            lines.append(
                f"people's standard deviation about one answer: median {deviations['50 %']:.2f}, 5 % to 95 % "
                f"{deviations['5 %']:.2f} to {deviations['95 %']:.2f}; "
                f"{ratings['share_of_variance_between_answers']:.0%} of the ratings' variance is between answers"
            )
    if rankings := found.get("rankings"):
        sizes = rankings["answers"]
        lines.append(
            f"rankings: of {sizes['min']:g} to {sizes['max']:g} answers, {rankings['with_ties']:,} with equal ranks"
        )
    return lines


def _shown(values: Iterable[str]) -> str:
    """The ratings that were given, or the first and the last of many."""
    first, *rest = values
    return ", ".join([first, *rest]) if len(rest) < 12 else f"{first} to {rest[-1]}"


def _attribute_line(name: str, found: dict[str, Any]) -> str:
    said = []
    if found["compared_pairs"]:
        said.append(f"{found['compared_pairs']:,} pairs compared")
    if ratings := found.get("ratings"):
        said.append(
            f"{ratings['answers']:,} answers rated, {ratings['answers_with_several']:,} of them by several people, "
            f"with {_shown(ratings['values'])}"
        )
        if ratings["why_not_read"]:
            said.append(f"not read ({ratings['why_not_read']})")
        elif "standard_deviation_of_an_answer" in ratings:
            median = ratings["standard_deviation_of_an_answer"]["50 %"]
            said.append(f"people's standard deviation about an answer: median {median:.2f}")
    return f"{name}: {'; '.join(said)}"


def _learned_lines(found: dict[str, Any]) -> list[str]:
    terms, ratings = found["terms"], found.get("ratings", {})
    ratings = {} if ratings.get("why_not_read") else ratings
    answers = ratings.get("answers_with_several", 0)
    if answers:
        why = f"yes, by {answers:,} answers with several ratings"
    else:
        why = "no; it takes several ratings of an answer, in one row"
    lines = [f"the model's own error (location_error), apart from disagreement: {why}"]
    if ratings:
        lines.append(f"rating thresholds: {len(ratings['values']) - 1}, between {len(ratings['values'])} ratings")
    strengths = found.get("strengths", {"values": {}, "levels": 0})
    if strengths["levels"] > 1:
        lines.append(f"boundaries between {strengths['levels']} strengths of preference (strength_levels)")
    if terms.get("ties") or terms.get("ranked ties") or "0" in strengths["values"]:
        lines.append("the width of the tie band (tie_width)")
    return lines


def _scale_lines(scale: dict[str, Any]) -> list[str]:
    """What `disco_trl.cli.scale_advice` has found."""
    rows = [{"what": "as it is", **scale["expected"]}, *scale["next"]]
    width = max(len(row["what"]) for row in rows)
    return [
        *scale["advice"],
        f"{'expected, with ' + format(scale['judgements'], ',') + ' further comparisons to read':{width + 2}s}"
        "  rank correlation  error of log σ",
        *(f"  {row['what']:{width}s}  {row['rank_correlation']:16.2f}  {row['scale_error']:14.2f}" for row in rows),
        f"in a simulated world ({scale['world']}); what is reached on real texts is less",
    ]


def _length_lines(found: dict[str, Any]) -> list[str]:
    def spread(values: dict[str, float], unit: str) -> str:
        middle = f"{values['50 %']:,.0f} {unit} (median; 5 % to 95 %: {values['5 %']:,.0f} to {values['95 %']:,.0f}"
        return f"{middle}; longest {values['max']:,.0f})"

    lines = [f"{name}: {spread(values, 'characters')}" for name, values in found["characters"].items()]
    if tokens := found.get("tokens"):
        above = f"{rows_of(tokens['rows_above_max_length'])} above {tokens['max_length']}"
        lines.append(f"prompt with answer: {spread(tokens['of a prompt with an answer'], 'tokens')}; {above}")
    if longer := found.get("longer_is_chosen"):
        lines.append(
            f"the longer answer is preferred in {longer['share']:.1%} ± {longer['standard_error']:.1%} of "
            f"{longer['pairs']:,} pairs"
        )
    return lines


def _repetition_lines(found: dict[str, Any]) -> list[str]:
    repeated = found["repeated_pairs"]
    lines = []
    if repeated["rows"]:
        lines.append(
            f"{repeated['pairs']:,} pairs stand in more than one row; {repeated['judged_both_ways']:,} of them are "
            "judged both ways"
        )
    if "agreement" in repeated:
        best = repeated["best_accuracy_on_single_judgements"]
        lines.append(
            f"two judgements of one pair agree in {repeated['agreement']:.1%} (of "
            f"{repeated['judged_several_times']:,} pairs that have several), so no model can be right about more than "
            f"{best:.1%} of such judgements"
        )
    return lines


# The picture


def draw(survey: DataSurvey, path: Path) -> None:
    """
    Draw what the dataset is like into a `.png` file: a panel for each thing that it has.

    Raises:
        ImportError: matplotlib is not there.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'disco-trl[plots]'") from error

    matplotlib.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    panels: list[Callable[[DataSurvey, Any], None]] = [_draw_lengths]
    if len(survey.preference_lengths()[0]):
        panels.append(_draw_length_bias)
    if survey.votes[0]:
        panels.append(_draw_votes)
    if survey.probabilities:
        panels.append(_draw_soft_labels)
    if survey.ratings.counts:
        panels.append(_draw_ratings)
        if (np.asarray(survey.ratings.counts) > 1).any():
            panels.append(_draw_disagreement)
    columns = min(len(panels), 3 if len(panels) != 4 else 2)
    rows = -(-len(panels) // columns)
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, grid = plt.subplots(rows, columns, figsize=(5.6 * columns, 4.4 * rows), squeeze=False)
        for panel, axes in zip(panels, grid.flat, strict=False):
            panel(survey, axes)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        figure.tight_layout(w_pad=2.5, h_pad=2.5)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _draw_lengths(survey: DataSurvey, axes: Any) -> None:
    styles = {"chosen": CHOSEN_COLOR, "rejected": REJECTED_COLOR, "ranked answers": PLAIN_COLOR, "prompt": "0.6"}
    lengths = {name: np.maximum(np.asarray(values), 1) for name, values in survey.lengths.items() if values}
    # The lengths of prompts that are not there, or are a part of the text, are no news.
    lengths = {name: values for name, values in lengths.items() if values.max() > 1} or {
        "tokens": np.asarray(survey.side_tokens)
    }
    if not any(map(len, lengths.values())):
        axes.set_axis_off()
        return
    everything = np.concatenate(list(lengths.values()))
    bins = np.unique(np.geomspace(max(1, everything.min()), everything.max() + 1, 40).round())
    for name, values in lengths.items():
        axes.hist(values, bins=bins, histtype="step", linewidth=1.8, color=styles.get(name, PLAIN_COLOR), label=name)
    axes.set_xscale("log")
    axes.set_xlabel("tokens" if "tokens" in lengths else "characters")
    axes.set_ylabel("texts")
    axes.set_title("How long prompts and answers are", loc="left")
    axes.legend(frameon=False)


def _draw_length_bias(survey: DataSurvey, axes: Any) -> None:
    preferred, other = (np.maximum(values, 1).astype(float) for values in survey.preference_lengths())
    ratio = np.log2(preferred / other)
    limit = max(1.0, float(np.quantile(np.abs(ratio), 0.99)))
    bins = np.linspace(-limit, limit, 41)  # zero is an edge
    counts, _ = np.histogram(np.clip(ratio, -limit, limit), bins)
    middles = (bins[:-1] + bins[1:]) / 2
    axes.bar(middles, counts, bins[1] - bins[0], color=np.where(middles > 0, CHOSEN_COLOR, REJECTED_COLOR), alpha=0.85)
    axes.axvline(0, color="0.3", linewidth=1)
    ticks = np.arange(-int(limit), int(limit) + 1)
    ticks = ticks[:: max(1, len(ticks) // 8 + (len(ticks) > 9))] if len(ticks) > 9 else ticks
    axes.set_xticks(ticks, [f"{2.0**tick:g}" if tick >= 0 else f"1/{2**-tick}" for tick in ticks.tolist()])
    axes.set_xlabel("length of the preferred answer / length of the other")
    axes.set_ylabel("pairs")
    longer, shorter = np.mean(ratio > 0), np.mean(ratio < 0)
    axes.set_title(f"Longer is preferred in {longer:.1%}, shorter in {shorter:.1%}", loc="left")


def _draw_votes(survey: DataSurvey, axes: Any) -> None:
    won, lost = map(np.asarray, survey.votes)
    number = won + lost
    several = number > 1
    if not several.any():
        axes.bar(["1"], [len(number)], color=PLAIN_COLOR)
        axes.set_xlabel("votes of a pair")
        axes.set_ylabel("pairs")
        axes.set_title("One vote per pair: no disagreement is seen", loc="left")
        return
    share = np.maximum(won, lost)[several] / number[several]
    axes.hist(share, bins=np.linspace(0.5, 1.0, 21), color=CHOSEN_COLOR, alpha=0.85)
    axes.set_xlabel("share of a pair's votes for the side with more")
    axes.set_ylabel("pairs")
    axes.set_title(f"{np.mean(share == 1):.0%} of {several.sum():,} pairs are unanimous", loc="left")


def _draw_soft_labels(survey: DataSurvey, axes: Any) -> None:
    axes.hist(np.asarray(survey.probabilities), bins=np.linspace(0, 1, 41), color=CHOSEN_COLOR, alpha=0.85)
    axes.set_xlim(0, 1)
    axes.set_xlabel("soft label, P(chosen beats rejected)")
    axes.set_ylabel("pairs")
    axes.set_title("How sure the judge was", loc="left")


def _draw_ratings(survey: DataSurvey, axes: Any) -> None:
    values = sorted(survey.ratings.values)
    counts = [survey.ratings.values[value] for value in values]
    width = 0.85 * min(np.diff(values), default=1.0)
    axes.bar(values, counts, width, color=PLAIN_COLOR)
    if len(values) <= 12:
        axes.set_xticks(values)
    axes.set_xlabel("rating")
    axes.set_ylabel("times given")
    axes.set_title(f"{sum(counts):,} ratings of {len(survey.ratings.counts):,} answers", loc="left")


def _draw_disagreement(survey: DataSurvey, axes: Any) -> None:
    from matplotlib.colors import LogNorm

    several = np.asarray(survey.ratings.counts) > 1
    means, deviations = (np.asarray(values)[several] for values in (survey.ratings.means, survey.ratings.deviations))
    if len(means) > 2000:
        # From below 1, so that a single answer is not white
        shades = LogNorm(vmin=0.2)
        axes.hexbin(means, deviations, gridsize=38, cmap="Blues", norm=shades, mincnt=1, linewidths=0.1)
    else:
        axes.scatter(means, deviations, s=10, color=CHOSEN_COLOR, alpha=0.35, linewidths=0)
    axes.set_xlabel("mean rating of an answer")
    axes.set_ylabel("standard deviation of its ratings")
    axes.set_ylim(bottom=0)
    axes.set_title("How much people disagree about an answer", loc="left")
