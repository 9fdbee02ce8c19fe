"""Check that memory does not grow over a long run: a million streamed pairs through a small model, in 2,000 steps.

Run as:

    MALLOC_ARENA_MAX=1 python -m benchmarks.long_run --output runs/long    # about half an hour on one core

Pairs of rated tweets are drawn without end, streamed, tokenized, grouped by length and trained on by
`DiscoRewardTrainer` like any stream. The model is random, with two layers and the tokenizer of a small LM. It is saved
and evaluated after every quarter. The memory of the process (`RssAnon`) is measured after every step, and garbage is
collected every ten steps. The run ends with a table and a chart. It fails if the mean memory of the last quarter
exceeds that of the second by more than `--allowed` MiB.
"""

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from disco_trl import DiscoRewardConfig, DiscoRewardTrainer

from .downloads import small_chat_lm
from .human_ratings import load_ratings
from .peak_memory import held_bytes
from .speed_train import quieten


MIB = 2**20


def pairs_without_end(texts: Sequence[str], seed: int) -> Iterator[dict[str, str]]:
    """Random pairs of texts, of which the longer is chosen."""
    generator = np.random.default_rng(seed)
    while True:
        for first, second in generator.integers(len(texts), size=(1024, 2)):
            rejected, chosen = sorted((texts[first], texts[second]), key=len)
            if chosen != rejected:
                yield {"chosen": chosen, "rejected": rejected}


class Watch(TrainerCallback):
    """Records the memory of the process after each step, in MiB."""

    def __init__(self) -> None:
        self.held: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures the memory, after collecting garbage every ten steps."""
        if state.global_step % 10 == 0:
            gc.collect()
        self.held.append(held_bytes() / MIB)


def train(args: argparse.Namespace) -> tuple[np.ndarray, float]:
    """Trains the model. Returns the memory after each step in MiB, and the pairs per second."""
    lm = str(small_chat_lm())
    texts = tuple(row.text for row in load_ratings("tweets"))  # `from_generator` takes a list for one of shards.
    tokenizer = AutoTokenizer.from_pretrained(lm)
    config = AutoConfig.from_pretrained(
        lm, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    stream = IterableDataset.from_generator(pairs_without_end, gen_kwargs={"texts": texts, "seed": 0})
    held_out = Dataset.from_list([row for row, _ in zip(pairs_without_end(texts, 1), range(500), strict=False)])
    watch = Watch()
    trainer = DiscoRewardTrainer(
        AutoModelForSequenceClassification.from_config(config),
        DiscoRewardConfig(
            str(args.output),
            max_steps=args.pairs // args.batch_size,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            train_sampling_strategy="group_by_length",
            learning_rate=1e-3,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            eval_strategy="steps",
            eval_steps=0.25,
            save_steps=0.25,
            save_total_limit=1,
            epistemic=True,
            report_to="none",
        ),
        train_dataset=stream,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[watch],
    )
    start = time.perf_counter()
    trainer.train()
    return np.array(watch.held), args.pairs / (time.perf_counter() - start)


def main() -> None:
    """Trains, reports the memory, and fails if it grew."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pairs", type=int, default=1_000_000, help="Number of pairs to train on (default: %(default)s)."
    )
    parser.add_argument(
        "--batch-size", type=int, default=500, help="Number of pairs in a batch (default: %(default)s)."
    )
    parser.add_argument(
        "--allowed", type=float, default=50.0, help="Growth in MiB that is not a failure (default: %(default)s)."
    )
    parser.add_argument("--output", type=Path, required=True, help="Folder for the checkpoint, table and chart.")
    args = parser.parse_args()
    quieten()
    held, rate = train(args)
    quarters = [part.mean() for part in np.array_split(held, 4)]
    growth = quarters[3] - quarters[1]
    cells = [f"{args.pairs:,}", f"{len(held):,}", f"{rate:,.0f}", f"{held[0]:,.0f}"]
    cells += [f"{mean:,.0f}" for mean in quarters] + [f"{held.max():,.0f}", f"{growth:+.1f}"]
    heads = ["pairs", "steps", "pairs/s", "MiB after step 1", *(f"quarter {n}" for n in (1, 2, 3, 4)), "most"]
    heads.append("quarter 4 less quarter 2")
    table = "\n".join([f"| {' | '.join(heads)} |", "|" + " ---: |" * len(heads), f"| {' | '.join(cells)} |"])
    (args.output / "memory.md").write_text(table + "\n", encoding="utf-8")
    print(table)

    figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
    axis.plot(np.arange(1, len(held) + 1) * args.batch_size, held, color="#2463b4", linewidth=1)
    axis.set(xlabel="pairs trained on", ylabel="memory held, MiB", ylim=(0, None))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.output / "memory.png", dpi=160)
    if growth > args.allowed:
        sys.exit(f"The last quarter held {growth:.1f} MiB more than the second")


if __name__ == "__main__":
    try:
        main()
    except (ConnectionError, ValueError) as error:
        sys.exit(str(error))
