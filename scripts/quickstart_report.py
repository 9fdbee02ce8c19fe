"""Report of the quickstart: one page of Markdown and one chart, made from its results."""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.human_ratings import RatedText
from disco_trl import RewardDistribution


# Colors of Okabe and Ito, which color-blind readers can distinguish. The marks differ in shape as well.
DISCO_STYLE: dict[str, Any] = {"color": "#0072B2", "marker": "o"}
BRADLEY_TERRY_STYLE: dict[str, Any] = {"color": "#D55E00", "marker": "s"}
CONTESTED, AGREED = "#AA4499", "#117755"
RATINGS = np.arange(-4, 5)


@dataclass
class Report:
    """Everything that the page and the chart show."""

    model: str
    asked: str
    family: str
    test_pairs: int
    seed: int
    results: dict[str, dict[str, Any]]  # metrics of "Bradley–Terry", "disco" and, for rated texts, "people"
    rewards: RewardDistribution  # disco's rewards of the held-out sequences
    rated: list[RatedText]  # their texts and ratings; empty if nobody rated them
    checkpoint: Path
    proofs: list[str]
    seconds: dict[str, float]
    training_seconds: dict[str, float]  # of each model, in part at the same time
    peak_bytes: dict[str, int]  # of the processes that trained them
    setup: str

    @property
    def scale_vs_deviation(self) -> float:
        """Rank correlation of the scale with the raters' standard deviation; nan if the scale is constant."""
        return self.results["disco"]["scale_vs_deviation"]

    @property
    def varies(self) -> bool:
        """Whether the scale differs from text to text."""
        return self.scale_vs_deviation == self.scale_vs_deviation

    @property
    def chance(self) -> float:
        """What a rank correlation of the held-out texts has to exceed to be no chance. That of unrelated columns has a
        standard deviation of 1/√N.
        """
        return 2 / np.sqrt(len(self.rated))

    @property
    def means(self) -> np.ndarray:
        """People's mean rating of each text, of shape `(texts,)`."""
        return np.array([row.ratings.mean() for row in self.rated])

    @property
    def deviations(self) -> np.ndarray:
        """Standard deviation of people's ratings of each text, of shape `(texts,)`."""
        return np.array([row.ratings.std() for row in self.rated])


