"""Studies on people's ratings of texts: what the distribution is good for, and where its limits are.

Run as:

    python -m benchmarks.studies supervision movies efficiency noise context best-of-n --output runs/studies

- `supervision`: 30,000 single votes, ten votes on each of 9,600 pairs, or ten ratings of each text of as many pairs.
- `movies`: 9,600 single votes on sentences of film reviews instead of tweets.
- `efficiency`: 250 to 30,000 single votes.
- `noise`: up to 40 % of 1,000 training votes reversed, with the share of wrong votes learned or not.
- `context`: half of each text's ratings reversed, as if by people who want the opposite.
- `best-of-n`: the best of N held-out texts by each rule, with models trained on few votes, judged by the ratings.

Each study runs `disco-trl compare`. Held-out texts and votes are the same in all. Bradley–Terry is trained by our
trainer, in the same batches. Finished runs are not repeated. The studies end with tables, and a chart for each.
`--most-votes 4000` leaves out the larger budgets. `--dtype bfloat16` is for processors that are faster in it, which
not all with bfloat16 support are.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from transformers import AutoTokenizer

from disco_trl.cli.main import main as disco_trl
from disco_trl.data.files import open_rows
from disco_trl.distributions.reward_distribution import RewardDistribution
from disco_trl.distributions.transforms import get_transform
from disco_trl.evaluation import compare
from disco_trl.evaluation.compare import Result, Variant
from disco_trl.evaluation.held_out import HeldOut

from . import human_ratings


BRADLEY_TERRY, NORMAL, NOISE_LEARNED = "bradley-terry", "normal", "normal:label_noise=null"
TITLES = {BRADLEY_TERRY: "Bradley–Terry", NORMAL: "disco, normal", NOISE_LEARNED: "disco, noise learned"}
COLORS = {BRADLEY_TERRY: "#c4571b", NORMAL: "#2463b4", NOISE_LEARNED: "#2e8049"}
SETTINGS = [
    *("per_device_train_batch_size=16", "num_train_epochs=1", "learning_rate=4e-4", "lr_scheduler_type=cosine"),
    *("warmup_steps=0.1", "gradient_checkpointing=false", "train_sampling_strategy=sequential", "epistemic=true"),
]


@dataclass(frozen=True)
class World:
    """What is drawn from the ratings to train on."""

    votes: int
    said: str = "choices"
    source: str = "tweets"
    flipped: float = 0.0
    reversed: float = 0.0

    @property
    def name(self) -> str:
        """Name of its folder."""
        changes = [
            f"{field.name}-{value}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default and field.name != "votes"
        ]
        return "-".join([f"{self.votes}-votes", *changes])

    def arguments(self) -> list[str]:
        """Arguments of `benchmarks.human_ratings`."""
        return [word for field in fields(self) for word in (f"--{field.name}", str(getattr(self, field.name)))]


STUDIES: dict[str, tuple[str, dict[Any, World], Sequence[str]]] = {
    "supervision": (
        "supervision",
        {
            "single votes": World(30_000),
            "ten votes": World(9600, said="votes"),
            "ten ratings": World(9600, said="ratings"),
        },
        (BRADLEY_TERRY, NORMAL),
    ),
    "movies": (
        "film reviews",
        {"single votes": World(9600, source="movies")},
        (BRADLEY_TERRY, NORMAL),
    ),
    "efficiency": (
        "training votes",
        {votes: World(votes) for votes in (250, 1000, 4000, 30_000)},
        (BRADLEY_TERRY, NORMAL),
    ),
    "noise": (
        "share of training votes turned round",
        {share: World(1000, flipped=share) for share in (0.0, 0.2, 0.4)},
        (BRADLEY_TERRY, NORMAL, NOISE_LEARNED),
    ),
    "context": (
        "ratings turned round, and what people say",
        {
            "none, votes": World(1000),
            "half, votes": World(1000, reversed=0.5),
            "half, ratings": World(1000, said="ratings", reversed=0.5),
        },
        (BRADLEY_TERRY, NORMAL),
    ),
}
FIGURES = {
    "nll": ("metrics", "NLL"),
    "accuracy": ("metrics", "accuracy"),
    "expected_calibration_error": ("metrics", "expected calibration error"),
    "risk_coverage_area": ("metrics", "risk–coverage area"),
    "scale, with people's standard deviation": ("agreement", "σ with people's SD"),
}


def run(world: World, variants: Sequence[str], args: argparse.Namespace) -> dict[str, list[Result]]:
    """Draws the votes, trains what is not trained yet, and loads it: for each variant a result for each seed."""
    folder = args.output / world.name
    for seed in args.seeds:
        data = folder / f"data-{seed}"
        if not (data / "test.jsonl").exists():
            human_ratings.main(
                [*world.arguments(), "--block", "8", "16", "--seed", str(seed + 1), "--output", str(data)]
            )
    command = ["compare", args.model, str(folder / "data-{seed}"), str(folder), "--dtype", args.dtype]
    command += ["--variants", *variants, "--seeds", *map(str, args.seeds), "--bradley_terry", "disco"]
    disco_trl([*command, "--set", *SETTINGS, f"bf16={args.dtype == 'bfloat16'}"])
    return {
        name: [
            Result.load(Variant.parse(name), seed, folder / f"{Variant.parse(name).folder}-{seed}")
            for seed in args.seeds
        ]
        for name in variants
    }


def held_out(world: World, args: argparse.Namespace) -> HeldOut:
    """The held-out votes of a world, which are the same for all seeds."""
    rows = open_rows(str(args.output / world.name / f"data-{args.seeds[0]}"), split="test")
    return HeldOut.read(rows, AutoTokenizer.from_pretrained(args.model))


def study(name: str, args: argparse.Namespace) -> str:
    """Runs a study. Returns its table, and writes its chart to the output folder."""
    label, worlds, variants = STUDIES[name]
    worlds = {level: world for level, world in worlds.items() if world.votes <= args.most_votes}
    found = {level: run(world, variants, args) for level, world in worlds.items()}
    lines = [f"| {label} | | " + " | ".join(title for _, title in FIGURES.values()) + " | NLL less Bradley–Terry's |"]
    lines.append("| ---: | --- |" + " ---: |" * (len(FIGURES) + 1))
    for level, results in found.items():
        data = held_out(worlds[level], args)
        for variant in variants:
            cells = [_cell(results[variant], figure) for figure in FIGURES]
            is_reference = variant == BRADLEY_TERRY
            cells.append(
                "" if is_reference else str(compare.paired(results[variant], results[BRADLEY_TERRY], data, "nll"))
            )
            lines.append(f"| {level} | {TITLES[variant]} | " + " | ".join(cells) + " |")
    style = "o" if any(isinstance(level, str) for level in worlds) else "o-"
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.1), layout="constrained")
    for axis, what in zip(axes, ("nll", "accuracy", "expected_calibration_error", "risk_coverage_area"), strict=True):
        for place, variant in enumerate(variants):
            values = np.array([_values(found[level][variant], what) for level in worlds])
            means = values.mean(axis=1)
            ranges = np.abs(np.stack([values.min(axis=1), values.max(axis=1)]) - means)
            at = np.arange(len(worlds)) + 0.04 * place
            color, title = COLORS[variant], TITLES[variant]
            axis.errorbar(at, means, yerr=ranges, fmt=style, color=color, label=title, markersize=4, linewidth=1.2)
        axis.set_ylabel(FIGURES[what][1])
        axis.set_xticks(np.arange(len(worlds)), [str(level) for level in worlds])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.supxlabel(label, fontsize="medium")
    figure.savefig(args.output / f"{name}.png", dpi=160)
    return "\n".join(lines)


def _values(results: list[Result], figure: str) -> list[float]:
    group, _ = FIGURES[figure]
    found = [result.figures[group].get(figure, {}).get("value") for result in results]
    return [value for value in found if value is not None]


def _cell(results: list[Result], figure: str) -> str:
    values = _values(results, figure)
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "none"


# Best of N


RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "location": ("mean", {}),
    "μ − σ": ("lower_bound", {"k": 1.0}),
    "μ − total σ": ("lower_bound", {"k": 1.0, "total": True}),
    "10 % quantile": ("quantile", {"q": 0.1}),
    "certainty equivalent, β = 1": ("certainty_equivalent", {"beta": 1.0}),
    "win rate": ("win_rate", {}),
}
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
GROUPS = 2000
GOLD = ("mean rating", "10th percentile of the ratings", "regret")


def best_of_n(args: argparse.Namespace) -> str:
    """Chooses among N held-out texts by each rule. Returns the table for N = 256, and draws a chart of all N."""
    lines = ["| training votes | rule | " + " | ".join(f"{name}, N = {SIZES[-1]}" for name in GOLD)]
    lines[0] += " | mean rating less the location's, of each seed |"
    lines.append("| ---: | --- |" + " ---: |" * (len(GOLD) + 1))
    budgets = (250, 1000)
    figure, axes = plt.subplots(len(budgets), 3, figsize=(12, 7), layout="constrained", sharex=True, squeeze=False)
    for row, votes in zip(axes, budgets, strict=True):
        world = World(votes)
        results = run(world, (BRADLEY_TERRY, NORMAL), args)
        data = held_out(world, args)
        ratings = data.ratings()
        texts = np.array(sorted(ratings))
        gold = np.array([[ratings[text].mean(), np.quantile(ratings[text], 0.1)] for text in texts])
        chosen = {
            "Bradley–Terry": [_choose(result.rewards[texts], gold, "mean", {}) for result in results[BRADLEY_TERRY]]
        }
        for rule, (name, options) in RULES.items():
            chosen[f"disco, {rule}"] = [
                _choose(result.rewards[texts], gold, name, options) for result in results[NORMAL]
            ]
        for place, (rule, of_seeds) in enumerate(chosen.items()):
            values = np.stack(of_seeds)  # [seeds, sizes, gold]
            style = {"color": f"C{place}", "marker": "os^DvPX"[place], "linestyle": ("-", "--")[place % 2]}
            for axis, column in zip(row, values.transpose(2, 0, 1), strict=True):
                axis.plot(SIZES, column.mean(axis=0), label=rule, markersize=4, linewidth=1.2, **style)
                if place == 0:  # The ranges of the other rules are as wide; the table has them.
                    axis.fill_between(SIZES, column.min(axis=0), column.max(axis=0), color="0.5", alpha=0.12)
            last = values[:, -1]
            cells = [f"{v.mean():.2f} ({v.min():.2f} to {v.max():.2f})" for v in last.T]
            of_location = np.stack(chosen["disco, location"])[:, -1]
            cells.append(", ".join(f"{gain:+.2f}" for gain in (last - of_location)[:, 0]))
            lines.append(f"| {votes} | {rule} | " + " | ".join(cells) + " |")
        for axis, title in zip(row, GOLD, strict=True):
            axis.set(title=f"{title}, {votes} votes", xlabel="N")
            axis.set_xscale("log", base=2)
            axis.set_xticks(SIZES, map(str, SIZES))
            axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(args.output / "best-of-n.png", dpi=160)
    return "\n".join(lines)


def _choose(rewards: RewardDistribution, gold: np.ndarray, name: str, options: dict[str, Any]) -> np.ndarray:
    """Mean ratings of what a rule chooses from random groups, of shape `(sizes, 3)`. The groups are the same for all
    rules.
    """
    transform = get_transform(name, **options)
    generator = np.random.default_rng(0)
    found = []
    for size in SIZES:
        groups = np.stack([generator.choice(len(gold), size, replace=False) for _ in range(GROUPS)])
        if transform.needs_groups:
            wins = rewards[:, None].prob_greater(rewards[None, :]).double().numpy()
            scores = np.stack([wins[np.ix_(group, group)].sum(axis=1) for group in groups])
        else:
            scores = transform(rewards).double().numpy()[groups]
        best = groups[np.arange(GROUPS), scores.argmax(axis=1)]
        found.append([*gold[best].mean(axis=0), (gold[groups, 0].max(axis=1) - gold[best, 0]).mean()])
    return np.array(found)


def main() -> None:
    """Runs the studies of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="+", choices=[*STUDIES, "best-of-n"], help="Studies to run.")
    parser.add_argument(
        "--model", help="Hub id or folder of the language model (default: a small chat LM from the package index)."
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="Dtype of the language model (default: %(default)s).",
    )
    parser.add_argument(
        "--most-votes",
        type=int,
        default=30_000,
        help="Leave out budgets of more votes than this (default: %(default)s).",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of the training runs (default: 0 1 2)."
    )
    parser.add_argument("--output", type=Path, required=True, help="Folder for runs, tables and charts.")
    args = parser.parse_args()
    args.model = args.model or str(human_ratings.small_chat_lm())
    for name in args.studies:
        table = best_of_n(args) if name == "best-of-n" else study(name, args)
        (args.output / f"{name}.md").write_text(table + "\n", encoding="utf-8")
        print(f"\n## {name}\n\n{table}")


if __name__ == "__main__":
    try:
        main()
    except (ConnectionError, ValueError) as error:
        sys.exit(str(error))
