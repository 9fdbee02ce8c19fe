"""The command `dpo` of `benchmarks.speed`: TRL's DPO trainer and ours take turns step by step on the same pairs.

The rows are tokenized by the trainers themselves. As in `train`, a step is the whole loop, each trainer runs in a
thread of its own that waits for its turn, and the batches that are timed stand for those of an epoch.
"""

import argparse
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer

from disco_trl import DiscoDPOConfig, DiscoDPOTrainer
from disco_trl.data.files import choose_split, load_preferences
from disco_trl.data.tokenization import tokenize_answers

from .peak_memory import PeakMemory, in_fresh_process
from .speed_counts import Pair, PairLengths, choose_batches
from .speed_train import adapter, epoch_batches, quieten, shared_settings, sweep, take_turns


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes:
        label (`str`):
            Name in the report.
        trainer (`type`):
            TRL's class or ours.
        options (`dict`):
            Options of its configuration, beyond those that all variants share.
    """

    label: str
    trainer: type[DPOTrainer]
    options: dict[str, Any] = field(default_factory=dict)


PRECOMPUTED: dict[str, Any] = {"precompute_ref_log_probs": True}
# transformers drops the column `length`, which its sampler needs, unless all columns are kept.
GROUPED: dict[str, Any] = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
VARIANTS = {
    "trl": Variant("TRL, defaults", DPOTrainer),
    "trl-best": Variant("TRL, length grouping, precomputed reference", DPOTrainer, {**GROUPED, **PRECOMPUTED}),
    "plain": Variant("disco, prefix sharing off", DiscoDPOTrainer, {"prefix_sharing": False}),
    "default": Variant("disco, defaults", DiscoDPOTrainer),
    "best": Variant("disco, precomputed reference", DiscoDPOTrainer, PRECOMPUTED),
}
BASELINE = "trl"
SAME_LOSS = ("plain", "default")
"""Variants with TRL's batches, whose losses have to equal TRL's up to rounding."""


def load_rows(args: argparse.Namespace) -> tuple[list[dict[str, Any]], PairLengths]:
    """Reads the pairs whose sides are no longer than `args.max_length`, and the lengths of their sides."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows: list[dict[str, Any]] = []
    pairs: list[Pair] = []
    dataset = choose_split(load_preferences(args.dataset, argument="--dataset"), args.split, "--dataset")
    for row in tqdm(dataset, desc="tokenizing", unit="pair", leave=False):
        pair = tokenize_answers(row, tokenizer)
        if pair[0] != pair[1] and max(map(len, pair)) <= (args.max_length or float("inf")):
            kept = {name: row[name] for name in ("prompt", "chosen", "rejected") if name in row}
            rows.append({**kept, "number": len(rows), "length": max(map(len, pair))})
            pairs.append((pair[0], pair[1]))
    return rows[: args.pairs], PairLengths.of(pairs[: args.pairs])


