"""Report of an evaluation: one self-contained HTML file, and its charts as PNG.

The page works offline, in light and dark mode, on a phone and on paper. It neither loads nor runs anything. What
flows: the figures of each model (`disco_trl.evaluation.evaluate.as_json`) and, for the examples, one model's rewards
of the held-out data → tables and charts → `report.html` of this package, filled in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from ..data.contents import text_of
from ..distributions.reward_distribution import RewardDistribution
from . import charts
from .held_out import HeldOut


TEMPLATE = Path(__file__).with_name("report.html")
EXAMPLES = 2
LONGEST_TEXT = 600

EXPLAINED = {
    "accuracy": ("Accuracy", "share of people who agree with the model; higher is better"),
    "nll": ("NLL", "−log probability of a person's choice, in nats; lower is better, 0.693 is uninformed"),
    "brier": ("Brier score", "squared error of the probability; lower is better, 0.25 is uninformed"),
    "calibration_error": (
        "Calibration error",
        "root mean square distance of probabilities from frequencies, with chance subtracted; lower is better",
    ),
    "expected_calibration_error": ("ECE", "mean distance of probabilities from frequencies, chance included"),
    "expected_calibration_error_by_chance": ("ECE by chance", "what a perfect forecast of this sharpness would show"),
    "confidence": ("Confidence", "mean probability of the more likely answer; above the accuracy is overconfident"),
    "risk_coverage_area": (
        "Risk–coverage area",
        "mean error rate as doubtful comparisons are left out; lower is better",
    ),
    "auroc_of_errors": ("AUROC of doubt", "how well doubt separates errors from hits; 0.5 is chance"),
    "cross_entropy": ("Cross-entropy to the shares", "in nats; lower is better, and the entropy is the lowest"),
    "entropy": ("Entropy of the shares", "the cross-entropy of a model that knew all votes in advance"),
    "squared_error": ("Squared error of the shares", "mean of (probability − share)²; lower is better"),
    "probability, with people's share": ("Rank correlation with the shares", "where people disagree"),
    "divided": ("AUROC, by doubt", "doubt: how near the probability is to ½; 0.5 is chance"),
    "divided_by_scale": ("AUROC, by scale", "of the difference of the rewards"),
    "divided_by_distance": ("AUROC, by −|difference of locations|", "the trivial baseline, which needs no scale"),
    "divided_matched": (
        "AUROC at equal distance, by doubt",
        "pairs with the same |difference of locations| only, where the baseline scores 0.5",
    ),
    "divided_by_scale_matched": ("AUROC at equal distance, by scale", "the same, by the scale of the difference"),
    "grade_nll": ("NLL of strengths", "−log probability of how much better a person found an answer"),
    "rating_nll": ("NLL of ratings", "−log probability of a person’s rating, in nats; lower is better"),
    "sign_nll": ("NLL of their signs", "the same of better, equal or worse, with the model’s own ties"),
    "scale, with people's standard deviation": ("Scale", "with the standard deviation of people’s ratings"),
    "scale, with people's standard deviation, corrected": (
        "Scale, corrected",
        "estimate for the standard deviation among all people, free of the error of having asked a few",
    ),
    "−|location − median|, with people's standard deviation": (
        "−|location − median|",
        "the trivial baseline, which needs no scale, with the standard deviation of people’s ratings",
    ),
    "−|location − median|, with people's standard deviation, corrected": (
        "−|location − median|, corrected",
        "the baseline, corrected in the same way",
    ),
    "people's standard deviation, in two halves of them": (
        "Half of the raters",
        "their standard deviation, with that of the other half",
    ),
    "location, with people's mean rating": ("Location", "with the mean of people’s ratings"),
}
"""Title and explanation of each figure."""

SECTIONS = {
    "Shares of people": ("cross_entropy", "entropy", "squared_error", "probability, with people's share"),
    "Pairs that people are divided over": (
        "divided",
        "divided_by_scale",
        "divided_by_distance",
        "divided_matched",
        "divided_by_scale_matched",
    ),
    "How much better": ("grade_nll", "sign_nll"),
    "People’s ratings (likelihood)": ("rating_nll",),
    "People’s ratings (rank correlation)": (
        "location, with people's mean rating",
        "scale, with people's standard deviation",
        "−|location − median|, with people's standard deviation",
        "scale, with people's standard deviation, corrected",
        "−|location − median|, with people's standard deviation, corrected",
        "people's standard deviation, in two halves of them",
    ),
}
"""Figures of [`~disco_trl.evaluation.agreement`], by the heading that they stand under."""


@dataclass
class Model:
    """Model in a report.

    Args:
        name (`str`):
            Name of the model on the page.
        found (`dict`):
            Its figures, in the form of `metrics.json`.
        history (`list[tuple[float, float]]`, *optional*, defaults to `[]`):
            Epoch and negative log-likelihood during training.
        facts (`dict[str, str]`, *optional*, defaults to `{}`):
            Further facts to list, such as minutes, memory and settings.
    """

    name: str
    found: dict[str, Any]
    history: list[tuple[float, float]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Difference of a figure from that of the reference model.

    Attributes:
        word (`str`):
            `"better"`, `"worse"` or `"undecided"`.
        mean (`float`):
            The difference.
        low (`float`):
            Lower end of its interval.
        high (`float`):
            Upper end of its interval.
        seeds (`int`):
            Number of seeds that both models were trained with.
    """

    word: str
    mean: float
    low: float
    high: float
    seeds: int

    @property
    def difference(self) -> str:
        """The difference and its interval as text."""
        return f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f})".replace("-", "−")

    def __str__(self) -> str:
        return f"{self.word}: {self.difference}"


