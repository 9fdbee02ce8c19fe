"""Small training runs for the tests: settings, preferences of every format, and ways to compare two trainers."""

import random
from typing import Any

import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from disco_trl import DiscoRewardConfig, DiscoRewardTrainer


# float32 on the CPU, and every step is logged. The seed is not the default, so that ignoring it is noticed.
SMALL_RUN: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "seed": 7,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
# With these options `DiscoRewardTrainer` does what TRL's trainer does, up to the rounding of the pairwise term.
BRADLEY_TERRY: dict[str, Any] = {"reward_family": "logistic", "fixed_scale": 2**-0.5, "prefix_sharing": False}

WORDS = "the answer film people like a short careful question piano day best help learn not at all".split()
TOOL = {"type": "function", "function": {"name": "search", "description": "Look it up.", "parameters": {}}}


def preferences(kind: str = "standard", rows: int = 16, *, seed: int = 0, margin: bool = False) -> Dataset:
    """A random preference dataset.

    Args:
        kind: `standard`, `standard implicit`, `conversational`, `conversational implicit` or `tools`.
        rows: Number of pairs.
        seed: Seed of the random texts.
        margin: Whether to add a `margin` column.
    """
    rng = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    examples = []
    for _ in range(rows):
        prompt, chosen, rejected = words(2, 5), words(1, 9), words(1, 9)
        if kind.startswith("standard"):
            example: dict[str, Any] = {"prompt": prompt + " ", "chosen": chosen, "rejected": rejected}
        else:
            example = {"prompt": [{"role": "user", "content": prompt}]}
            for side, answer in (("chosen", chosen), ("rejected", rejected)):
                example[side] = [{"role": "assistant", "content": answer}]
        if kind.endswith("implicit"):
            start = example.pop("prompt")
            example |= {side: start + example[side] for side in ("chosen", "rejected")}
        if kind == "tools":
            example["tools"] = [TOOL]
        if margin:
            example["margin"] = rng.uniform(0, 2)
        examples.append(example)
    return Dataset.from_list(examples)


def learnable_preferences(rows: int) -> Dataset:
    """Preferences for the answer that ends with "best", but for each fifth pair."""

    def in_favour_of_best(row: dict, number: int) -> dict:
        better, worse = f"{row['chosen']} best", row["rejected"]
        return {"chosen": worse, "rejected": better} if number % 5 == 0 else {"chosen": better, "rejected": worse}

    return preferences(rows=rows).map(in_favour_of_best, with_indices=True)


def reward_trainer(output_dir, **options: Any) -> RewardTrainer:
    """TRL's `RewardTrainer`. Options that it does not take itself are passed to its config."""
    return _build(RewardTrainer, RewardConfig, output_dir, options)


def disco_trainer(output_dir, **options: Any) -> DiscoRewardTrainer:
    """`DiscoRewardTrainer`. Takes the same options, and those of `DiscoRewardConfig`."""
    return _build(DiscoRewardTrainer, DiscoRewardConfig, output_dir, options)


def bradley_terry_trainer(output_dir, **options: Any) -> DiscoRewardTrainer:
    """`DiscoRewardTrainer` in the special case that equals TRL's trainer."""
    return disco_trainer(output_dir, **BRADLEY_TERRY, **options)


def _build(trainer_class, config_class, output_dir, options: dict[str, Any]):
    names = ("model", "data_collator", "train_dataset", "eval_dataset", "processing_class", "compute_metrics")
    names += ("callbacks", "optimizers", "optimizer_cls_and_kwargs", "preprocess_logits_for_metrics")
    names += ("quantization_config", "peft_config")
    arguments = {name: options.pop(name) for name in names if name in options}
    config = config_class(output_dir=str(output_dir), **(SMALL_RUN | options))
    return trainer_class(args=config, **arguments)


def logged(trainer, prefix: str = "") -> list[dict[str, float]]:
    """Numbers that a run has logged, without totals and those that depend on the clock."""
    clock = ("runtime", "per_second", "flos", "train_loss", "epoch", "step")
    wanted = [key for key in set().union(*trainer.state.log_history) if key.startswith(prefix)]
    wanted = [key for key in wanted if not any(name in key for name in clock)]
    return [{key: entry[key] for key in wanted if key in entry} for entry in trainer.state.log_history]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy of a model's parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference between elements of tensors with the same name."""
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)
