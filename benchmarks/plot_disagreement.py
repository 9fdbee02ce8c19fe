"""Plot predicted scales against the disagreement among people's ratings.

Run as:

    python -m benchmarks.plot_disagreement "10 ratings a text=runs/comparison/normal-0" --output docs/sigma.png

The arguments are runs of `disco-trl compare` whose held-out answers have several ratings, each with its title in the
chart.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from transformers import AutoTokenizer

from disco_trl.evaluation.compare import Result, Variant
from disco_trl.evaluation.compare_run import Run, read_data
from disco_trl.evaluation.metrics import centrality, spearman


def read(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Location and scale of a run's rated answers, and the standard deviation of their ratings, each of shape
    `(answers,)`.
    """
    run = Run(**json.loads((folder / "run.json").read_text(encoding="utf-8")))
    _, held_out = read_data(run, AutoTokenizer.from_pretrained(run.model))
    rewards = Result.load(Variant.parse(run.base), run.seed, folder).rewards
    ratings = held_out.ratings()
    positions = list(ratings)
    deviations = np.array([values.std() for values in ratings.values()])
    return rewards.location.numpy()[positions], rewards.scale.numpy()[positions], deviations


def plot(runs: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Draws one panel for each of `runs`: a point for each text, its predicted scale (as a rank in percent) against
    the standard deviation of its ratings, and the mean of each tenth.
    """
    figure, axes = plt.subplots(
        1, len(runs), figsize=(3.1 * len(runs), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (name, (scale, deviations)) in zip(axes[0], runs.items(), strict=True):
        rank = 100 * (np.argsort(np.argsort(scale)) + 0.5) / len(scale)
        axis.scatter(rank, deviations, s=5, color="#888888", alpha=0.35, linewidths=0, label="a text")
        tenth = (rank // 10).astype(int)
        means = np.array([deviations[tenth == index].mean() for index in range(10)])
        errors = np.array([deviations[tenth == index].std() / (tenth == index).sum() ** 0.5 for index in range(10)])
        axis.errorbar(
            np.arange(5, 100, 10), means, 1.96 * errors, color="#1f5fa8", marker="o", markersize=4, label="mean (95 %)"
        )
        axis.set_title(f"{name}\nrank correlation {spearman(scale, deviations):.2f}", fontsize=10)
        axis.set_xticks([0, 50, 100])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("standard deviation of people's ratings")
    axes[0, 0].legend(loc="upper left", frameon=False, fontsize=8)
    figure.supxlabel("predicted σ, rank in per cent", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Draws the runs of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot_disagreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="NAME=FOLDER", help="Title and folder of a run of `disco-trl compare`."
    )
    parser.add_argument("--output", type=Path, required=True, help="File for the chart, such as chart.png.")
    args = parser.parse_args()

    found = {name: read(Path(folder)) for name, folder in (run.rsplit("=", 1) for run in args.runs)}
    plot({name: (scale, deviations) for name, (_, scale, deviations) in found.items()}, args.output)
    for name, (location, scale, deviations) in found.items():
        trivial = spearman(centrality(location), deviations)
        print(f"{name}: {spearman(scale, deviations):.3f} (−|μ − median|: {trivial:.3f})")


if __name__ == "__main__":
    main()
