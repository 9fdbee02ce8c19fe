"""Bradley–Terry (TRL's own trainer) against the reward families, at one budget, over seeds.

On votes drawn from real people's ratings, where the truth can be looked up:

    python scripts/compare_families.py --votes 2000 --seeds 0 1 2 --output runs/compare-tweets

On any preference dataset with the splits `train` and `test` (a Hub id, or a folder with train.jsonl and test.jsonl):

    python scripts/compare_families.py --dataset path/to/folder --max_length 256 --output runs/compare-pairs

Every run of one seed sees the same pairs in the same order with the same LoRA initialisation. A finished run is kept
in `results.jsonl` and not repeated. The settings are fixed in advance; nothing is chosen by the test split.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from human_ratings import as_preferences, draw_votes, load_ratings, small_chat_lm, split_by_text
from peft import LoraConfig
from quickstart import HeldOut, evaluate, training_settings
from transformers import AutoTokenizer
from trl import RewardConfig, RewardTrainer

from disco_trl import DiscoRewardConfig, DiscoRewardTrainer
from disco_trl.scoring import score
from disco_trl.tokenization import tokenize, tokenize_pair
from disco_trl.train import choose_split, load_preferences


BRADLEY_TERRY = "bradley-terry"
VARIANTS = (BRADLEY_TERRY, "normal", "cauchy", "logistic")


def train(variant: str, rows: list[dict[str, Any]], seed: int, model: str, args: argparse.Namespace) -> Any:
    """A trainer that has trained `variant` for one epoch of `rows`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [{**row, "length": max(map(len, tokenize_pair(row, tokenizer)))} for row in rows]
    settings = {
        **training_settings(seed, batch_size=args.batch_size),
        "output_dir": str(args.output / f"{variant}-{seed}"),
        "model_init_kwargs": {"dtype": "bfloat16"},
        "max_length": args.max_length,
    }
    peft_config = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear")
    common = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer, "peft_config": peft_config}
    trainer: RewardTrainer
    if variant == BRADLEY_TERRY:
        trainer = RewardTrainer(model, RewardConfig(**settings), **common)
    else:
        trainer = DiscoRewardTrainer(model, DiscoRewardConfig(reward_family=variant, **settings), **common)
    trainer.train()
    return trainer


def fits(row: dict[str, Any], tokenizer: Any, max_length: int | None) -> bool:
    """Whether TRL's length filter would keep the row; the test pairs are held to it as well."""
    return max_length is None or max(map(len, tokenize_pair(row, tokenizer))) <= max_length


def table(results: list[dict[str, Any]]) -> str:
    """Markdown table of mean and range over seeds."""
    names = [name for name in results[0] if name not in ("variant", "seed")]
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for variant in VARIANTS:
        runs = [result for result in results if result["variant"] == variant]
        cells = []
        for name in names if runs else []:
            values = [run[name] for run in runs]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        if cells:
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train and evaluate as the command line says, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder (default: a small chat LM from the package index)")
    parser.add_argument("--dataset", help="preference dataset with splits train and test (default: votes on tweets)")
    parser.add_argument("--votes", type=int, default=2000, help="training votes, without --dataset")
    parser.add_argument("--max_pairs", type=int, help="with --dataset: train on that many pairs that fit, at random")
    parser.add_argument("--max_length", type=int, help="leave out pairs with a side of more tokens")
    parser.add_argument("--batch_size", type=int, default=16, help="pairs in a batch")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    base_model = args.model or str(small_chat_lm())
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    if args.dataset:
        dataset = load_preferences(args.dataset)
        pairs, test_pairs = (
            [row for row in choose_split(dataset, split, "--dataset") if fits(row, tokenizer, args.max_length)]
            for split in ("train", "test")
        )
        # Shuffled first: files are often sorted by where their pairs come from.
        pairs = [pairs[index] for index in np.random.default_rng(0).permutation(len(pairs))[: args.max_pairs]]
        sides = [ids for row in test_pairs for ids in tokenize_pair(row, tokenizer)]
        held_out = HeldOut(sides, pairs=np.arange(len(sides)).reshape(-1, 2))
    else:
        rated, test = split_by_text(load_ratings("tweets"))
        held_out = HeldOut([tokenize(tokenizer, row.text) for row in test], draw_votes(test, 30_000, seed=0), test)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "results.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for seed in args.seeds:
        rows = pairs if args.dataset else as_preferences(rated, draw_votes(rated, args.votes, seed + 1))
        for variant in args.variants:
            if any(result["variant"] == variant and result["seed"] == seed for result in done):
                continue
            print(f"{variant}, seed {seed}: {len(rows)} pairs", flush=True)
            start = time.perf_counter()
            trainer = train(variant, rows, seed, base_model, args)
            minutes = (time.perf_counter() - start) / 60
            # In training accelerate runs the model in bfloat16; it is measured as it will be loaded, in its own dtype.
            model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            metrics = evaluate(score(model, held_out.sequences), held_out)
            del metrics["reliability"]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            done.append({"variant": variant, "seed": seed, **metrics, "train_minutes": minutes, "peak_gib": peak})
            with file.open("a") as stream:
                stream.write(json.dumps(done[-1]) + "\n")
    print(f"\n{len(held_out.pairs)} held-out pairs\n\n{table(done)}")


if __name__ == "__main__":
    main()
