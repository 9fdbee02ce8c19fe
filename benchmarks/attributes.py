"""Several attributes in one model: what it learns of each beside models of one attribute, and what it costs.

Run as:

    python -m benchmarks.attributes ratings added cost --attribute_ratings FOLDER --output runs/attributes

- `ratings`: 4,000 sentences, of each of which five people or more rated valence, arousal and dominance
  (`benchmarks.attribute_ratings`). One model of the three attributes, three models of one each, one model of the mean
  of the three, and one of six attributes, three of them rated by other people. Texts and batches are the same.
- `added`: the same pairs of sentences with simulated overall comparisons, with and without the ratings of attributes.
- `cost`: time and memory of one model of three attributes and of one attribute, in alternation.

Finished runs are not repeated, so that a study that was interrupted goes on if the same command is run again. The
studies end with tables. On two cores, none is meant to take more than 90 minutes.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from disco_trl import DiscoRewardConfig, DiscoRewardTrainer, JointRewardDistribution, RewardDistribution
from disco_trl.data.columns import OVERALL
from disco_trl.data.files import written_at_once
from disco_trl.data.tokenization import tokenize
from disco_trl.distributions.correlation import products_of_ratings
from disco_trl.distributions.ratings import rating_log_likelihood
from disco_trl.evaluation.agreement import is_constant
from disco_trl.evaluation.bootstrap import interval, resamples
from disco_trl.evaluation.compare import parse_settings
from disco_trl.evaluation.disagreement import rater_correlations, spreads_of_halves
from disco_trl.evaluation.metrics import spearman
from disco_trl.models.inference import run_in_batches

from .attribute_ratings import (
    CHOICE_WEIGHTS,
    READERS,
    WRITERS,
    Rated,
    compared_rows,
    draw_pairs,
    means_of,
    rated_rows,
    read_texts,
    rows_of_means,
)
from .peak_memory import PeakMemory, in_fresh_process
from .study_runs import SEEDS, SETTINGS, study_parser, write_tables


PAIRS = 2000
COST_PAIRS, COST_REPEATS = 192, 3
VOTES = 20_000
DRAWS = 1000
RATINGS = np.arange(1.0, 6.0)
TOKENS_PER_BATCH = 4096
ONE, JOINT, SIX, SCALAR = "one attribute", "three attributes", "six attributes", "their mean"
PREDICTIONS, FIGURES = "predictions.safetensors", "run.json"


@dataclass(frozen=True)
class Run:
    """A training run, as it is handed to a process of its own.

    Attributes:
        rows (`list[dict]`):
            Training rows, in order.
        texts (`list[str]`):
            Texts to score, of which there may be none.
        model (`str`):
            The language model.
        dtype (`str`):
            Its dtype.
        seed (`int`):
            Seed of the training.
        folder (`str`):
            Folder for its predictions and figures.
    """

    rows: list[dict[str, Any]]
    texts: list[str]
    model: str
    dtype: str
    seed: int
    folder: str


def train(run: Run) -> dict[str, float]:
    """Trains a model and scores texts.

    Args:
        run ([`Run`]):
            The run. Its folder gets location, scale and location error of each text and attribute, and what the model
            has learned of how people rate.

    Returns:
        `dict[str, float]`: Seconds of the training, and its peak memory above that of the process before it.
    """
    config = DiscoRewardConfig(
        output_dir=run.folder,
        seed=run.seed,
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        use_cpu=not torch.accelerator.is_available(),
        model_init_kwargs={"dtype": run.dtype},
        bf16=run.dtype == "bfloat16",
        **parse_settings(SETTINGS, "the settings of the studies"),
    )
    peft_config = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear")
    with PeakMemory() as memory:
        trainer = DiscoRewardTrainer(
            run.model, config, train_dataset=Dataset.from_list(run.rows), peft_config=peft_config
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    inner = model.get_base_model()
    figures = {"seconds": seconds, "peak_gib": memory.peak_bytes / 2**30, "weights": inner.attribute_weights}
    if not run.texts:
        return figures

    tokenizer = AutoTokenizer.from_pretrained(run.model)
    sequences = [tokenize(tokenizer, text) for text in run.texts]
    heads = inner.reward_head.by_attribute()
    found: dict[str, dict[str, torch.Tensor]] = {
        name: {part: torch.zeros(len(sequences), dtype=torch.float64) for part in ("location", "scale", "error")}
        for name in heads
    }
    for places, output in run_in_batches(model, sequences, TOKENS_PER_BATCH):
        for name, parts in found.items():
            rewards = inner.rewards_of(output, name)
            parts["location"][places], parts["scale"][places] = rewards.location.double(), rewards.scale.double()
            if rewards.location_error is not None:
                parts["error"][places] = rewards.location_error.double()
    tensors = {f"{name}/{part}": tensor for name, parts in found.items() for part, tensor in parts.items()}
    for name, head in heads.items():
        thresholds = head.responses().thresholds
        if thresholds is not None:
            tensors[f"{name}/thresholds"] = thresholds.detach().double()
    if inner.reward_head.attributes is not None:
        tensors["correlation"] = inner.reward_head.attributes.correlation.double()
    folder = Path(run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / PREDICTIONS)
    with written_at_once(folder / FIGURES) as path:
        path.write_text(json.dumps(figures) + "\n", encoding="utf-8")
    return figures


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        tensors (`dict[str, torch.Tensor]`):
            What is in its file of predictions.
        figures (`dict[str, Any]`):
            Seconds, memory, and weights of the attributes.
    """

    tensors: dict[str, torch.Tensor]
    figures: dict[str, Any]

    def rewards(self, name: str = OVERALL) -> RewardDistribution:
        """Rewards of the texts for an attribute, of shape `(N,)`."""
        parts = [self.tensors[f"{name}/{part}"] for part in ("location", "scale", "error")]
        error = parts[2] if bool(parts[2].any()) else None
        return RewardDistribution(parts[0], parts[1], "normal", location_error=error)

    def joint(self, names: Sequence[str]) -> JointRewardDistribution:
        """Joint rewards of the texts, of shape `(N, A)`; the errors of the locations are left out."""
        of_names = [self.rewards(name) for name in names]
        known = sorted({name.partition("/")[0] for name in self.tensors} - {OVERALL, "correlation"})
        places = [known.index(name) for name in names]
        return JointRewardDistribution(
            torch.stack([rewards.location for rewards in of_names], dim=1),
            torch.stack([rewards.scale for rewards in of_names], dim=1),
            self.tensors["correlation"][places][:, places],
            names,
        )