def render(report: Report, picture: str) -> str:
    """The page in Markdown. `picture` is the link to the chart."""

    def trained(name: str) -> str:
        memory = report.peak_bytes[name] / 2**30
        return f"{name} {_duration(report.training_seconds[name])} and {memory:.1f} GiB of memory"

    sections = [
        f"# A reward with its distribution: {report.model}",
        f"To learn from: {report.asked}. One epoch of LoRA with seed {report.seed}: Bradley–Terry by "
        f"`trl.RewardTrainer` and disco ({report.family}) by `disco_trl.DiscoRewardTrainer`, on the same pairs."
        + (
            " TRL's trainer reads who won; a tie, whose sides are in random order, counts half for either on average."
            if report.rated
            else ""
        )
        + f" Measured on {report.test_pairs:,} held-out pairs.",
        _metrics_table(report),
    ]
    if report.rated:
        sections += [_reading(report), "## Three held-out texts", _three_texts(report)]
    sections += [
        f"![{'The scale and people, and the reliability' if report.rated else 'Reliability'}]({picture})",
        "## The checkpoint is an ordinary reward model",
        f"`AutoModelForSequenceClassification.from_pretrained({str(report.checkpoint)!r}, num_labels=1)`, in a "
        "process that never imports disco_trl, gives logits equal to the location:",
        "\n".join(f"- {proof}" for proof in report.proofs),
        "`disco_trl.DiscoRewardModel.from_pretrained(...)` loads it with its scale.",
        "## Time and memory",
        "\n".join(f"- {name}: {_duration(seconds)}" for name, seconds in report.seconds.items()),
        f"Together {_duration(sum(report.seconds.values()))} ({report.setup}). The trainings, which run at the same "
        f"time where there is no accelerator: {', '.join(map(trained, report.training_seconds))}.",
    ]
    return "\n\n".join(sections) + "\n"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _metrics_table(report: Report) -> str:
    labels = {"Bradley–Terry": "Bradley–Terry", "disco": f"disco, {report.family}", "people": "people themselves ¹"}
    rows = [
        ("accuracy", "accuracy", "{:.1%}"),
        ("NLL (nats)", "nll", "{:.4f}"),
        ("Brier score", "brier", "{:.4f}"),
        ("expected calibration error", "expected_calibration_error", "{:.4f}"),
    ]
    if report.rated:
        rows += [
            ("rank correlation: location, raters' mean", "location_vs_mean", "{:.3f}"),
            ("rank correlation: scale, raters' SD", "scale_vs_deviation", "{:.3f}"),
            ("... of the trivial baseline −\\|location − median\\|", "centrality_vs_deviation", "{:.3f}"),
        ]
    names = list(report.results)
    lines = [
        "| held out | " + " | ".join(labels[name] for name in names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for label, key, number in rows:
        # Bradley–Terry's scale is one constant, which ranks nothing: its correlation is nan.
        cells = [number.format(value) if (value := report.results[name][key]) == value else "none" for name in names]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    if report.rated:
        lines += [
            "",
            "¹ The noise ceiling. Forecasts: the ratings that the votes are drawn from; no model can predict the "
            "votes better. Rank correlations: half of each text's raters against the other half (split-half "
            "reliability).",
        ]
    return "\n".join(lines)


def _reading(report: Report) -> str:
    """What the table says about the scale, in words."""
    trivial = report.results["disco"]["centrality_vs_deviation"]
    if not report.varies:
        return "The scale is the same for every text."
    # A baseline with a negative correlation is as good once its sign is reversed.
    comparison = "more" if report.scale_vs_deviation > abs(trivial) + report.chance else "no more"
    return (
        f"The learned scale says {comparison} about people's disagreement than the trivial baseline does "
        f"({report.scale_vs_deviation:.2f} against {trivial:.2f}, of either sign)."
    )


def _three_texts(report: Report) -> str:
    """The best rated, the worst rated and the most disputed text, chosen by people's ratings and not by the model."""
    means, deviations = report.means, report.deviations
    lines = ["| | reward | people, −4 to 4 | text |", "| --- | ---: | ---: | --- |"]
    for label, index in (
        ("best rated", int(means.argmax())),
        ("most disputed", int(deviations.argmax())),
        ("worst rated", int(means.argmin())),
    ):
        text = report.rated[index].text.replace("|", "\\|")
        reward = f"{report.rewards.location[index]:.1f} ± {report.rewards.scale[index]:.1f}"
        people = f"{means[index].round(1) + 0.0:.1f} ± {deviations[index]:.1f}"  # + 0.0: not -0.0
        lines.append(f"| {label} | {reward} | {people} | {text} |")
    lines += ["", "One unit of reward is about one logit; people's ± is their standard deviation."]
    return "\n".join(lines)


def plot(report: Report, path: Path) -> None:
    """Draws the chart: what the scale says about people's disagreement, if they rated the texts, and the reliability
    of both models.
    """
    import matplotlib

    matplotlib.use("Agg")  # draws without a screen
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: dict[Any, Any] = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        if not report.rated:
            figure = plt.figure(figsize=(6, 5.6), layout="constrained")
            _plot_reliability(report, figure.add_subplot())
        elif not report.varies:
            figure = plt.figure(figsize=(11, 5.2), layout="constrained")
            _plot_locations(report, figure.add_subplot(1, 2, 1))
            _plot_reliability(report, figure.add_subplot(1, 2, 2))
        else:
            figure = plt.figure(figsize=(11, 9.6), layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.03))
            grid = figure.add_gridspec(3, 2, height_ratios=[4.6, 2.4, 1.1])
            _plot_scales(report, figure.add_subplot(grid[0, 0]))
            _plot_reliability(report, figure.add_subplot(grid[0, 1]))
            _plot_two_texts(report, [[figure.add_subplot(grid[row, column]) for row in (1, 2)] for column in (0, 1)])
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)


def _plot_locations(report: Report, axes: Any) -> None:
    """Locations against people's mean ratings: all that there is to show of a model with one scale for all texts."""
    axes.scatter(report.means, report.rewards.location.numpy(), s=10, color=DISCO_STYLE["color"], alpha=0.3, lw=0)
    axes.set_xlabel("people's mean rating, −4 to 4")
    axes.set_ylabel("location of the reward (one unit ≈ one logit)")
    correlation = report.results["disco"]["location_vs_mean"]
    axes.set_title(
        f"The scale is the same for every text.\nLocation and people's mean: rank correlation {correlation:.2f}",
        loc="left",
    )


