"""The command `train` of `benchmarks.speed`: trainers that take turns step by step, and the memory of each, measured
in a process of its own.
"""

import argparse
import gc
import queue
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import RewardConfig, RewardTrainer

from disco_trl import DiscoRewardConfig, DiscoRewardTrainer

from .peak_memory import PeakMemory, in_fresh_process
from .speed_counts import (
    Pair,
    PairLengths,
    attention_flops,
    choose_batches,
    load_pairs,
    matmul_flops_per_token,
    synthetic_pairs,
)


BRADLEY_TERRY: dict[str, Any] = {"reward_family": "logistic", "fixed_scale": 2**-0.5}


@dataclass(frozen=True)
class Variant:
    """A way to train on the same data: a trainer and its options.

    Attributes:
        label (`str`):
            Name in the report.
        trainer (`type`):
            TRL's class or ours.
        options (`dict`):
            Options of its config, beyond those that all variants share.
        has_trl_batches (`bool`):
            Whether its batches have to equal those of TRL's defaults, pair by pair.
        has_trl_loss (`bool`):
            Whether its losses have to equal TRL's up to rounding, on the same batches.
    """

    label: str
    trainer: type[RewardTrainer]
    options: dict[str, Any] = field(default_factory=dict)
    has_trl_batches: bool = False
    has_trl_loss: bool = False


# transformers drops the column `length`, which its sampler needs, unless all columns are kept.
_GROUPED: dict[str, Any] = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
VARIANTS = {
    "trl": Variant("TRL, defaults", RewardTrainer, {}, True, True),
    "trl-grouped": Variant("TRL, length grouping", RewardTrainer, _GROUPED),
    "plain": Variant("disco, all off", DiscoRewardTrainer, {**BRADLEY_TERRY, "prefix_sharing": False}, True, True),
    "grouped": Variant(
        "disco, length grouping alone", DiscoRewardTrainer, {**BRADLEY_TERRY, **_GROUPED, "prefix_sharing": False}
    ),
    "shared": Variant("disco, prefix sharing", DiscoRewardTrainer, BRADLEY_TERRY, True, True),
    "default": Variant("disco, defaults", DiscoRewardTrainer, {}, True),
    "budget": Variant("disco, defaults, token budget", DiscoRewardTrainer),  # the budget comes from the data
}
BASELINE = "trl"


def quieten() -> None:
    """Silences everything but the progress bar."""
    warnings.filterwarnings("ignore", message=".*is deprecated.*")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


# Building a trainer


