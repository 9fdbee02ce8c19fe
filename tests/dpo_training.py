"""Small DPO runs for the tests: both trainers with the same arguments."""

from typing import Any

from tiny_training import SMALL_RUN
from trl import DPOConfig, DPOTrainer

from disco_trl import DiscoDPOConfig, DiscoDPOTrainer


# With these options `DiscoDPOTrainer` does what TRL's trainer does, up to the rounding of the pairwise term.
SIGMOID: dict[str, Any] = {"reward_family": "logistic", "fixed_scale": 2**-0.5, "prefix_sharing": False}
ARGUMENTS = ("model", "ref_model", "data_collator", "train_dataset", "eval_dataset", "processing_class")
ARGUMENTS += ("compute_metrics", "callbacks", "optimizers", "quantization_config", "peft_config")


def dpo_trainer(output_dir, **options: Any) -> DPOTrainer:
    """TRL's trainer."""
    return _build(DPOTrainer, DPOConfig, output_dir, options)


def disco_dpo_trainer(output_dir, **options: Any) -> DiscoDPOTrainer:
    """Ours."""
    return _build(DiscoDPOTrainer, DiscoDPOConfig, output_dir, options)


def sigmoid_trainer(output_dir, **options: Any) -> DiscoDPOTrainer:
    """Ours, as TRL's."""
    return disco_dpo_trainer(output_dir, **(SIGMOID | options))


def _build(trainer_class, config_class, output_dir, options: dict[str, Any]):
    arguments = {name: options.pop(name) for name in ARGUMENTS if name in options}
    config = config_class(output_dir=str(output_dir), **(SMALL_RUN | {"beta": 0.5} | options))
    return trainer_class(args=config, **arguments)
