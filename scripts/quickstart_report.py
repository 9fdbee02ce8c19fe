"""Report of the quickstart: one page of Markdown and one chart, made from its results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.human_ratings import RatedText
from disco_trl import RewardDistribution


# Colors of Okabe and Ito, which color-blind readers can distinguish. The marks differ in shape as well.
DISCO_STYLE: dict[str, Any] = {"color": "#0072B2", "marker": "o"}
BRADLEY_TERRY_STYLE: dict[str, Any] = {"color": "#D55E00", "marker": "s"}


@dataclass
class Report:
    """Everything that the page and the chart show."""

    model: str
    dataset: str
    family: str
    train_pairs: int
    test_pairs: int
    seed: int
    results: dict[str, dict[str, Any]]  # metrics of "Bradley–Terry", "disco" and, for rated texts, "people"
    rewards: RewardDistribution  # disco's rewards of the held-out sequences
    rated: list[RatedText]  # their texts and ratings; empty if nobody rated them
    checkpoint: Path
    proofs: list[str]
    seconds: dict[str, float]
    peak_bytes: int
    setup: str


def render(report: Report, picture: str) -> str:
    """The page in Markdown. `picture` is the link to the chart."""
    sections = [
        f"# A reward with its distribution: {report.model}",
        f"{report.train_pairs:,} pairs to learn from ({report.dataset}), one epoch of LoRA with seed {report.seed}: "
        f"Bradley–Terry by `trl.RewardTrainer` and disco ({report.family}) by `disco_trl.DiscoRewardTrainer`, on the "
        f"same pairs in the same order. Measured on {report.test_pairs:,} held-out pairs.",
        _metrics_table(report),
    ]
    if report.rated:
        sections += [_reading(report), "## Three held-out texts", _three_texts(report)]
    sections += [
        f"![Reward against people's ratings, and reliability]({picture})",
        "## The checkpoint is an ordinary reward model",
        f"`AutoModelForSequenceClassification.from_pretrained({str(report.checkpoint)!r}, num_labels=1)`, in a "
        "process that never imports disco_trl, gives logits equal to the location:",
        "\n".join(f"- {proof}" for proof in report.proofs),
        "`disco_trl.DiscoRewardModel.from_pretrained(...)` loads it with its scale.",
        "## Time and memory",
        "\n".join(f"- {name}: {_duration(seconds)}" for name, seconds in report.seconds.items()),
        f"Together {_duration(sum(report.seconds.values()))}, at most {report.peak_bytes / 2**30:.1f} GiB of memory "
        f"({report.setup}).",
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
    result = report.results["disco"]
    learned, trivial = result["scale_vs_deviation"], result["centrality_vs_deviation"]
    if learned != learned:
        return "The scale is the same for every text."
    # A baseline with a negative correlation is as good once its sign is reversed. Rank correlations of unrelated
    # columns have a standard deviation of 1/√N, so that a lead of less than two of those is within noise.
    comparison = "more" if learned > abs(trivial) + 2 / np.sqrt(len(report.rated)) else "no more"
    return (
        f"The learned scale says {comparison} about people's disagreement than the trivial baseline does "
        f"({learned:.2f} against {trivial:.2f}, of either sign). One vote a pair says little about it; more say more."
    )


def _three_texts(report: Report) -> str:
    """The best rated, the worst rated and the most disputed text, chosen by people's ratings and not by the model."""
    means = np.array([row.ratings.mean() for row in report.rated])
    deviations = np.array([row.ratings.std() for row in report.rated])
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
    """Draws the chart: rewards against ratings, where there are any, and the reliability of both models."""
    import matplotlib

    matplotlib.use("Agg")  # draws without a screen
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            1, 1 + bool(report.rated), figsize=(6 + 7 * bool(report.rated), 5.6), squeeze=False
        )
        if report.rated:
            _plot_rewards(report, axes[0, 0])
        _plot_reliability(report, axes[0, -1])
        figure.tight_layout(w_pad=3)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _plot_rewards(report: Report, axes: Any) -> None:
    means = np.array([row.ratings.mean() for row in report.rated])
    deviations = np.array([row.ratings.std() for row in report.rated])
    location, scale = report.rewards.location.numpy(), report.rewards.scale.numpy()
    axes.scatter(means, location, s=8, color=DISCO_STYLE["color"], alpha=0.25, linewidths=0)
    # Error bars for 40 texts, evenly spread over the ratings: all of them would hide each other.
    shown = np.argsort(means)[np.linspace(0, len(means) - 1, min(40, len(means))).astype(int)]
    axes.errorbar(means[shown], location[shown], xerr=deviations[shown], fmt="none", ecolor="0.82", elinewidth=1)
    axes.errorbar(
        means[shown],
        location[shown],
        yerr=scale[shown],
        linestyle="none",
        markersize=4.5,
        elinewidth=1.4,
        capsize=2,
        **DISCO_STYLE,
    )
    axes.set_xlabel("people's mean rating (grey: ± their standard deviation)")
    axes.set_ylabel("reward, location ± scale (one unit ≈ one logit)")
    result = report.results["disco"]
    learned = result["scale_vs_deviation"]
    axes.set_title(
        f"Location and people's mean: rank correlation {result['location_vs_mean']:.2f}\n"
        + (f"Scale and their disagreement: {learned:.2f}" if learned == learned else "The scale is fixed"),
        loc="left",
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
    axes.legend(loc="lower right", frameon=False, bbox_to_anchor=(1, 0.02))
    errors = {name: report.results[name]["expected_calibration_error"] for name in ("Bradley–Terry", "disco")}
    better, other = sorted(errors, key=lambda name: errors[name])
    # A difference smaller than what perfect forecasts show by chance is within noise.
    chance = report.results[better]["expected_calibration_error_by_chance"]
    is_clear = errors[other] - errors[better] > chance
    finding = (
        f"{better} is better calibrated than {other} here" if is_clear else "Both are about equally calibrated here"
    )
    axes.set_title(f"{finding}\n({report.test_pairs:,} held-out pairs)", loc="left")