def shared_settings(args: argparse.Namespace, max_steps: int) -> dict[str, Any]:
    """Settings of the trainers of all variants."""
    return {
        "per_device_train_batch_size": args.batch_size,
        "max_length": None,  # The pairs are filtered already.
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "max_steps": max_steps,
        "bf16": args.dtype != "float32",
        "use_cpu": not torch.accelerator.is_available(),
        "gradient_checkpointing": args.gradient_checkpointing,
        "model_init_kwargs": {"dtype": "bfloat16" if args.dtype == "bfloat16" else "float32"},
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def adapter(args: argparse.Namespace, task_type: str) -> LoraConfig | None:
    """The adapter that is trained, if one is."""
    return LoraConfig(task_type=task_type, r=16, lora_alpha=32, target_modules="all-linear") if args.lora else None


def make_trainer(name: str, pairs: list[Pair], args: argparse.Namespace, max_steps: int = -1) -> Any:
    """Creates the trainer of a variant, on a new model and tokenized pairs (which TRL accepts as they are)."""
    variant = VARIANTS[name]
    settings = {**shared_settings(args, max_steps), **variant.options}
    if name == "budget":
        settings["max_tokens_per_batch"] = args.max_tokens_per_batch or round(
            PairLengths.of(pairs).unique / len(pairs) * args.batch_size
        )
    config_class = RewardConfig if variant.trainer is RewardTrainer else DiscoRewardConfig
    dataset = Dataset.from_dict(
        {
            "chosen_ids": [chosen for chosen, _ in pairs],
            "rejected_ids": [rejected for _, rejected in pairs],
            "number": range(len(pairs)),
            "length": [max(len(chosen), len(rejected)) for chosen, rejected in pairs],
        }
    )
    with tempfile.TemporaryDirectory() as folder:  # nothing is saved
        trainer = variant.trainer(
            args.model,
            config_class(folder, **settings),
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=adapter(args, "SEQ_CLS"),
        )
    if len(trainer.train_dataset) != len(pairs):  # type: ignore[arg-type]
        raise RuntimeError(f"{variant.label} dropped {len(pairs) - len(trainer.train_dataset)} pairs")  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    return trainer


def epoch_batches(trainer: Any) -> list[list[int]]:
    """The pairs of each full batch of the first epoch, as the trainer itself forms them."""
    torch.manual_seed(trainer.args.seed)  # transformers' length grouping draws from the global generator
    batches = [list(map(int, batch)) for batch in trainer.get_train_dataloader().batch_sampler]
    # The last batch of an epoch may be short, and a pair in it would weigh more than others. Batches of a token budget
    # are short on purpose.
    has_budget = getattr(trainer.args, "max_tokens_per_batch", None) is not None
    return [batch for batch in batches if has_budget or len(batch) == trainer.args.per_device_train_batch_size]


@dataclass
class Survey:
    """Epoch of a variant, observed from outside.

    Attributes:
        batches (`list[list[int]]`):
            The batches that represent it.
        unique (`int`):
            Tokens of all its pairs, each prompt counted once.
        repeated (`int`):
            Tokens of prompts that are computed a second time.
        tokens (`int`):
            Tokens that go through the layers.
        peak_bytes (`int`):
            Peak memory, from before the model is loaded to the end of two steps on the batch that is largest when
            padded.
    """

    batches: list[list[int]]
    unique: int
    repeated: int
    tokens: int
    peak_bytes: int


def survey(name: str, pairs: list[Pair], args: argparse.Namespace) -> Survey:
    """Observes an epoch of a variant and trains two steps of it. It has to be called in a process of its own."""
    quieten()
    lengths = PairLengths.of(pairs)
    with PeakMemory(on_gpu=torch.cuda.is_available()) as memory:
        trainer = make_trainer(name, pairs, args, max_steps=2)
        batches = epoch_batches(trainer)
        chosen = choose_batches(batches, lengths, args.steps, args.seed)
        largest = max(batches, key=lambda batch: lengths[batch].padded)
        tokens = sum(
            trainer.data_collator(trainer.train_dataset.select(batch).to_list())["input_ids"].numel()
            for batch in batches
        )
        replay(trainer, [largest, largest])
        trainer.train()
    epoch = lengths[[row for batch in batches for row in batch]]
    repeated = 0 if getattr(trainer.data_collator, "share_prefixes", False) else epoch.repeated
    return Survey(chosen, epoch.unique, repeated, tokens, memory.peak_bytes)


@dataclass
class Collated:
    """What a data collator received and made of it."""

    pairs: list[int]
    tokens: int  # tokens that go through the layers, padding included


def replay(trainer: Any, batches: list[list[int]]) -> list[Collated]:
    """Makes a trainer train on the given batches. Returns the list in which its collator records what it made."""
    collated: list[Collated] = []
    collate = trainer.data_collator

    def note_and_collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        collated.append(Collated([row["number"] for row in rows], batch["input_ids"].numel()))
        return batch

    # Collation stays inside the timed loop, in the main process, as in the trainers themselves.
    loader: DataLoader = DataLoader(trainer.train_dataset, batch_sampler=batches, collate_fn=note_and_collate)
    trainer.get_train_dataloader = lambda: loader
    return collated


# Taking turns


class SteppedTrainer:
    """A trainer whose `train()` runs in a thread and waits after each step until it is told to continue."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._go = threading.Semaphore(0)
        self._results: queue.Queue[float | BaseException] = queue.Queue()
        self._is_closing = False
        trainer.add_callback(_Turnstile(self))
        # A daemon thread, so that a benchmark that fails does not wait for the turns of the others.
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def step(self) -> float:
        """Runs to the end of the next step and returns its duration in seconds. It covers the whole loop since the end
        of the previous step: collating, forward, backward, optimizer and logging.
        """
        start = _now()
        self._go.release()
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result - start

    def close(self) -> None:
        """Lets `train()` return."""
        self._is_closing = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._is_closing:
                self.trainer.train()
        except BaseException as error:
            self._results.put(error)  # raised by `step` in the main thread


class _Turnstile(TrainerCallback):
    def __init__(self, stepped: SteppedTrainer):
        self.stepped = stepped

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.stepped._results.put(_now())
        self.stepped._go.acquire()
        control.should_training_stop |= self.stepped._is_closing
        return control


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Measured:
    """Measurements of a variant.

    Attributes:
        seconds (`list[list[float]]` of shape `(rounds + 1, steps)`):
            Duration of each step. The first round is the warm-up.
        batches (`list[Collated]`):
            What went into the model in a round.
        losses (`list[float]`):
            Loss of each step, over all rounds.
        flops_per_token (`int`):
            See `matmul_flops_per_token`.
        attention_flops (`int`):
            FLOP of attention in a round.
    """

    seconds: list[list[float]]
    batches: list[Collated]
    losses: list[float]
    flops_per_token: int
    attention_flops: int

    @property
    def pairs_per_second(self) -> list[float]:
        """Pairs per second in each round. The first round is the warm-up."""
        return [sum(len(batch.pairs) for batch in self.batches) / sum(seconds) for seconds in self.seconds]


def take_turns(
    trainers: dict[str, Any], labels: dict[str, str], steps: int, passes: int, description: str
) -> dict[str, list[list[float]]]:
    """Trains all trainers at the same time, a step of each in turn.

    Args:
        trainers (`dict[str, Any]`):
            The trainers, of `steps * passes` steps each.
        labels (`dict[str, str]`):
            What to call each of them.
        steps, passes (`int`):
            Number of steps of a round, and of rounds. The first round is to warm up.
        description (`str`):
            Title of the progress bar.

    Returns:
        `dict[str, list[list[float]]]`: Seconds of each step of each round, by trainer.
    """
    stepped = {name: SteppedTrainer(trainer) for name, trainer in trainers.items()}
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(passes)] for name in trainers}
    with tqdm(total=steps * passes * len(trainers), desc=description, unit="step") as bar:
        for round_ in range(passes):
            for _ in range(steps):
                for name, runner in stepped.items():
                    bar.set_postfix_str(("warm-up, " if round_ == 0 else "") + labels[name])
                    seconds[name][round_].append(runner.step())
                    bar.update()
            if round_ == 0:
                rest = (passes - 1) * sum(sum(taken[0]) for taken in seconds.values()) / 60
                bar.write(f"{description}: the timed rounds will take at most {rest:.1f} minutes")
    for runner in stepped.values():
        runner.close()
    return seconds


def alternate(
    batches: dict[str, list[list[int]]],
    pairs: list[Pair],
    args: argparse.Namespace,
    description: str,
) -> dict[str, Measured]:
    """Trains all variants at the same time, alternating step by step: once through the batches to warm up (memory is
    allocated, and kernels are compiled for new shapes), then `args.rounds` times, timed.

    Args:
        batches (`dict[str, list[list[int]]]`):
            For each variant, the pairs of each batch of a round. All variants have the same number of batches.
        pairs (`list[Pair]`):
            Token ids of the pairs.
        args (`argparse.Namespace`):
            Settings of the command line.
        description (`str`):
            Title of the progress bar.

    Returns:
        `dict[str, Measured]`: Measurements by variant.
    """
    steps = len(batches[BASELINE])
    passes = args.rounds + 1
    trainers, collated = {}, {}
    for name, own in batches.items():
        trainers[name] = make_trainer(name, pairs, args, max_steps=steps * passes)
        collated[name] = replay(trainers[name], own * passes)
    labels = {name: VARIANTS[name].label for name in trainers}
    seconds = take_turns(trainers, labels, steps, passes, description)

    measured = {}
    for name, trainer in trainers.items():
        lengths = PairLengths.of([pairs[row] for batch in batches[name] for row in batch])
        measured[name] = Measured(
            seconds[name],
            collated[name][:steps],
            [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            matmul_flops_per_token(trainer.model),
            attention_flops(trainer.model.config, lengths),
        )
        expected = [batch.pairs for batch in collated[BASELINE]]
        if VARIANTS[name].has_trl_batches and [batch.pairs for batch in collated[name]] != expected:
            raise RuntimeError(f"{VARIANTS[name].label} was not given the batches of {VARIANTS[BASELINE].label}")
    return measured


# The benchmark


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Command `train`: measures the variants. Returns what the report needs of each."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pairs = load_pairs(args.dataset, args.split, tokenizer, args.max_length)
    lengths = PairLengths.of(pairs)
    print(f"{len(pairs):,} pairs, {lengths.unique / len(pairs):.0f} unique tokens in each on average", flush=True)
    names = [name for name in VARIANTS if name in {BASELINE, *args.variants}]
    surveys: dict[str, Survey] = {}
    with tqdm(names, desc="memory, in processes of their own", unit="variant") as bar:
        for name in bar:
            bar.set_postfix_str(VARIANTS[name].label)
            surveys[name] = in_fresh_process(survey, name, pairs, args)
    measured = alternate({name: surveys[name].batches for name in names}, pairs, args, "training")

    variants = {}
    for name in names:
        variants[name] = {
            **_rates(name, measured, lengths, args),
            "processed_per_unique_in_epoch": surveys[name].tokens / surveys[name].unique,
            "repeated_per_unique_in_epoch": surveys[name].repeated / surveys[name].unique,
            "peak_bytes": surveys[name].peak_bytes,
        }
    return {"pairs": len(pairs), "unique_tokens": lengths.unique, "variants": variants}


def _rates(name: str, measured: dict[str, Measured], lengths: PairLengths, args: argparse.Namespace) -> dict[str, Any]:
    own, baseline = measured[name], measured[BASELINE]
    timed = lengths[[row for batch in own.batches for row in batch.pairs]]
    warm_up, *rates = own.pairs_per_second
    seconds = len(timed.chosen) / statistics.median(rates)
    flops = timed.unique * own.flops_per_token + own.attention_flops
    has_trl_loss = VARIANTS[name].has_trl_loss
    return {
        "label": VARIANTS[name].label,
        "pairs_per_second": rates,
        "pairs_per_second_in_warm_up": warm_up,
        "times_trl": [rate / other for rate, other in zip(rates, baseline.pairs_per_second[1:], strict=True)],
        "unique_tokens_per_second": timed.unique / seconds,
        "processed_per_unique": sum(batch.tokens for batch in own.batches) / timed.unique,
        "flops_per_second": flops / seconds,
        "utilisation": None if args.peak_flops is None else flops / seconds / args.peak_flops,
        "loss_difference": max(abs(loss - other) for loss, other in zip(own.losses, baseline.losses, strict=True))
        if has_trl_loss
        else None,
        "losses": own.losses,
        "seconds": own.seconds,
        "timed_pairs": [batch.pairs for batch in own.batches],
    }


# What is varied when one thing at a time is, around the first value of each of the others.
SWEEP: dict[str, list[Any]] = {
    "prompt share": [0.5, 0.0, 0.25, 0.75, 0.9],
    "length": [256, 128, 512, 1024],
    "batch size": [4, 2, 8, 16],  # With 32 such pairs TRL does not fit into 24 GiB.
}


def measure_defaults(
    batches: list[list[int]], pairs: list[Pair], args: argparse.Namespace, description: str
) -> dict[str, Any]:
    """Measures TRL's defaults and ours on the same batches. Returns what the report needs of each."""
    names = (BASELINE, "default")
    measured = alternate(dict.fromkeys(names, batches), pairs, args, description)
    lengths = PairLengths.of(pairs)
    return {name: _rates(name, measured, lengths, args) for name in names}


def sweep(args: argparse.Namespace, measure: Callable[..., dict[str, Any]] = measure_defaults) -> dict[str, Any]:
    """Commands `train --sweep` and `dpo --sweep`: measures two trainers on the same batches of random tokens, for each
    setting.

    Args:
        args (`argparse.Namespace`):
            Settings of the command line.
        measure (`Callable`, *optional*, defaults to [`measure_defaults`]):
            Measures the trainers, given batches, pairs, settings and a title of the progress bar.

    Returns:
        `dict`: What the report needs.
    """
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    middle = {axis: values[0] for axis, values in SWEEP.items()}
    points: dict[tuple[Any, ...], dict[str, Any]] = {}
    table = []
    for axis, values in SWEEP.items():
        for value in sorted(values):
            place = {**middle, axis: value}
            key = tuple(place.values())
            if key not in points:
                share, length, batch_size = key
                own_args = argparse.Namespace(**{**vars(args), "batch_size": batch_size})
                pairs = [
                    pair
                    for step in range(args.steps)
                    for pair in synthetic_pairs(batch_size, length, share, tokenizer, args.seed + step)
                ]
                batches = torch.arange(len(pairs)).view(args.steps, batch_size).tolist()
                points[key] = measure(batches, pairs, own_args, f"{axis} {value}")
                gc.collect()  # Trainers and their callbacks refer to each other, so only the collector frees them.
            table.append({"axis": axis, "value": value, **place, "variants": points[key]})
    return {"middle": middle, "points": table}
