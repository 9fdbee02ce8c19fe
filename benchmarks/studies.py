"""Studies on people's ratings of texts: what the distribution is good for, and where its limits are.

Run as:

    python -m benchmarks.studies supervision movies efficiency noise context best-of-n routing --output runs/studies

- `supervision`: 30,000 single votes, ten votes on each of 9,600 pairs, or ten ratings of each text of as many pairs.
- `movies`: 9,600 single votes on sentences of film reviews instead of tweets.
- `efficiency`: 250 to 30,000 single votes.
- `noise`: up to 40 % of 1,000 training votes reversed, with the share of wrong votes learned or not.
- `context`: half of each text's ratings reversed, as if by people who want the opposite.
- `best-of-n`: the best of N held-out texts by each rule, with models trained on few votes, judged by the ratings.
- `routing`: accuracy of the same models if the pairs that they doubt most are decided by the majority of the raters.

The last two have Bradley–Terry with the same posterior and an ensemble of it as controls.

Each study runs `disco-trl compare`. Held-out texts and votes are the same in all. Bradley–Terry is trained by our
trainer, in the same batches. Finished runs are not repeated. The studies end with tables, and a chart for each.
`--most-votes 4000` leaves out the larger budgets. `--dtype bfloat16` is for processors that are faster in it, which
not all with bfloat16 support are.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from disco_trl.distributions.reward_distribution import RewardDistribution
from disco_trl.distributions.transforms import get_transform
from disco_trl.evaluation import verdicts
from disco_trl.evaluation.compare import Result
from disco_trl.evaluation.held_out import HeldOut
from disco_trl.evaluation.routing import area_under_routing, doubts, judge_of_people, routing_curve, routing_figures

from . import human_ratings
from .study_runs import SEEDS, held_out_of, study_parser, train_and_evaluate, write_tables


BRADLEY_TERRY, NORMAL, NOISE_LEARNED = "bradley-terry", "normal", "normal:label_noise=null"
EPISTEMIC, ENSEMBLE = "bradley-terry-epistemic", "bradley-terry-ensemble"
TITLES = {
    BRADLEY_TERRY: "Bradley–Terry",
    EPISTEMIC: "Bradley–Terry, posterior",
    ENSEMBLE: "Bradley–Terry, ensemble of 4",
    NORMAL: "disco, normal",
    NOISE_LEARNED: "disco, noise learned",
}
COLORS = {
    BRADLEY_TERRY: "#c4571b",
    EPISTEMIC: "#8746a6",
    ENSEMBLE: "#5f6b1f",
    NORMAL: "#2463b4",
    NOISE_LEARNED: "#2e8049",
}


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


def run(
    world: World, variants: Sequence[str], args: argparse.Namespace, seeds: Sequence[int] = SEEDS
) -> dict[str, list[Result]]:
    """Draws the votes, trains what is not trained yet, and loads it: for each variant a result for each seed, of those
    of the command line or of the study.
    """
    folder, seeds = args.output / world.name, args.seeds or seeds
    for seed in seeds:
        data = folder / f"data-{seed}"
        if not (data / "test.jsonl").exists():
            human_ratings.main(
                [*world.arguments(), "--block", "8", "16", "--seed", str(seed + 1), "--output", str(data)]
            )
    return train_and_evaluate(args, folder, folder, variants, seeds, settings=["epistemic=true"])


def held_out(world: World, args: argparse.Namespace) -> HeldOut:
    """The held-out votes of a world, which are the same for all seeds."""
    return held_out_of(args, args.output / world.name / f"data-{(args.seeds or SEEDS)[0]}")


def study(name: str, args: argparse.Namespace) -> str:
    """Runs a study of training data. Returns its table, and writes its chart to the output folder."""
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
                "" if is_reference else str(verdicts.paired(results[variant], results[BRADLEY_TERRY], data, "nll"))
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
RULES_OF = {
    BRADLEY_TERRY: ("location",),
    EPISTEMIC: ("μ − total σ", "win rate"),  # Its locations are those of Bradley–Terry.
    ENSEMBLE: ("location", "μ − total σ", "win rate"),
    NORMAL: tuple(RULES),
}
STYLES = dict(zip(RULES, (("o", "-"), ("v", ":"), ("s", "--"), ("D", ":"), ("P", ":"), ("^", "-.")), strict=True))
BUDGETS = {250: range(10), 1000: range(3)}
"""Training votes of the studies of uncertainty, and seeds. With few votes, models know least and differ most."""
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
GROUPS = 2000
GOLD = ("mean rating", "10th percentile of the ratings", "regret")


def uncertain(args: argparse.Namespace) -> dict[int, tuple[dict[str, list[Result]], HeldOut]]:
    """The models whose uncertainty is put to use, and the held-out votes, by number of training votes."""
    worlds = {votes: World(votes) for votes in BUDGETS if votes <= args.most_votes}
    if not worlds:
        raise ValueError(f"--most-votes {args.most_votes} leaves nothing to do; pass {min(BUDGETS)} or more")
    return {
        votes: (run(world, tuple(RULES_OF), args, BUDGETS[votes]), held_out(world, args))
        for votes, world in worlds.items()
    }


def best_of_n(args: argparse.Namespace) -> str:
    """Chooses among N held-out texts by each rule. Returns the table for N = 256, and draws a chart of all N."""
    lines = ["| training votes | model | rule | " + " | ".join(f"{name}, N = {SIZES[-1]}" for name in GOLD)]
    lines[0] += " | mean rating less its own location's | less that of Bradley–Terry's location |"
    lines.append("| ---: | --- | --- |" + " ---: |" * (len(GOLD) + 2))
    found = uncertain(args)
    size = (12, 3.5 * len(found) + 1)
    figure, axes = plt.subplots(len(found), 3, figsize=size, layout="constrained", sharex=True, squeeze=False)
    for row, (votes, (results, data)) in zip(axes, found.items(), strict=True):
        ratings = data.ratings()
        texts = np.array(sorted(ratings))
        gold = np.array([[ratings[text].mean(), np.quantile(ratings[text], 0.1)] for text in texts])
        by_location = {
            variant: np.stack([_choose(result.rewards[texts], gold, "mean", {}) for result in of_variant])
            for variant, of_variant in results.items()
        }
        for variant, rule in ((variant, rule) for variant, rules in RULES_OF.items() for rule in rules):
            name, options = RULES[rule]
            values = by_location[variant]  # [seeds, sizes, gold]
            if name != "mean":
                values = np.stack([_choose(result.rewards[texts], gold, name, options) for result in results[variant]])
            marker, line = STYLES[rule]
            style = {"color": COLORS[variant], "marker": marker, "linestyle": line}
            for axis, column in zip(row, values.transpose(2, 0, 1), strict=True):
                label = f"{TITLES[variant]}: {rule}"
                axis.plot(SIZES, column.mean(axis=0), label=label, markersize=4, linewidth=1.2, **style)
                if variant == BRADLEY_TERRY:  # The ranges of the other rules are as wide; the table has them.
                    axis.fill_between(SIZES, column.min(axis=0), column.max(axis=0), color="0.5", alpha=0.12)
            cells = [f"{v.mean():.2f} ({v.min():.2f} to {v.max():.2f})" for v in values[:, -1].T]
            for reference in (variant, BRADLEY_TERRY):
                gain = (values - by_location[reference])[:, -1, 0]
                is_itself = rule == "location" and reference == variant
                cells.append("" if is_itself else mean_over_seeds(gain))
            lines.append(f"| {votes} | {TITLES[variant]} | {rule} | " + " | ".join(cells) + " |")
        for axis, title in zip(row, GOLD, strict=True):
            axis.set(title=f"{title}, {votes} votes", xlabel="N")
            axis.set_xscale("log", base=2)
            axis.set_xticks(SIZES, map(str, SIZES))
            axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(args.output / "best-of-n.png", dpi=160)
    return "\n".join(lines)


def mean_over_seeds(values: np.ndarray) -> str:
    """Mean of differences of shape `(seeds,)`, with Student's 95 % interval if there are several."""
    if len(values) == 1:
        return f"{values[0]:+.2f}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():+.2f} ({values.mean() - half:+.2f} to {values.mean() + half:+.2f})"


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


