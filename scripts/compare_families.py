"""Bradley–Terry (TRL's own trainer) against the reward families, at one budget, over seeds.

On what was drawn from real people's ratings, where the truth can be looked up: single votes, ten votes on each pair,
or ten ratings of each text:

    python scripts/compare_families.py --pairs 2400 --seeds 0 1 2 --output runs/compare-tweets
    python scripts/compare_families.py --said votes --variants bradley-terry normal --output runs/compare-votes

On any preference dataset with the splits `train` and `test` (a Hub id, or a folder with train.jsonl and test.jsonl);
with a column `preference_probability` the NLL is the cross-entropy to these soft labels:

    python scripts/compare_families.py --dataset path/to/folder --max_length 256 --output runs/compare-pairs

With `--block 16 32` each step is 32 pairs among 16 texts, of which each runs once: many times the votes for the time.

Every run of one seed sees the same pairs in the same order with the same LoRA initialisation. TRL's trainer reads
forced choices alone, and runs each side of each pair; where more was said, or pairs come in blocks, Bradley–Terry is
its likelihood in our trainer (the logistic family with every scale at 1/√2). A finished run is kept in `results.jsonl`
and not repeated. The settings are fixed in advance; nothing is chosen by the test split.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from human_ratings import (
    SOURCES,
    as_preferences,
    draw_judged_pairs,
    draw_votes,
    load_ratings,
    small_chat_lm,
    split_by_text,
)
from peft import LoraConfig
from quickstart import HeldOut, evaluate, training_settings
from transformers import AutoTokenizer
from trl import RewardConfig, RewardTrainer

from disco_trl import DiscoRewardConfig, DiscoRewardTrainer
from disco_trl.distributions import FAMILIES
from disco_trl.evaluation import paired_bootstrap
from disco_trl.judgements import has_judgements
from disco_trl.scoring import score
from disco_trl.tokenization import tokenize, tokenize_pair
from disco_trl.train import choose_split, load_preferences


BRADLEY_TERRY = "bradley-terry"
VARIANTS = (BRADLEY_TERRY, *FAMILIES)


def train(variant: str, rows: list[dict[str, Any]], seed: int, model: str, args: argparse.Namespace) -> Any:
    """A trainer that has trained `variant` for one epoch of `rows`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    is_trls = variant == BRADLEY_TERRY and not has_judgements(rows[0]) and not args.block
    if is_trls:
        rows = [{**row, "length": max(map(len, tokenize_pair(row, tokenizer)))} for row in rows]
    settings = {
        **training_settings(seed, batch_size=args.batch_size, by_length=is_trls),
        "output_dir": str(args.output / f"{variant}-{seed}"),
        "model_init_kwargs": {"dtype": "bfloat16"},
        "max_length": args.max_length,
    }
    if args.block:
        settings |= {
            "per_device_train_batch_size": args.block[1],
            "gradient_accumulation_steps": 1,
            "train_sampling_strategy": "sequential",
        }
    peft_config = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear")
    common = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer, "peft_config": peft_config}
    trainer: RewardTrainer
    if is_trls:
        trainer = RewardTrainer(model, RewardConfig(**settings), **common)
    elif variant == BRADLEY_TERRY:
        config = DiscoRewardConfig(reward_family="logistic", fixed_scale=2**-0.5, location_error=False, **settings)
        trainer = DiscoRewardTrainer(model, config, **common)
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
            values = [run[name] for run in runs if run[name] is not None]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}" if values else "none")
        if cells:
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(output: Path, results: list[dict[str, Any]]) -> str:
    """What each variant's NLL and accuracy are beside Bradley–Terry's, by paired bootstrap over pairs and seeds."""
    lines = []
    for variant in VARIANTS[1:]:
        seeds = [
            result["seed"]
            for result in results
            if result["variant"] == variant
            and any((other["variant"], other["seed"]) == (BRADLEY_TERRY, result["seed"]) for other in results)
        ]
        if not seeds:
            continue
        for name in ("nll", "accuracy"):
            ours, theirs = (
                np.stack([np.load(output / f"{which}-{seed}.npz")[name] for seed in seeds])
                for which in (variant, BRADLEY_TERRY)
            )
            mean, low, high = paired_bootstrap(ours, theirs)
            lines.append(f"{variant} − Bradley–Terry, {name}: {mean:+.4f} ({low:+.4f} to {high:+.4f}), seeds {seeds}")
    return "\n".join(lines)


def main() -> None:
    """Train and evaluate as the command line says, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder (default: a small chat LM from the package index)")
    parser.add_argument("--dataset", help="preference dataset with splits train and test (default: rated texts)")
    parser.add_argument("--source", choices=SOURCES, default="tweets", help="rated texts, without --dataset")
    parser.add_argument(
        "--said",
        choices=("choices", "votes", "ratings"),
        default="choices",
        help="what people say of a pair of rated texts: a forced choice, 10 votes, or 10 ratings of each text",
    )
    parser.add_argument("--pairs", type=int, default=2400, help="training pairs of rated texts")
    parser.add_argument("--block", type=int, nargs=2, metavar=("TEXTS", "PAIRS"), help="of a step of rated texts")
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
        certainty = np.array([row.get("preference_probability", 1.0) for row in test_pairs])
    else:
        certainty = np.array(1.0)
        rated, test = split_by_text(load_ratings(args.source))
        held_out = HeldOut([tokenize(tokenizer, row.text) for row in test], draw_votes(test, 30_000, seed=0), test)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "results.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for seed in args.seeds:
        if args.dataset:
            rows = pairs
        elif args.said == "choices" and not args.block:
            rows = as_preferences(rated, draw_votes(rated, args.pairs, seed + 1))
        else:
            rows = draw_judged_pairs(rated, args.pairs, args.said, seed + 1, block=args.block)
        for variant in args.variants:
            if any(result["variant"] == variant and result["seed"] == seed for result in done):
                continue
            print(f"{variant}, seed {seed}: {len(rows)} pairs", flush=True)
            start = time.perf_counter()
            trainer = train(variant, rows, seed, base_model, args)
            minutes = (time.perf_counter() - start) / 60
            # In training accelerate runs the model in bfloat16; it is measured as it will be loaded, in its own dtype.
            model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            rewards = score(model, held_out.sequences)
            metrics = evaluate(rewards, held_out)
            del metrics["reliability"]
            chosen, rejected = (rewards[side] for side in torch.from_numpy(held_out.pairs).T)
            log_probs = chosen.log_prob_greater(rejected).numpy(), rejected.log_prob_greater(chosen).numpy()
            nll = -(certainty * log_probs[0] + (1 - certainty) * log_probs[1])
            metrics["nll"] = nll.mean().item()
            np.savez(
                args.output / f"{variant}-{seed}.npz",
                nll=nll,
                accuracy=((chosen.location - rejected.location).sign().numpy() + 1) / 2,
                location=rewards.location.numpy(),
                scale=rewards.scale.numpy(),
            )
            error = None if rewards.location_error is None else rewards.location_error[0].item()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            done.append(
                {
                    "variant": variant,
                    "seed": seed,
                    **metrics,
                    "location_error": error,
                    "train_minutes": minutes,
                    "peak_gib": peak,
                }
            )
            with file.open("a") as stream:
                stream.write(json.dumps(done[-1]) + "\n")
    print(f"\n{len(held_out.pairs)} held-out pairs\n\n{table(done)}\n\n{differences(args.output, done)}")


if __name__ == "__main__":
    main()
