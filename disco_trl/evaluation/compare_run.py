"""
One run of `disco-trl compare`: train as a file says, score the held-out answers, and leave the figures; or search for
settings.

    python -m disco_trl.evaluation.compare_run FOLDER/run.json
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from ..data.files import choose_split, load_preferences
from ..data.judgements import has_judgements
from ..data.tokenization import tokenize_pair
from ..models.inference import score
from ..trainer.reward_config import DiscoRewardConfig
from ..trainer.reward_trainer import DiscoRewardTrainer
from .evaluate import as_json, evaluate
from .held_out import HeldOut


BRADLEY_TERRY = "bradley-terry"
FIGURES_FILE = "metrics.json"
REWARDS_FILE = "rewards.safetensors"
DRAWS = 300


@dataclass(frozen=True)
class Run:
    """
    What to train, on what, and where to leave the figures.

    Attributes:
        base: `bradley-terry`, or a family.
        bradley_terry: whose trainer it is trained with, `"trl"` or `"disco"`.
        settings: fields of the trainer's config.
        seed: of the order of the data and of all that is random in training.
        model, dtype: what to start from.
        data, train_split, test_split: a file, a folder or a Hub id.
        max_train: how many rows to train on, of a shuffle by the seed.
        max_length: rows with a longer answer, in tokens, are left out of both splits.
        lora_r: rank of adapters on all linear layers; 0 trains the whole model.
        keep_model: whether to save what was trained.
        search: instead, try so many settings on a tenth of the training rows, and leave the best.
        output: folder.
    """

    base: str
    bradley_terry: str
    settings: dict[str, Any]
    seed: int
    model: str
    data: str
    train_split: str
    test_split: str
    max_train: int | None
    max_length: int | None
    lora_r: int
    dtype: str
    keep_model: bool
    search: int
    output: str


def read_data(run: Run, processing_class: PreTrainedTokenizerBase) -> tuple[Dataset, HeldOut]:
    """The rows to train on, and the held-out data."""
    splits = load_preferences(run.data)
    train = choose_split(splits, run.train_split, "--dataset_train_split")
    test = choose_split(splits, run.test_split, "--dataset_test_split")
    if run.max_length is not None:
        longest = run.max_length
        train = train.filter(lambda row: max(map(len, tokenize_pair(row, processing_class))) <= longest)
    if run.max_train is not None:
        train = train.shuffle(seed=run.seed).select(range(min(run.max_train, len(train))))
    return train, HeldOut.read(test, processing_class, max_length=run.max_length)


def make_trainer(
    run: Run, train: Dataset, processing_class: PreTrainedTokenizerBase, validation: Dataset | None = None
) -> RewardTrainer:
    """
    The trainer of a run. TRL's reads forced choices alone, so where the data say more Bradley–Terry is the same
    likelihood in ours (the logistic family with every scale at 1/√2). Settings that TRL's config does not have are not
    for Bradley–Terry.
    """
    settings: dict[str, Any] = {
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10,
        "use_cpu": not torch.accelerator.is_available(),
        "model_init_kwargs": {"dtype": run.dtype},
        **run.settings,
        "output_dir": run.output,
        "seed": run.seed,
    }
    peft_config = None
    if run.lora_r:
        peft_config = LoraConfig(
            task_type="SEQ_CLS", r=run.lora_r, lora_alpha=2 * run.lora_r, target_modules="all-linear"
        )
    common: dict[str, Any] = {
        "train_dataset": train,
        "eval_dataset": validation,
        "processing_class": processing_class,
        "peft_config": peft_config,
    }
    if run.base != BRADLEY_TERRY:
        return DiscoRewardTrainer(run.model, DiscoRewardConfig(reward_family=run.base, **settings), **common)
    settings = {name: settings[name] for name in RewardConfig.__dataclass_fields__ if name in settings}
    if run.bradley_terry == "disco" or run.search or has_judgements(train.column_names):
        config = DiscoRewardConfig(reward_family="logistic", fixed_scale=2**-0.5, location_error=False, **settings)
        return DiscoRewardTrainer(run.model, config, **common)
    return RewardTrainer(run.model, RewardConfig(**settings), **common)


def search(run: Run, train: Dataset, processing_class: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The best settings of so many trials, by the NLL of a tenth of the training rows."""
    parts = train.train_test_split(test_size=0.1, seed=run.seed)
    trainer = make_trainer(run, parts["train"], processing_class, parts["test"])
    trials: list[dict[str, Any]] = []

    def objective(metrics: dict[str, float]) -> float:
        tried = {name: getattr(trainer.args, name) for name in ("learning_rate", "per_device_train_batch_size")}
        trials.append({**tried, "nll": metrics["eval_nll"]})
        return metrics["eval_nll"]

    from optuna.samplers import TPESampler

    best: Any = trainer.hyperparameter_search(
        compute_objective=objective, n_trials=run.search, backend="optuna", sampler=TPESampler(seed=run.seed)
    )
    return {"best": best.hyperparameters, "nll": best.objective, "trials": trials}


def train_and_evaluate(
    run: Run, train: Dataset, held_out: HeldOut, processing_class: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The figures of a run; its rewards of the held-out answers, and perhaps its model, are left in its folder."""
    start = time.perf_counter()
    trainer = make_trainer(run, train, processing_class)
    trainer.train()
    minutes = (time.perf_counter() - start) / 60
    # In training accelerate runs the model in another dtype; it is measured as it will be loaded, in its own.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    rewards = score(model, held_out.sequences, description="Scoring")
    output = Path(run.output)
    if run.keep_model:
        trainer.save_model(str(output / "model"))
    tensors = {"location": rewards.location, "scale": rewards.scale}
    tensors |= {
        name: tensor
        for name, tensor in (("shape", rewards.shape), ("location_error", rewards.location_error))
        if tensor is not None
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output / REWARDS_FILE)
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "trainer": f"{type(trainer).__module__.partition('.')[0]}.{type(trainer).__name__}",
        "family": rewards.family,
        "pairs": len(train),
        "minutes": minutes,
        "peak_gib": peak / 2**30,
        "history": [[entry["epoch"], float(entry.get("nll", entry["loss"]))] for entry in logs],
        **as_json(evaluate(rewards, held_out, DRAWS)),
    }


def main(path: str) -> None:
    """Do the run that a file describes."""
    run = Run(**json.loads(Path(path).read_text(encoding="utf-8")))
    processing_class = AutoTokenizer.from_pretrained(run.model, trust_remote_code=False)
    train, held_out = read_data(run, processing_class)
    if run.search:
        figures = search(run, train, processing_class)
    else:
        figures = train_and_evaluate(run, train, held_out, processing_class)
    output = Path(run.output)
    # Last, and at once: a folder with this file is a finished run.
    unfinished = output / f"{FIGURES_FILE}.unfinished"
    unfinished.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(output / FIGURES_FILE)


if __name__ == "__main__":
    main(sys.argv[1])
