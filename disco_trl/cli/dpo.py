"""Train a policy on preferences by DPO, with the likelihood of what people said. Takes the arguments of `trl dpo`.

To those it adds the fields of `DiscoDPOConfig`. `--dataset_name` may also be a local file or folder, and a misspelt
argument is an error wherever it stands. What `accelerate launch` takes, it takes as well: `--num_processes 2`, or
`--accelerate_config` with a file or with the name of a config of TRL's.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from ..trainer.dpo_config import DiscoDPOConfig
from .train import how_to_go_on as how_to_go_on
from .train import train as train_and_save
from .train import trainer_arguments


if TYPE_CHECKING:
    from ..trainer.dpo_trainer import DiscoDPOTrainer

Arguments = (ScriptArguments, DiscoDPOConfig, ModelConfig, DatasetMixtureConfig)
train = functools.partial(train_and_save, made="policy")


def make_trainer(
    script_args: ScriptArguments,
    training_args: DiscoDPOConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> DiscoDPOTrainer:
    """Load the data and the model that the arguments name; the reference is the model as it is."""
    from ..trainer.dpo_trainer import DiscoDPOTrainer

    return DiscoDPOTrainer(**trainer_arguments(script_args, training_args, model_args, dataset_args))