def make_trainer(name: str, rows: list[dict[str, Any]], args: argparse.Namespace, max_steps: int = -1) -> Any:
    """Creates the trainer of a variant, on a new model."""
    variant = VARIANTS[name]
    settings = {**shared_settings(args, max_steps), **variant.options}
    config_class = DPOConfig if variant.trainer is DPOTrainer else DiscoDPOConfig
    with tempfile.TemporaryDirectory() as folder:  # nothing is saved
        trainer = variant.trainer(
            args.model,
            args=config_class(folder, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=adapter(args, "CAUSAL_LM"),
        )
    if len(trainer.train_dataset) != len(rows):  # type: ignore[arg-type]
        raise RuntimeError(f"{variant.label} dropped {len(rows) - len(trainer.train_dataset)} pairs")  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    return trainer


def replay(trainer: Any, batches: list[list[int]]) -> list[tuple[list[int], int]]:
    """Makes a trainer train on the given batches. Returns the list in which its collator notes the pairs of each, and
    the tokens that go through the layers of a model.
    """
    noted: list[tuple[list[int], int]] = []
    collate = trainer.data_collator

    def note_and_collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        noted.append(([row["number"] for row in rows], batch.get("forest_ids", batch["input_ids"]).numel()))
        return batch

    loader: DataLoader = DataLoader(trainer.train_dataset, batch_sampler=batches, collate_fn=note_and_collate)
    trainer.get_train_dataloader = lambda: loader
    return noted


def survey(name: str, rows: list[dict[str, Any]], lengths: PairLengths, args: argparse.Namespace) -> dict[str, Any]:
    """Chooses batches that stand for an epoch, and measures memory. It has to be called in a process of its own.

    Returns:
        `dict`: `batches`, and `peak_bytes`: of two steps on the largest batch, above what the models take at rest and
        without the state of the optimizer.
    """
    quieten()
    trainer = make_trainer(name, rows, args, max_steps=2)
    batches = epoch_batches(trainer)
    largest = max(batches, key=lambda batch: lengths[batch].padded)
    replay(trainer, [largest, largest])
    with PeakMemory(on_gpu=torch.cuda.is_available()) as memory:
        trainer.train()
    state = sum(
        tensor.numel() * tensor.element_size()
        for of_parameter in trainer.optimizer.state.values()
        for tensor in of_parameter.values()
        if torch.is_tensor(tensor)
    )
    chosen = choose_batches(batches, lengths, args.steps, args.seed)
    return {"batches": chosen, "peak_bytes": memory.peak_bytes - state}


@dataclass
class Measured:
    """Measurements of a variant.

    Attributes:
        seconds (`list[float]`):
            Duration of each round. The first is the warm-up.
        batches (`list[tuple[list[int], int]]`):
            Of each step of a round, the pairs, and the tokens that go through the layers of a model.
        losses (`list[float]`):
            Loss of each step, over all rounds.
    """

    seconds: list[float]
    batches: list[tuple[list[int], int]]
    losses: list[float]

    def figures(self, name: str, baseline: "Measured", lengths: PairLengths) -> dict[str, Any]:
        """What the report needs of this variant."""
        pairs = [number for numbers, _ in self.batches for number in numbers]
        of_baseline = [number for numbers, _ in baseline.batches for number in numbers]
        rates = [len(pairs) / taken for taken in self.seconds[1:]]
        theirs = [len(of_baseline) / taken for taken in baseline.seconds[1:]]
        differences = [abs(a - b) for a, b in zip(self.losses, baseline.losses, strict=True)]
        return {
            "label": VARIANTS[name].label,
            "pairs_per_second": rates,
            "times_trl": [own / other for own, other in zip(rates, theirs, strict=True)],
            "processed_per_unique": sum(tokens for _, tokens in self.batches) / lengths[pairs].unique,
            "loss_difference": max(differences) if name in SAME_LOSS else None,
        }


def alternate(
    trainers: dict[str, Any], batches: dict[str, list[list[int]]], args: argparse.Namespace, description: str
) -> dict[str, Measured]:
    """Trains all variants at the same time, alternating step by step: once through the batches to warm up, then
    `args.rounds` times, timed.

    Args:
        trainers (`dict[str, Any]`):
            Trainer of each variant, of as many steps as there are batches in all rounds.
        batches (`dict[str, list[list[int]]]`):
            For each variant, the pairs of each batch of a round. All have the same number of batches.
        args (`argparse.Namespace`):
            Settings of the command line.
        description (`str`):
            Title of the progress bar.

    Returns:
        `dict[str, Measured]`: Measurements by variant.
    """
    passes, steps = args.rounds + 1, len(batches[BASELINE])
    noted = {name: replay(trainer, batches[name] * passes) for name, trainer in trainers.items()}
    labels = {name: VARIANTS[name].label for name in trainers}
    seconds = take_turns(trainers, labels, steps, passes, description)
    return {
        name: Measured(
            [sum(of_round) for of_round in seconds[name]],
            noted[name][:steps],
            [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        )
        for name, trainer in trainers.items()
    }


def run_dpo(args: argparse.Namespace) -> dict[str, Any]:
    """Command `dpo`. Returns what the report needs of each variant."""
    rows, lengths = load_rows(args)
    print(f"{len(rows):,} pairs, {lengths.unique / len(rows):.0f} unique tokens in each on average", flush=True)
    names = [name for name in VARIANTS if name in {BASELINE, *args.variants}]
    surveys = {}
    for name in tqdm(names, desc="memory, in processes of their own", unit="variant"):
        surveys[name] = in_fresh_process(survey, name, rows, lengths, args)
    batches = {name: surveys[name]["batches"] for name in names}
    steps = len(batches[BASELINE]) * (args.rounds + 1)
    trainers = {name: make_trainer(name, rows, args, max_steps=steps) for name in names}
    measured = alternate(trainers, batches, args, "training")
    found = {
        name: measured[name].figures(name, measured[BASELINE], lengths) | {"peak_bytes": surveys[name]["peak_bytes"]}
        for name in names
    }
    return {"pairs": len(rows), "unique_tokens": lengths.unique, "variants": found}


def measure_defaults(
    batches: list[list[int]], pairs: list[Pair], args: argparse.Namespace, description: str
) -> dict[str, Any]:
    """Measures TRL's defaults and ours on the same batches of token ids. Returns what the report needs of each."""
    words = [{"prompt": "a", "chosen": "b", "rejected": "c", "number": 0, "length": 2}]  # TRL tokenizes words only.
    lengths = PairLengths.of(pairs)
    dataset = Dataset.from_list(
        [
            {
                "prompt_ids": chosen[:shared],
                "chosen_ids": chosen[shared:],
                "rejected_ids": rejected[shared:],
                "number": number,
            }
            for number, ((chosen, rejected), shared) in enumerate(zip(pairs, lengths.shared.tolist(), strict=True))
        ]
    )
    trainers = {}
    for name in (BASELINE, "default"):
        trainers[name] = make_trainer(name, words, args, max_steps=len(batches) * (args.rounds + 1))
        trainers[name].train_dataset = dataset
    measured = alternate(trainers, dict.fromkeys(trainers, batches), args, description)
    return {name: of_variant.figures(name, measured[BASELINE], lengths) for name, of_variant in measured.items()}


def sweep_dpo(args: argparse.Namespace) -> dict[str, Any]:
    """Command `dpo --sweep`. Returns what the report needs of each setting."""
    return sweep(args, measure_defaults)