def trained(args: argparse.Namespace, name: str, seed: int, rows: list[dict[str, Any]], texts: list[str]) -> Trained:
    """A run of a study, which is trained unless it is finished."""
    folder = args.output / f"{name}-{seed}"
    if not (folder / FIGURES).exists():
        print(f"{folder}: training on {len(rows):,} rows", flush=True)
        in_fresh_process(train, Run(rows, texts, args.model, args.dtype, seed, str(folder)))
    return Trained(load_file(folder / PREDICTIONS), json.loads((folder / FIGURES).read_text(encoding="utf-8")))


# Ratings


def ratings_table(args: argparse.Namespace) -> str:
    """One model of several attributes beside models of one.

    Args:
        args (`argparse.Namespace`):
            Arguments of the command line.

    Returns:
        `str`: Tables.
    """
    texts, held_out = read_texts(args.attribute_ratings, "train"), read_texts(args.attribute_ratings, "test")
    to_score = [rated.text for rated in held_out]
    runs: dict[str, list[Trained]] = {name: [] for name in (JOINT, *READERS, SCALAR, SIX)}
    for seed in args.seeds or SEEDS:
        pairs = draw_pairs(texts, args.pairs, seed)
        rows = {JOINT: rated_rows(pairs, READERS), SIX: rated_rows(pairs, READERS + WRITERS)}
        rows |= {name: rated_rows(pairs, [name]) for name in READERS} | {SCALAR: rows_of_means(pairs)}
        for name, of_model in runs.items():
            of_model.append(trained(args, name.replace(" ", "-"), seed, rows[name], to_score))
    return "\n\n".join((_of_attributes(runs, held_out), _of_sums(runs, held_out), _of_correlations(runs, held_out)))