# Judge routing


SENT_BY = {
    "error": "τ of the difference",
    "margin": "|Δμ|",
    "probability": "P nearest ½",
    "scale": "σ",
    "random": "random",
}
SENT_BY_OF = {  # With a constant scale and no error, P orders pairs as |Δμ| does, and σ none.
    BRADLEY_TERRY: ("margin", "random"),
    EPISTEMIC: ("error", "margin", "probability", "random"),
    ENSEMBLE: ("error", "margin", "probability", "random"),
    NORMAL: tuple(SENT_BY),
}
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)


def routing(args: argparse.Namespace) -> str:
    """Sends the pairs that a model doubts most to a judge, the majority of the raters. Returns the table of accuracies
    and areas, and draws a chart of the curves.
    """
    lines = ["| training votes | model | sent by | " + " | ".join(f"{share:.0%} sent" for share in SHARES)]
    lines[0] += " | area, mean and range over seeds | area less that by &#124;Δμ&#124;, 95 % over pairs |"
    lines.append("| ---: | --- | --- |" + " ---: |" * (len(SHARES) + 2))
    found = uncertain(args)
    size = (13, 3.2 * len(found) + 0.5)
    figure, axes = plt.subplots(
        len(found), len(SENT_BY_OF), figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    grid = np.linspace(0, 1, 201)
    for row, (votes, (results, data)) in zip(axes, found.items(), strict=True):
        judge = judge_of_people(data)
        for axis, (variant, rules) in zip(row, SENT_BY_OF.items(), strict=True):
            runs = []
            for result in results[variant]:
                of_rules = doubts(result.rewards[data.first], result.rewards[data.second])
                runs.append(
                    (data.forecasts(result.rewards, result.tie_width), {rule: of_rules[rule] for rule in rules})
                )
            figures = routing_figures(runs, judge)
            for rule in rules:
                curves = [routing_curve(forecasts, judge, of_rules[rule]) for forecasts, of_rules in runs]
                curve = np.mean([np.interp(grid, *points) for points in curves], axis=0)
                place = list(SENT_BY).index(rule)
                style = {"color": f"C{place}", "linestyle": ("-", "--", "-.", ":", (0, (1, 3)))[place]}
                axis.plot(grid, curve, label=SENT_BY[rule], linewidth=1.2, **style)
                areas = [area_under_routing(forecasts, judge, of_rules[rule]) for forecasts, of_rules in runs]
                _, gain = figures[rule]
                cells = [f"{np.interp(share, grid, curve):.3f}" for share in SHARES]
                cells.append(f"{np.mean(areas):.4f} ({min(areas):.4f} to {max(areas):.4f})")
                cells.append("" if rule == "margin" else f"{gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})")
                of_rule = SENT_BY[rule].replace("|", "&#124;")
                lines.append(f"| {votes} | {TITLES[variant]} | {of_rule} | " + " | ".join(cells) + " |")
            axis.set_title(f"{TITLES[variant]}, {votes} votes", fontsize="medium")
            axis.set_xlabel("share of pairs sent to the judge")
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("accuracy")
    axes[0, -1].legend(frameon=False, loc="lower right")
    figure.savefig(args.output / "routing.png", dpi=160)
    return "\n".join(lines)


TABLES: dict[str, Callable[[argparse.Namespace], str]] = {
    **{name: functools.partial(study, name) for name in STUDIES},
    **{"best-of-n": best_of_n, "routing": routing},
}


def main(argv: list[str] | None = None) -> None:
    """Runs the studies of the command line."""
    parser = study_parser(
        "python -m benchmarks.studies",
        __doc__,
        TABLES,
        seeds="0 1 2; 0 to 9 for 250 votes of best-of-n and routing",
    )
    parser.add_argument(
        "--most-votes",
        type=int,
        default=30_000,
        help="Leave out budgets of more votes than this (default: %(default)s).",
    )
    write_tables(parser.parse_args(argv), TABLES)


if __name__ == "__main__":
    try:
        main()
    except (ConnectionError, ValueError) as error:
        sys.exit(str(error))
