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
from .speed_report import markdown, spread
from .speed_train import SteppedTrainer, adapter, epoch_batches, quieten, shared_settings


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


def run_dpo(args: argparse.Namespace) -> dict[str, Any]:
    """Command `dpo`. Returns what the report needs of each variant."""
    rows, lengths = load_rows(args)
    print(f"{len(rows):,} pairs, {lengths.unique / len(rows):.0f} unique tokens in each on average", flush=True)
    names = [name for name in VARIANTS if name in {BASELINE, *args.variants}]
    surveys = {}
    for name in tqdm(names, desc="memory, in processes of their own", unit="variant"):
        surveys[name] = in_fresh_process(survey, name, rows, lengths, args)

    passes = args.rounds + 1
    noted, stepped = {}, {}
    for name in names:
        own = surveys[name]["batches"]
        trainer = make_trainer(name, rows, args, max_steps=len(own) * passes)
        noted[name] = replay(trainer, own * passes)
        stepped[name] = SteppedTrainer(trainer)
    seconds: dict[str, list[float]] = {name: [0.0] * passes for name in names}
    with tqdm(total=args.steps * passes * len(names), desc="training", unit="step") as bar:
        for round_ in range(passes):
            for _ in range(args.steps):
                for name, runner in stepped.items():
                    bar.set_postfix_str(("warm-up, " if round_ == 0 else "") + VARIANTS[name].label)
                    seconds[name][round_] += runner.step()
                    bar.update()
    for runner in stepped.values():
        runner.close()

    def losses(name: str) -> list[float]:
        return [entry["loss"] for entry in stepped[name].trainer.state.log_history if "loss" in entry]

    found: dict[str, Any] = {}
    for name in names:
        of_round = noted[name][: args.steps]
        pairs = [number for numbers, _ in of_round for number in numbers]
        rates = [len(pairs) / taken for taken in seconds[name][1:]]
        found[name] = {
            "label": VARIANTS[name].label,
            "pairs_per_second": rates,
            "processed_per_unique": sum(tokens for _, tokens in of_round) / lengths[pairs].unique,
            "peak_bytes": surveys[name]["peak_bytes"],
            "loss_difference": max(abs(a - b) for a, b in zip(losses(name), losses(BASELINE), strict=True))
            if name in SAME_LOSS
            else None,
        }
    for of_variant in found.values():
        theirs = found[BASELINE]["pairs_per_second"]
        of_variant["times_trl"] = [a / b for a, b in zip(of_variant["pairs_per_second"], theirs, strict=True)]
    return {"pairs": len(rows), "unique_tokens": lengths.unique, "variants": found}


def dpo_table(result: dict[str, Any]) -> str:
    """Table of `dpo`: one row for each variant, with notes on the columns."""
    settings, variants = result["settings"], result["variants"]
    rows = []
    for variant in variants.values():
        difference = variant["loss_difference"]
        rows.append(
            {
                "": variant["label"],
                "pairs/s": spread(variant["pairs_per_second"]),
                "times TRL": spread(variant["times_trl"]),
                "processed/unique": f"{variant['processed_per_unique']:.2f}",
                "memory, GiB": f"{variant['peak_bytes'] / 2**30:.2f}",
                "of TRL's": f"{variant['peak_bytes'] / variants[BASELINE]['peak_bytes']:.2f}",
                "loss − TRL's, at most": "" if difference is None else f"{difference:.4f}",
            }
        )
    weights = "LoRA of rank 16" if settings["lora"] else "all weights trained"
    checkpointing = "on" if settings["gradient_checkpointing"] else "off"
    notes = (
        f"Batches of {settings['batch_size']} pairs, {weights}, {settings['dtype']}, gradient checkpointing "
        f"{checkpointing}. {settings['steps']} batches that stand for an epoch of {result['pairs']:,} pairs, "
        f"{settings['rounds']} times over, a step of each variant in turn, after once through all of them to warm up. "
        "In brackets: the range over the rounds. Unique: each prompt counted once, no padding. Memory: the peak "
        "of two steps on the largest batch, above the models at rest and without the state of the optimizer. A "
        "reference that is precomputed is so before the steps that are timed."
    )
    return f"{markdown(rows)}\n\n{notes}"