@dataclass
class Example:
    """Comparison to show in a report.

    Attributes:
        kind (`str`):
            Why it is shown.
        prompt (`str`):
            Text that both answers follow.
        answers (`list[str]`):
            The two answers.
        prob (`float`):
            P(first ≻ second).
        said (`str`):
            What people said, in words.
        picture (`Markup`):
            Chart of the two rewards' densities, as SVG.
    """

    kind: str
    prompt: str
    answers: list[str]
    prob: float
    said: str
    picture: Markup


def write_report(
    folder: Path,
    title: str,
    models: list[Model],
    rewards: RewardDistribution,
    held_out: HeldOut,
    verdicts: dict[str, dict[str, Verdict]] | None = None,
    setup: dict[str, str] | None = None,
    brackets: str = "95 % intervals",
    examples: int = EXAMPLES,
    attribute_verdicts: dict[str, dict[str, dict[str, Verdict]]] | None = None,
) -> Path:
    """Writes `report.html` and its charts.

    Args:
        folder (`Path`):
            Folder to write to.
        title (`str`):
            Title of the page.
        models (`list[Model]`):
            Models to show. Subsets and examples are those of the first.
        rewards ([`RewardDistribution`]):
            Rewards of the first model for `held_out.sequences`.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            The data.
        verdicts (`dict[str, dict[str, Verdict]]`, *optional*, defaults to `None`):
            Differences from the reference model, by model and figure.
        setup (`dict[str, str]`, *optional*, defaults to `None`):
            Facts of the run to list, such as data, command and versions.
        brackets (`str`, *optional*, defaults to `"95 % intervals"`):
            What the numbers in brackets mean.
        examples (`int`, *optional*, defaults to `2`):
            Number of examples of each kind, see [`pick_examples`].
        attribute_verdicts (`dict[str, dict[str, dict[str, Verdict]]]`, *optional*, defaults to `None`):
            Differences in each attribute, by model and figure. By attribute, with the name of the reference model,
            such as `"tone, less normal"`.

    Returns:
        `Path`: Path of the page.
    """
    drawings: dict[str, tuple[Callable[..., None], str]] = {}
    if models[0].found["metrics"]:
        drawings["reliability"] = (
            partial(charts.reliability, curves={model.name: model.found["reliability"] for model in models}),
            "Predicted probability against the share of people, in fifteen bins",
        )
        drawings["risk-coverage"] = (
            partial(charts.risk_coverage, curves={model.name: model.found["risk_coverage"] for model in models}),
            "Error rate against the share of comparisons kept",
        )
    if any(model.history for model in models):
        drawings["learning"] = (
            partial(charts.learning, histories={model.name: model.history for model in models}),
            "Negative log-likelihood of the training batches by epoch",
        )
    spreads = {model.name: spread for model in models if (spread := model.found["spread_by_scale"])}
    if spreads:
        drawings["spread"] = (
            partial(charts.spread_by_scale, curves=spreads),
            "Standard deviation of people's ratings in ten groups of answers, by the scale that a model predicts",
        )
    for name, (draw, _) in drawings.items():
        charts.save_png(draw, folder / f"{name}.png")
    # Texts of the data end up in the page, so that everything is escaped except the SVG made here.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        models=models,
        explained=EXPLAINED,
        sections=_sections(models),
        attributes=_attributes(models),
        about_scales=[words for model in models if (words := about_scale(model))],
        pictures={name: Markup(charts.as_svg(draw, text)) for name, (draw, text) in drawings.items()},
        examples=pick_examples(rewards, held_out, examples),
        verdicts=verdicts or {},
        attribute_verdicts=attribute_verdicts or {},
        note=note_on_seeds(verdicts or {}),
        setup=setup or {},
        brackets=brackets,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _sections(models: list[Model]) -> dict[str, list[str]]:
    """The figures of each section that some model has. Benchmark runs may have figures of their own kind."""
    present = {name for model in models for name in model.found["agreement"]}
    named = {heading: [name for name in names if name in present] for heading, names in SECTIONS.items()}
    return {heading: names for heading, names in named.items() if names}