def _plot_scales(report: Report, axes: Any) -> None:
    """Predicted scales against the spread of people's ratings, text by text and in tenths by the scale."""
    scale, deviations = report.rewards.scale.double().numpy(), report.deviations
    axes.scatter(
        scale, deviations, s=10, color=DISCO_STYLE["color"], alpha=0.25, linewidths=0, label="a held-out text"
    )
    tenths = np.array_split(np.argsort(scale, kind="stable"), min(10, len(scale)))
    axes.errorbar(
        [scale[tenth].mean() for tenth in tenths],
        [deviations[tenth].mean() for tenth in tenths],
        yerr=[2 * deviations[tenth].std() / np.sqrt(len(tenth)) for tenth in tenths],
        color="black",
        marker="o",
        markersize=5,
        linewidth=1.2,
        capsize=2,
        label="mean of a tenth of them (± 2 standard errors)",
    )
    # A few extreme scales would squeeze all others together.
    low, high = np.quantile(scale, [0.002, 0.998])
    axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_xlabel("predicted scale σ")
    axes.set_ylabel("standard deviation of people's ratings")
    axes.legend(loc="upper left", frameon=False, fontsize="small")
    learned, people = report.scale_vs_deviation, report.results["people"]["scale_vs_deviation"]
    finding = "σ ranks texts by how much people disagree"
    if abs(learned) <= report.chance:
        finding = "σ says nothing about people's disagreement here"
    elif learned < 0:
        finding = "σ is smaller where people disagree more"
    axes.set_title(f"{finding}:\nrank correlation {learned:.2f} (people's halves: {people:.2f})", loc="left")


def contested_and_agreed(report: Report) -> tuple[int, int]:
    """The texts with the largest and the smallest scale among texts of about the same location: the tenth of them that
    is nearest to the median location. People's ratings take no part in the choice.
    """
    location, scale = report.rewards.location.numpy(), report.rewards.scale.numpy()
    nearest = np.argsort(np.abs(location - np.median(location)), kind="stable")[: max(2, len(location) // 10)]
    return int(nearest[scale[nearest].argmax()]), int(nearest[scale[nearest].argmin()])


def _plot_two_texts(report: Report, columns: list[list[Any]]) -> None:
    """Predicted rewards of a contested and an agreed text as densities, and below each what its raters said."""
    chosen = contested_and_agreed(report)
    rewards = report.rewards[torch.tensor(chosen)].map(lambda tensor: tensor.double())
    # All but a hundredth of either, whatever the family.
    low, high = rewards.quantile(0.005).min().item(), rewards.quantile(0.995).max().item()
    x = torch.linspace(low, high, 400, dtype=torch.float64)
    densities = np.gradient(rewards.cdf(x[:, None]).numpy(), x.numpy(), axis=0).T
    labels = (("largest", CONTESTED), ("smallest", AGREED))
    heights = [(report.rated[index].ratings[:, None] == RATINGS).mean(axis=0) for index in chosen]
    for (above, below), index, density, height, (label, color) in zip(
        columns, chosen, densities, heights, labels, strict=True
    ):
        location, scale = report.rewards.location[index].item(), report.rewards.scale[index].item()
        above.fill_between(x, density, color=color, alpha=0.25, linewidth=0)
        above.plot(x, density, color=color, linewidth=1.6)
        above.set_xlim(low, high)
        above.set_ylim(0, 1.08 * densities.max())
        above.set_yticks([])
        above.spines["left"].set_visible(False)
        above.set_xlabel(f"predicted reward: {location:.1f} ± {scale:.1f}")
        text = textwrap.fill(textwrap.shorten(report.rated[index].text, 96, placeholder=" …"), 52)
        # What texts hold is no formula.
        title = f"The {label} σ among texts of about median location:\n“{text}”".replace("$", r"\$")
        above.set_title(title, loc="left", fontsize="medium")
        below.bar(RATINGS, height, width=0.85, color=color, alpha=0.75)
        below.set_ylim(0, 1.08 * max(map(np.max, heights)))
        below.set_xticks(RATINGS)
        below.set_yticks([])
        below.spines["left"].set_visible(False)
        below.set_xlabel(
            f"what {len(report.rated[index].ratings)} people said: {report.means[index]:.1f} ± "
            f"{report.deviations[index]:.1f}"
        )


def _plot_reliability(report: Report, axes: Any) -> None:
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="perfect")
    for name, style in (("Bradley–Terry", BRADLEY_TERRY_STYLE), ("disco", DISCO_STYLE)):
        result = report.results[name]
        axes.plot(
            result["reliability"].predicted,
            result["reliability"].observed,
            markersize=6,
            linewidth=1.2,
            alpha=0.85,
            label=f"{name}: calibration error {result['expected_calibration_error']:.3f}",
            **style,
        )
    axes.set_aspect("equal")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("predicted probability that one answer beats the other")
    axes.set_ylabel("how often it did")
    axes.legend(loc="upper left", frameon=False, fontsize="small")
    errors = {name: report.results[name]["expected_calibration_error"] for name in ("Bradley–Terry", "disco")}
    better, other = sorted(errors, key=lambda name: errors[name])
    # A difference smaller than what perfect forecasts show by chance is within noise.
    chance = report.results[better]["expected_calibration_error_by_chance"]
    is_clear = errors[other] - errors[better] > chance
    finding = (
        f"{better} is better calibrated than {other} here" if is_clear else "Both are about equally calibrated here"
    )
    axes.set_title(f"{finding}\n({report.test_pairs:,} held-out pairs)", loc="left")
