"""Studies of the scale: what people have to be asked for a σ that says how much they disagree, and what it costs.

Run as:

    python -m benchmarks.scale_studies graded rated imperfect votes ablation --output runs/scale
    python -m benchmarks.scale_studies arguments --argument_votes FOLDER --output runs/scale

- `graded`: 2,400 and 9,600 comparisons of tweets that say how much better one of the two is.
- `rated`: the 2,400 with a tenth of the reading spent on ratings, and ten ratings of each text of 9,600 pairs.
- `imperfect`: 2,400 of which a quarter has random strengths, or a tenth is graded.
- `votes`: 2,400 and 9,600 single votes, which say little about a scale.
- `arguments`: 2,400 pairs of arguments with five real votes each, ties included, of other debates than the held-out
  ones (`benchmarks.argument_votes`).
- `ablation`: settings, one at a time, on 2,400 graded comparisons. The training texts are split once more for it, so
  that no setting is chosen on the texts that the other tables are about.

Each study runs `disco-trl compare` and leaves a folder with figures for each run. Finished runs are not repeated, so
that a study that was interrupted goes on if the same command is run again. Held-out texts and votes are the same in
all runs. Bradley–Terry is trained by our trainer, in the same batches: ties are ½, and with soft labels a strength
stands for a probability (`disco_trl.evaluation.controls`). The studies end with tables. On two cores, none is meant to
take more than 90 minutes.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from disco_trl.data.files import written_at_once
from disco_trl.data.tokenization import tokenize
from disco_trl.evaluation import verdicts
from disco_trl.evaluation.compare import Result, Variant
from disco_trl.evaluation.held_out import HeldOut
from disco_trl.evaluation.metrics import spearman
from disco_trl.models.inference import load_trained, run_in_batches

from . import argument_votes, human_ratings
from .study_runs import SEEDS, held_out_of, study_parser, train_and_evaluate, write_tables


BRADLEY_TERRY, SOFT, NORMAL = "bradley-terry", "bradley-terry-soft", "normal"
TITLES = {
    BRADLEY_TERRY: "Bradley–Terry",
    SOFT: "Bradley–Terry, soft labels",
    NORMAL: "disco, normal",
}
MOST_WORSE = 0.005
"""Upper end of the interval of a difference in NLL up to which a model counts as no worse, in nats."""
RIDGES = 10.0 ** np.arange(-1, 7)
CEILING_FILE = "ceiling.json"
NO_RUN = "–"


@dataclass(frozen=True)
class Arm:
    """A model of a table.

    Attributes:
        variant (`str`):
            Variant of `disco-trl compare`.
        lora_r (`int`, *optional*, defaults to `16`):
            Rank of its adapters.
    """

    variant: str
    lora_r: int = 16

    @property
    def title(self) -> str:
        """Its name in the table."""
        base, _, settings = self.variant.partition(":")
        rank = f", rank {self.lora_r}" if self.lora_r != Arm.lora_r else ""
        return TITLES.get(base, f"disco, {base}") + (f", {settings.replace(',', ', ')}" if settings else "") + rank


@dataclass(frozen=True)
class Study:
    """A table.

    Attributes:
        levels (`dict[str, str]`):
            What is trained on, in words, and the arguments that draw it.
        arms (`Sequence[Arm]`):
            Models to train on each.
        figures (`Sequence[tuple[str, str, str]]`):
            Columns: title, and group and name of the figure among those of a run.
        draw (`Callable`, *optional*, defaults to `human_ratings.main`):
            Command that writes the data.
        seeds (`Sequence[int]`, *optional*, defaults to `(0, 1, 2)`):
            Seeds of the draws and of the training.
    """

    levels: dict[str, str]
    arms: Sequence[Arm]
    figures: Sequence[tuple[str, str, str]]
    draw: Callable[[list[str]], None] = human_ratings.main
    seeds: Sequence[int] = SEEDS


OF_SCALE = (
    ("σ with people's SD", "agreement", "scale, with people's standard deviation"),
    ("ceiling", "ceiling", "ceiling"),
    (
        "−&#124;μ − median&#124; with people's SD",
        "agreement",
        "−|location − median|, with people's standard deviation",
    ),
)
OF_VOTES = (
    ("accuracy", "metrics", "accuracy"),
    ("NLL", "metrics", "nll"),
    ("calibration error", "metrics", "expected_calibration_error"),
)
OF_SHARES = (
    ("cross-entropy", "metrics", "nll"),
    ("AUROC of divided pairs", "agreement", "divided"),
    ("by −&#124;Δμ&#124;", "agreement", "divided_by_distance"),
    ("matched in &#124;Δμ&#124;", "agreement", "divided_matched"),
    ("accuracy", "metrics", "accuracy"),
)
GRADED = "--said grades --votes 2400"
# One setting at a time. Bradley–Terry gets the learning rates as well.
ABLATION = (
    *(BRADLEY_TERRY, SOFT, NORMAL),
    *(f"{SOFT}:labels=sign,learning_rate={rate}" for rate in ("2e-4", "8e-4")),
    *(f"{SOFT}:labels=[0.75,0.95,1]", f"{NORMAL}:scale_training=joint"),
    *(f"{NORMAL}:learning_rate={rate}" for rate in ("2e-4", "8e-4")),
    *(f"{NORMAL}:scale_layer={layer}" for layer in (0, 10, 15, 25)),
    *(f"{NORMAL}:calibrate=false", "logistic", "laplace", "cauchy"),
)
STUDIES = {
    "graded": Study(
        {"2,400 graded": GRADED, "9,600 graded": "--said grades --votes 9600"},
        (Arm(BRADLEY_TERRY), Arm(SOFT), Arm(NORMAL)),
        figures=OF_SCALE + OF_VOTES,
    ),
    "rated": Study(
        {
            "2,400 graded, a tenth of the reading rated": f"{GRADED} --rated 0.1",
            "9,600 pairs, ten ratings a text": "--said ratings --votes 9600",
        },
        (Arm(BRADLEY_TERRY), Arm(NORMAL)),
        figures=OF_SCALE + OF_VOTES,
    ),
    "imperfect": Study(
        {
            "2,400 graded, a quarter at random": f"{GRADED} --random_strengths 0.25",
            "2,400, a tenth graded": f"{GRADED} --graded 0.1",
        },
        (Arm(BRADLEY_TERRY), Arm(SOFT), Arm(NORMAL)),
        figures=OF_SCALE + OF_VOTES,
    ),
    "votes": Study(
        {"2,400 votes": "--said choices --votes 2400", "9,600 votes": "--said choices --votes 9600"},
        (Arm(BRADLEY_TERRY), Arm(NORMAL)),
        figures=OF_SCALE + OF_VOTES,
    ),
    "arguments": Study(
        {"2,400 pairs, five votes each": "--pairs 2400"},
        # To Bradley–Terry, a row with the votes of several people is their share, a soft label.
        (Arm(BRADLEY_TERRY), Arm(NORMAL)),
        figures=OF_SHARES,
        draw=argument_votes.main,
    ),
    "ablation": Study(
        {"2,400 graded, development texts": f"{GRADED} --development"},
        (*map(Arm, ABLATION), *(Arm(NORMAL, rank) for rank in (4, 64))),
        figures=OF_SCALE + OF_VOTES,
        seeds=(0, 1),
    ),
}


# Runs


def folder_of(words: str, args: argparse.Namespace) -> Path:
    """Folder of the runs on data that are drawn by these arguments."""
    return args.output / "-".join(word.removeprefix("--") for word in words.split())


def run(study: Study, words: str, args: argparse.Namespace) -> dict[Arm, list[Result]]:
    """Draws the data, trains what is not trained yet, and loads it: for each arm a result for each seed."""
    folder, seeds = folder_of(words, args), args.seeds or study.seeds
    source = [str(args.argument_votes)] if study.draw is argument_votes.main else ["--block", "8", "16"]
    for seed in seeds:
        data = folder / f"data-{seed}"
        if not (data / "test.jsonl").exists():
            study.draw([*source, *words.split(), "--seed", str(seed + 1), "--output", str(data)])
    found = {}
    for rank in dict.fromkeys(arm.lora_r for arm in study.arms):
        arms = [arm for arm in study.arms if arm.lora_r == rank]
        output = folder / f"rank-{rank}"
        options = ["--lora_r", str(rank), "--keep_models"]
        results = train_and_evaluate(args, folder, output, [arm.variant for arm in arms], seeds, options=options)
        for arm in arms:
            found[arm] = results[arm.variant]
            if arm == Arm(NORMAL) and study.draw is human_ratings.main:
                for seed, result in zip(seeds, found[arm], strict=True):
                    path = output / f"{Variant.parse(arm.variant).folder}-{seed}"
                    result.figures["ceiling"] = ceiling(path, args.dtype, "--development" in words.split())
    return found


def held_out(study: Study, words: str, args: argparse.Namespace) -> HeldOut:
    """The held-out data of a level, which are the same for all seeds."""
    return held_out_of(args, folder_of(words, args) / f"data-{(args.seeds or study.seeds)[0]}")


# The ceiling


def ceiling(folder: Path, dtype: str, development: bool) -> dict[str, dict[str, float]]:
    """What the states that a scale reads say about people's disagreement, however it is learned: the rank correlation,
    on held-out texts, of a ridge regression of the raters' standard deviation on them. It is computed once a run.

    Args:
        folder (`Path`):
            Folder of a run with its model.
        dtype (`str`):
            Dtype of the language model.
        development (`bool`):
            Whether the texts are those of `--development`.

    Returns:
        `dict`: The figure in the form of those of a run.
    """
    path = folder / CEILING_FILE
    if not path.exists():
        train, test = human_ratings.split_by_text(human_ratings.load_ratings("tweets"))
        if development:
            train, test = human_ratings.split_by_text(train, seed=1)
        model = load_trained(str(folder / "model"), dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(str(folder / "model"))
        states = [states_of(model, [tokenize(tokenizer, row.text) for row in rows]) for rows in (train, test)]
        deviations = [np.array([row.ratings.std(ddof=1) for row in rows]) for rows in (train, test)]
        value = spearman(ridge_predictions(states[0], deviations[0], states[1]), deviations[1])
        with written_at_once(path) as unfinished:
            unfinished.write_text(json.dumps({"ceiling": {"value": value}}) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def states_of(model: torch.nn.Module, sequences: list[list[int]]) -> np.ndarray:
    """The states that a model's scale reads of N sequences, of shape `(N, H)`."""
    order: list[int] = []
    parts = []
    for indices, output in run_in_batches(model, sequences):
        order += indices
        parts.append(output.scale_state.double().cpu())
    return torch.cat(parts)[torch.tensor(order).argsort()].numpy()


