"""What models take for disagreement among people, against what people's ratings show; a picture of it.

Of runs of `compare_families.py` on rated texts, each with the name that it is to have in the picture:

    python scripts/plot_disagreement.py "10 ratings a text=runs/compare-ratings/normal-0.npz" --output docs/sigma.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from human_ratings import SOURCES, load_ratings, split_by_text
from quickstart import rating_moments

from disco_trl.evaluation import centrality, spearman


def plot(scales: dict[str, np.ndarray], deviations: np.ndarray, path: Path) -> None:
    """
    Beside each other for each of the `scales` `[texts]`: a point for each text, its predicted scale (as a rank, in
    per cent) against the standard deviation `[texts]` of its raters; the mean of each tenth in front.
    """
    figure, axes = plt.subplots(
        1, len(scales), figsize=(3.1 * len(scales), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (name, scale) in zip(axes[0], scales.items(), strict=True):
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
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FILE.npz")
    parser.add_argument("--source", choices=SOURCES, default="tweets", help="what the runs were measured on")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    _, test = split_by_text(load_ratings(args.source))
    _, deviations = rating_moments(test)
    arrays = {name: np.load(path) for name, path in (run.rsplit("=", 1) for run in args.runs)}
    plot({name: run["scale"] for name, run in arrays.items()}, deviations, args.output)
    for name, run in arrays.items():
        trivial = spearman(centrality(run["location"]), deviations)
        print(f"{name}: {spearman(run['scale'], deviations):.3f} (−|μ − median|: {trivial:.3f})")


if __name__ == "__main__":
    main()