def _of_attributes(runs: Mapping[str, list[Trained]], held_out: Sequence[Rated]) -> str:
    lines = [
        "| attribute | model | log-likelihood of a rating | less one attribute's (95 %) | μ | σ | σ, corrected |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in READERS:
        ratings = [_given(rated, name) for rated in held_out]
        counts = _counts(ratings)
        own = np.stack([_log_likelihood(run.rewards(), run.tensors, OVERALL, counts) for run in runs[name]])
        frequencies = counts.sum(dim=0) / counts.sum()
        constant = (counts @ frequencies.log()).sum() / counts.sum()
        lines.append(f"| {name} | frequencies of the ratings | {constant:.4f} | | | | |")
        for title, models, place in ((name, runs[name], OVERALL), (JOINT, runs[JOINT], name), (SIX, runs[SIX], name)):
            found = np.stack([_log_likelihood(run.rewards(place), run.tensors, place, counts) for run in models])
            people = counts.sum(dim=1).numpy()
            difference = "" if title == name else _difference(found, own, people, np.arange(len(people)))
            means = (found.sum(axis=1) / counts.sum().item()).tolist()
            shown = [
                _range(of_seeds) for of_seeds in _rank_correlations([run.rewards(place) for run in models], ratings)
            ]
            own_model = ONE if title == name else title
            lines.append(f"| {name} | {own_model} | {_range(means, 4)} | {difference} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _of_sums(runs: Mapping[str, list[Trained]], held_out: Sequence[Rated]) -> str:
    """The mean of three attributes: by the joint distribution, as if they were independent, and by a model of it."""
    weights = dict.fromkeys(READERS, 1 / len(READERS))
    means = [np.array(means_of(rated)) for rated in held_out]
    joints = [run.joint(READERS) for run in runs[JOINT]]
    independent = [JointRewardDistribution(of.location, of.scale, None, READERS) for of in joints]
    models = {
        f"{JOINT}, weighted sum": [of.project(weights) for of in joints],
        f"{JOINT}, weighted sum if they were independent": [of.project(weights) for of in independent],
        f"a model of {SCALAR}": [run.rewards() for run in runs[SCALAR]],
    }
    lines = ["| mean of the three attributes | μ | σ | σ, corrected |", "| --- | ---: | ---: | ---: |"]
    for title, rewards in models.items():
        lines.append(f"| {title} | {' | '.join(_range(of) for of in _rank_correlations(rewards, means))} |")
    return "\n".join(lines)


def _of_correlations(runs: Mapping[str, list[Trained]], held_out: Sequence[Rated]) -> str:
    """How ratings of the same answer by the same people correlate: those of people, and those that a model draws."""
    observed = _correlation([np.array([_given(rated, name) for name in READERS]).T for rated in held_out])
    drawn, latent = [], []
    for seed, run in enumerate(runs[JOINT]):
        joint = run.joint(READERS)
        generator = torch.Generator().manual_seed(seed)
        errors = torch.stack([run.tensors[f"{name}/error"] for name in READERS], dim=1)
        level = errors * torch.randn(errors.shape, generator=generator, dtype=torch.float64)
        rewards = joint.sample((max(rated.readers for rated in held_out),), generator) + level
        columns = [
            torch.searchsorted(run.tensors[f"{name}/thresholds"], rewards[..., place].contiguous())
            for place, name in enumerate(READERS)
        ]
        ratings = torch.stack(columns, dim=-1).numpy()  # [R, N, A]
        drawn.append(_correlation([ratings[: rated.readers, n] for n, rated in enumerate(held_out)]))
        latent.append(joint.correlation.numpy())
    lines = ["| people's ratings | observed | drawn from the model | of the rewards |", "| --- | ---: | ---: | ---: |"]
    for a in range(len(READERS)):
        for b in range(a):
            cells = [_range([matrix[a, b] for matrix in matrices]) for matrices in (drawn, latent)]
            lines.append(f"| {READERS[b]}, {READERS[a]} | {observed[a, b]:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _given(rated: Rated, name: str) -> np.ndarray:
    return np.array([rating for rating in rated.ratings[name] if rating is not None], dtype=float)


def _counts(ratings: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy((np.stack([(r[:, None] == RATINGS).sum(axis=0) for r in ratings])).astype(float))


def _log_likelihood(
    rewards: RewardDistribution, tensors: Mapping[str, torch.Tensor], place: str, counts: torch.Tensor
) -> np.ndarray:
    """Log-likelihood of each text's ratings, in nats."""
    return rating_log_likelihood(rewards, counts, tensors[f"{place}/thresholds"]).numpy()


def _difference(ours: np.ndarray, theirs: np.ndarray, weight: np.ndarray, groups: np.ndarray) -> str:
    """Difference of sums `(S, N)` per weight `(N,)`, as a mean over seeds, with an interval over the groups."""
    difference = (ours - theirs).mean(axis=0)
    counts = resamples(groups, DRAWS)
    low, high = interval((counts @ difference) / (counts @ weight))
    return f"{difference.sum() / weight.sum():+.4f} ({low:+.4f}, {high:+.4f})"


def _rank_correlations(models: Sequence[RewardDistribution], ratings: Sequence[np.ndarray]) -> list[list[float]]:
    """Of μ with people's mean rating, and of σ with their standard deviation, as it is and corrected, by model."""
    means, deviations = np.array([r.mean() for r in ratings]), np.array([r.std(ddof=1) for r in ratings])
    halves = spreads_of_halves(ratings)
    of_means, of_deviations, corrected = [], [], []
    for rewards in models:
        of_means.append(spearman(rewards.location.numpy(), means))
        scale = rewards.scale.numpy()
        of_deviations.append(np.nan if is_constant(scale) else spearman(scale, deviations))
        corrected.append(np.nan if is_constant(scale) else float(rater_correlations(scale[None], halves)[0][0]))
    return [of_means, of_deviations, corrected]


def _correlation(ratings: Sequence[np.ndarray]) -> np.ndarray:
    """Correlation matrix of deviations from each answer's mean, of ratings `(R, A)` by answer."""
    products = sum(products_of_ratings(torch.from_numpy(of.astype(float))[None])[0][0] for of in ratings)
    matrix = torch.as_tensor(products).numpy()
    deviation = np.sqrt(np.diag(matrix))
    return matrix / deviation / deviation[:, None]


def _range(values: Sequence[float], digits: int = 3) -> str:
    if np.isnan(values).any():
        constant = int(np.isnan(values).sum())
        rest = [value for value in values if not np.isnan(value)]
        shown = f"; others {', '.join(f'{value:.{digits}f}' for value in rest)}" if rest else ""
        return f"constant in {constant} of {len(values)}{shown}"
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


# Overall comparisons


def added_table(args: argparse.Namespace) -> str:
    """Overall comparisons with and without ratings of attributes.

    Args:
        args (`argparse.Namespace`):
            Arguments of the command line.

    Returns:
        `str`: A table.
    """
    texts, held_out = read_texts(args.attribute_ratings, "train"), read_texts(args.attribute_ratings, "test")
    to_score = [rated.text for rated in held_out]
    first, second = _votes(held_out)
    kinds: dict[str, Sequence[str]] = {"comparisons": (), "comparisons and ratings": READERS}
    right: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    losses: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    weights = []
    for seed in args.seeds or SEEDS:
        pairs = draw_pairs(texts, args.pairs, seed)
        for kind, attributes in kinds.items():
            run = trained(args, kind.replace(" ", "-"), seed, compared_rows(pairs, seed, attributes), to_score)
            rewards = run.rewards()
            difference = rewards.location[first] - rewards.location[second]
            right[kind].append(((difference > 0) + 0.5 * (difference == 0)).double().numpy())
            losses[kind].append(-rewards[first].log_prob_greater(rewards[second]).double().numpy())
            if attributes:
                weights.append(run.figures["weights"])
    lines = ["| trained on | accuracy | NLL |", "| --- | ---: | ---: |"]
    for kind in kinds:
        cells = [_range([of.mean() for of in figures[kind]], 4) for figures in (right, losses)]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    groups = np.stack([first, second], axis=1)
    cells = [
        _difference(
            np.stack(figures["comparisons and ratings"]), np.stack(figures["comparisons"]), np.ones(len(first)), groups
        )
        for figures in (right, losses)
    ]
    lines.append(f"| difference (95 %) | {' | '.join(cells)} |")
    learned = ", ".join(f"{name} {_range([of_seed[name] for of_seed in weights])}" for name in READERS)
    said = ", ".join(f"{name} {weight:g}" for name, weight in CHOICE_WEIGHTS.items())
    return "\n".join(lines) + f"\n\nWeights that people used: {said}. Weights that were learned: {learned}."


def _votes(held_out: Sequence[Rated]) -> tuple[np.ndarray, np.ndarray]:
    """Texts that win and lose held-out votes, by their positions."""
    generator = np.random.default_rng(0)
    places = generator.integers(len(held_out), size=(VOTES, 2))
    scores = np.array(
        [
            [held_out[at].of_person(int(generator.integers(held_out[at].readers)), CHOICE_WEIGHTS) for at in pair]
            for pair in places.tolist()
        ]
    )
    decided = (scores[:, 0] != scores[:, 1]) & (places[:, 0] != places[:, 1])
    places, first_wins = places[decided], (scores[:, 0] > scores[:, 1])[decided]
    winner = np.where(first_wins, places[:, 0], places[:, 1])
    return winner, np.where(first_wins, places[:, 1], places[:, 0])


# Cost


def cost_table(args: argparse.Namespace) -> str:
    """Time and memory of a training with three attributes and with one, in alternation.

    Args:
        args (`argparse.Namespace`):
            Arguments of the command line.

    Returns:
        `str`: A table.
    """
    pairs = draw_pairs(read_texts(args.attribute_ratings, "train"), COST_PAIRS, 0)
    rows = {ONE: rated_rows(pairs, READERS[:1]), JOINT: rated_rows(pairs, READERS)}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    for repeat in range(COST_REPEATS):
        for name, of_name in rows.items():
            run = Run(of_name, [], args.model, args.dtype, repeat, str(args.output / "cost"))
            figures[name].append(in_fresh_process(train, run))
    lines = ["| model | seconds | peak GiB |", "| --- | ---: | ---: |"]
    for name, of_runs in figures.items():
        cells = [_range([of_run[figure] for of_run in of_runs], 2) for figure in ("seconds", "peak_gib")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    ratios = [
        np.median([ours[figure] / one[figure] for ours, one in zip(figures[JOINT], figures[ONE], strict=True)])
        for figure in ("seconds", "peak_gib")
    ]
    return "\n".join([*lines, f"| median ratio | {ratios[0]:.3f} | {ratios[1]:.3f} |"])


STUDIES: dict[str, Callable[[argparse.Namespace], str]] = {
    "ratings": ratings_table,
    "added": added_table,
    "cost": cost_table,
}


def main(argv: list[str] | None = None) -> None:
    """Runs studies as the command line says."""
    parser = study_parser("python -m benchmarks.attributes", __doc__, STUDIES, seeds="0, 1 and 2")
    parser.add_argument(
        "--attribute_ratings",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="Folder of the texts and their ratings.",
    )
    parser.add_argument("--pairs", type=int, default=PAIRS, help="Pairs of training texts (default: %(default)s).")
    args = parser.parse_args(argv)
    write_tables(args, STUDIES)


if __name__ == "__main__":
    try:
        main()
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