def ridge_predictions(states: np.ndarray, target: np.ndarray, new_states: np.ndarray) -> np.ndarray:
    """Predictions of a ridge regression, with the ridge of the smallest squared error of leave-one-out predictions.

    Args:
        states (`np.ndarray` of shape `(N, H)`):
            States to learn from, which are standardized.
        target (`np.ndarray` of shape `(N,)`):
            What to predict.
        new_states (`np.ndarray` of shape `(M, H)`):
            States to predict it for.

    Returns:
        `np.ndarray` of shape `(M,)`: The predictions.
    """
    mean, deviation = states.mean(axis=0), states.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    left, values, right = np.linalg.svd((states - mean) / deviation, full_matrices=False)
    rotated = left.T @ (target - target.mean())
    squares = values**2

    def squared_error(ridge: float) -> float:
        shrunk = squares / (squares + ridge)
        leverage = left**2 @ shrunk + 1 / len(target)  # 1/N is the mean's.
        return float(np.mean(((target - target.mean() - left @ (shrunk * rotated)) / (1 - leverage)) ** 2))

    ridge = min(RIDGES, key=squared_error)
    weight = right.T @ (values / (squares + ridge) * rotated)
    return target.mean() + (new_states - mean) / deviation @ weight


# Tables


def table(study: Study, args: argparse.Namespace) -> str:
    """Runs a study and returns its table: figures as means over seeds with their range, and paired differences from
    each Bradley–Terry with 95 % intervals over texts and seeds.
    """
    references = [arm for arm in (Arm(BRADLEY_TERRY), Arm(SOFT)) if arm in study.arms]
    heads = ["", "", *(title for title, _, _ in study.figures)]
    heads += [f"{name} less that of {arm.title}" for arm in references for name in ("NLL", "accuracy")]
    lines = ["| " + " | ".join(heads) + " |", "| --- | --- |" + " ---: |" * (len(heads) - 2)]
    for level, words in study.levels.items():
        found = run(study, words, args)
        data = held_out(study, words, args)
        for arm in study.arms:
            cells = [cell(found[arm], group, name) for _, group, name in study.figures]
            for reference in references:
                for name in ("nll", "accuracy"):
                    cells.append(difference(found[arm], found[reference], data, name) if arm != reference else NO_RUN)
            lines.append(f"| {level} | {arm.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(results: list[Result], group: str, name: str) -> str:
    """A figure as the mean over seeds and its range, or `–` if the runs do not have it."""
    values = [result.figures.get(group, {}).get(name, {}).get("value") for result in results]
    return verdicts.mean_and_range([value for value in values if value is not None and not np.isnan(value)], "{:.3f}")


def difference(ours: list[Result], theirs: list[Result], data: HeldOut, name: str) -> str:
    """A paired difference and, for the negative log-likelihood, whether it may be more than [`MOST_WORSE`]."""
    verdict = verdicts.paired(ours, theirs, data, name)
    return f"{verdict}" + (f", may exceed +{MOST_WORSE}" if name == "nll" and verdict.high > MOST_WORSE else "")


def main(argv: list[str] | None = None) -> None:
    """Runs the studies of the command line."""
    parser = study_parser("python -m benchmarks.scale_studies", __doc__, STUDIES, seeds="those of the study")
    parser.add_argument(
        "--argument_votes", type=Path, metavar="FOLDER", help="Folder of the votes on arguments, for `arguments`."
    )
    args = parser.parse_args(argv)
    if "arguments" in args.studies and args.argument_votes is None:
        parser.error("the study `arguments` needs --argument_votes FOLDER; see benchmarks/argument_votes.py")
    write_tables(args, {name: functools.partial(table, study) for name, study in STUDIES.items()})


if __name__ == "__main__":
    try:
        main()
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
