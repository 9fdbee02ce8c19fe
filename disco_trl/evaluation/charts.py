"""Charts of a report. Each function draws on matplotlib axes; [`as_svg`] and [`save_png`] write a drawing to a file.

In SVG, colors are CSS variables, so that a page shows the same chart in light and in dark mode.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..distributions.reward_distribution import RewardDistribution


try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install 'disco-trl[plots]'") from error


# Colors on paper, and the CSS variables that replace them in a page
INK, FAINT = "#1d2430", "#7d8696"
SERIES = ("#2463b4", "#c4571b", "#2e8049", "#8746a6", "#a8385d", "#5f6b1f")
CSS_NAMES = {INK: "--ink", FAINT: "--faint", **{color: f"--series-{i}" for i, color in enumerate(SERIES, start=1)}}
MARKERS = ("o", "s", "^", "D", "v", "P")
SIZE = (4.6, 3.6)
STYLE = {
    "svg.fonttype": "none",  # Text stays text: screen readers, search and themes work on it.
    "svg.hashsalt": "disco-trl",  # Element ids are derived from it. Without one, they are random and files differ.
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextlib.contextmanager
def _figure(draw: Callable[[Axes], None], size: tuple[float, float]) -> Iterator[Figure]:
    # `Figure` without pyplot: no global state, no backend, and figures are freed without being closed.
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        yield figure


def as_svg(draw: Callable[[Axes], None], description: str, size: tuple[float, float] = SIZE) -> str:
    """Renders a drawing as an `<svg>` element, for a page that defines the variables in [`CSS_NAMES`].

    Args:
        draw (`Callable[[Axes], None]`):
            Function that draws on matplotlib axes.
        description (`str`):
            Text alternative. Each chart of a page needs a different one.
        size (`tuple[float, float]`, *optional*, defaults to `(4.6, 3.6)`):
            Width and height in inches.

    Returns:
        `str`: The element.
    """
    buffer = io.StringIO()
    with _figure(draw, size) as figure:
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration, which is not allowed inside HTML
    for color, name in CSS_NAMES.items():
        svg = re.sub(color, f"var({name})", svg, flags=re.IGNORECASE)
    width, height = (round(72 * side) for side in size)
    start = f'<svg role="img" aria-label="{description}" viewBox="0 0 {width} {height}" class="chart"'
    svg = re.sub(r"<svg\b[^>]*?(?=\sxmlns=)", start, svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids are unique within a file, but several charts share one page: each gets a prefix of its own.
    prefix = "c" + hashlib.sha256(description.encode()).hexdigest()[:8]
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)


def save_png(draw: Callable[[Axes], None], path: Path, size: tuple[float, float] = SIZE) -> None:
    """Saves a drawing as a PNG file with a white background.

    Args:
        draw (`Callable[[Axes], None]`):
            Function that draws on matplotlib axes.
        path (`Path`):
            File to write.
        size (`tuple[float, float]`, *optional*, defaults to `(4.6, 3.6)`):
            Width and height in inches.
    """
    with _figure(draw, size) as figure:
        figure.savefig(path, dpi=160, facecolor="white")


def _literal(text: str) -> str:
    """Text of the user, in which matplotlib would take what is between dollars for mathematics."""
    return text.replace("$", r"\$")


def reliability(axes: Axes, curves: dict[str, dict[str, Sequence[float]]]) -> None:
    """Observed against predicted frequency of each model. A perfectly calibrated model lies on the diagonal.

    Args:
        axes (`matplotlib.axes.Axes`):
            Axes to draw on.
        curves (`dict[str, dict[str, Sequence[float]]]`):
            `predicted` and `observed`, by model.
    """
    axes.plot([0, 1], [0, 1], color=FAINT, linestyle=":", linewidth=1)
    for (name, curve), color, marker in zip(curves.items(), SERIES, MARKERS, strict=False):
        axes.plot(
            curve["predicted"], curve["observed"], color=color, marker=marker, markersize=4, label=_literal(name)
        )
    axes.set(xlabel="predicted probability", ylabel="share of people", xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="upper left")


def risk_coverage(axes: Axes, curves: dict[str, dict[str, Sequence[float]]]) -> None:
    """Error rate on the comparisons that each model is most confident of, against their share.

    Args:
        axes (`matplotlib.axes.Axes`):
            Axes to draw on.
        curves (`dict[str, dict[str, Sequence[float]]]`):
            `coverage` and `risk`, by model.
    """
    for (name, curve), color, line in zip(curves.items(), SERIES, ("-", "--", "-.", ":", "-", "--"), strict=False):
        axes.plot(curve["coverage"], curve["risk"], color=color, linestyle=line, label=_literal(name))
    axes.set(xlabel="share of comparisons kept, most confident first", ylabel="error rate", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")


def spread_by_scale(axes: Axes, curves: dict[str, dict[str, Sequence[float]]]) -> None:
    """Spread of people's ratings in groups of answers by the predicted scale, which rises for a model that knows where
    people disagree, and in groups by the trivial baseline.

    Args:
        axes (`matplotlib.axes.Axes`):
            Axes to draw on.
        curves (`dict[str, dict[str, Sequence[float]]]`):
            `deviation`, `error` and `baseline` of each group
            ([`~disco_trl.evaluation.agreement.spread_by_scale`]), by model.
    """
    for (name, curve), color, marker in zip(curves.items(), SERIES, MARKERS, strict=False):
        groups = np.arange(1, len(curve["deviation"]) + 1)
        error = 1.96 * np.asarray(curve["error"])
        axes.errorbar(
            groups,
            curve["deviation"],
            yerr=error,
            color=color,
            marker=marker,
            markersize=4,
            linewidth=1.2,
            elinewidth=0.8,
            label=_literal(name),
        )
    # Models whose locations differ have different baselines, which are much the same: one is enough to compare with.
    first = next(iter(curves.values()))["baseline"]
    axes.plot(
        np.arange(1, len(first) + 1), first, color=FAINT, linestyle=":", linewidth=1.8, label="−|location − median|"
    )
    axes.set(xlabel="tenth of the answers, by predicted scale", ylabel="SD of people’s ratings")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right")


def learning(axes: Axes, histories: dict[str, Sequence[tuple[float, float]]]) -> None:
    """Negative log-likelihood of the training batches against the epoch.

    Args:
        axes (`matplotlib.axes.Axes`):
            Axes to draw on.
        histories (`dict[str, Sequence[tuple[float, float]]]`):
            Epoch and negative log-likelihood in nats, by model.
    """
    for (name, points), color in zip(histories.items(), SERIES, strict=False):
        if points:
            axes.plot(
                *zip(*points, strict=True), color=color, marker="o" if len(points) == 1 else "", label=_literal(name)
            )
    axes.set(xlabel="epochs", ylabel="NLL of the training batches")
    axes.legend(loc="upper right")


def densities(axes: Axes, first: RewardDistribution, second: RewardDistribution, names: tuple[str, str]) -> None:
    """Probability densities of the rewards of two answers: the spread of people's opinions, according to the model.

    Args:
        axes (`matplotlib.axes.Axes`):
            Axes to draw on.
        first ([`RewardDistribution`]):
            Reward of the first answer, of shape `(1,)`.
        second ([`RewardDistribution`]):
            Reward of the second answer, of shape `(1,)`.
        names (`tuple[str, str]`):
            Names of the answers in the legend.
    """
    ends = [float(reward.quantile(level)) for reward in (first, second) for level in (0.005, 0.995)]
    x = np.linspace(min(ends), max(ends), 400)
    import torch

    for reward, name, color, line in zip((first, second), names, SERIES, ("-", "--"), strict=False):
        # The families define a CDF and no density, so that it is differentiated on the grid.
        density = np.gradient(reward.cdf(torch.from_numpy(x)).double().numpy(), x)
        axes.plot(x, density, color=color, linestyle=line, label=_literal(name))
        axes.fill_between(x, density, color=color, alpha=0.12, linewidth=0)
    axes.set(xlabel="reward", yticks=[])
    axes.set_ylim(bottom=0)
    axes.spines["left"].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