def _attributes(models: list[Model]) -> dict[str, list[dict[str, Any]]]:
    """For each attribute that some model was evaluated in, and their correlations, the figures of each model."""
    names = dict.fromkeys(name for model in models for name in model.found["attributes"])
    tables = {f"Attribute: {name}": [model.found["attributes"].get(name, {}) for model in models] for name in names}
    if any(model.found["correlations"] for model in models):
        tables["How opinions of attributes go together (correlation)"] = [m.found["correlations"] for m in models]
    return tables


def about_scale(model: Model) -> str:
    """What a model's scales say about the spread of people's ratings, in words.

    Args:
        model ([`Model`]):
            A model.

    Returns:
        `str`: One or two sentences; empty if there are no ratings to tell.
    """
    names = ("scale", "−|location − median|")
    raw, baseline = (model.found["agreement"].get(f"{name}, with people's standard deviation") for name in names)
    if raw is None:
        return ""
    if raw["value"] is None:
        return f"{model.name}: the scale is the same for every answer, so that it does not tell where people disagree."
    corrected = model.found["agreement"]["scale, with people's standard deviation, corrected"]
    words = f"{model.name}: the rank correlation of the scale with the spread of people’s ratings is {_number(raw)}"
    if corrected["value"] is not None:
        words += f"; with the spread among all people, of whom a few were asked, it is about {_number(corrected)}"
    words += f". The trivial baseline, −|location − median|, has {_number(baseline)}."
    if raw["low"] is not None and raw["low"] <= 0 <= raw["high"]:
        words += " The interval of the scale contains 0, so that it may say nothing."
    return words


def _number(figure: dict[str, Any]) -> str:
    ends = "" if figure["low"] is None else f" ({figure['low']:.2f} to {figure['high']:.2f})"
    return f"{figure['value']:.2f}{ends}".replace("-", "−")


def as_cell(text: str) -> str:
    """Text of the user, such as the name of an attribute, in Markdown, where it is no end of a cell or of a line."""
    return " ".join(text.split()).replace("|", "\\|")


def note_on_seeds(verdicts: dict[str, dict[str, Verdict]]) -> str:
    """What the intervals of verdicts do not include.

    Args:
        verdicts (`dict[str, dict[str, Verdict]]`):
            Verdicts by variant and figure.

    Returns:
        `str`: A sentence for those of one seed, empty if there are none.
    """
    alone = [name for name, figures in verdicts.items() if next(iter(figures.values())).seeds == 1]
    if not alone:
        return ""
    of_whom = "" if len(alone) == len(verdicts) else f" of {', '.join(alone)}"
    return (
        f"With one seed, the verdicts{of_whom} are about these runs, not about the methods: their intervals do not "
        "include the randomness of training."
    )


def pick_examples(rewards: RewardDistribution, held_out: HeldOut, each: int = EXAMPLES) -> list[Example]:
    """Picks comparisons to show: those that the model is most confident of and right about, those that it is least
    confident of, and those that it is most confidently wrong about.

    Args:
        rewards ([`RewardDistribution`]):
            Rewards of `held_out.sequences`.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            The data.
        each (`int`, *optional*, defaults to `2`):
            Maximum number of examples of each kind.

    Returns:
        `list[Example]`: The examples, kind by kind.
    """
    forecasts = held_out.forecasts(rewards)
    judged = np.flatnonzero(forecasts.weight > 0)
    is_right = forecasts.right[judged] > 0.5
    is_wrong = forecasts.right[judged] < 0.5  # Not the complement: a tie is neither right nor wrong.
    by_confidence = np.argsort(-forecasts.confidence[judged], kind="stable")
    kinds = {
        "Most confident, and right": by_confidence[is_right[by_confidence]],
        "Least confident": by_confidence[::-1],
        "Most confident, and wrong": by_confidence[is_wrong[by_confidence]],
    }
    examples = []
    for kind, order in kinds.items():
        for place, index in enumerate(_of_different_items(judged[order], held_out, each)):
            sides = [held_out.first[index], held_out.second[index]]
            prob = float(forecasts.prob[index])
            pair = [rewards[[side]] for side in sides]
            draw = partial(charts.densities, first=pair[0], second=pair[1], names=("first answer", "second answer"))
            picture = charts.as_svg(draw, f"Rewards of both answers, {kind} {place + 1}", size=(4.6, 2.2))
            prompt, texts = _split([_content_of(held_out, index, side) for side in sides])
            said = _in_words(float(forecasts.target[index]), float(forecasts.weight[index]))
            examples.append(Example(kind, prompt, texts, prob, said, Markup(picture)))
    return examples


def _in_words(share: float, people: float) -> str:
    if share in (0.0, 0.5, 1.0) and people == 1:
        return {0.0: "the second was preferred", 0.5: "neither was preferred", 1.0: "the first was preferred"}[share]
    return f"{share:.0%} of the people asked preferred the first"


def _of_different_items(order: np.ndarray, held_out: HeldOut, most: int) -> list[int]:
    # No answer is shown twice: in a ranking, the same answer would fill most of the examples.
    seen: set[int] = set()
    chosen: list[int] = []
    for index in order:
        if len(chosen) >= most:
            break
        texts = {int(held_out.first[index]), int(held_out.second[index])}
        if not texts & seen:
            chosen.append(int(index))
            seen |= texts
    return chosen


def _content_of(held_out: HeldOut, comparison: int, sequence: int) -> Any:
    """A text, or messages."""
    number = held_out.item[comparison]
    item, place = held_out.items[number], int(np.flatnonzero(held_out.answers[number] == sequence)[0])
    return f"{len(item.answers[place])} tokens" if item.kind == "tokenized" else item.contents[place]


def _split(contents: list[Any]) -> tuple[str, list[str]]:
    """The text that two answers follow, and each answer, both as text of bounded length."""
    prompt = ""
    if all(isinstance(content, list) for content in contents):
        turns = [[f"{turn.get('role')}: {text_of(turn.get('content'))}" for turn in content] for content in contents]
        prompt = "\n".join(turns[0][:-1])
        contents = [text_of(content[-1].get("content")) for content in contents]
    return _shortened(prompt), [_shortened(content) for content in contents]


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT].rstrip()} …"
