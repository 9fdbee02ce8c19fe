"""Train a reward model with a distribution, from preference data. Takes the arguments of `trl reward`.

To those it adds the fields of `DiscoRewardConfig`. `--dataset_name` may also be a local file or folder, and a misspelt
argument is an error wherever it stands. What `accelerate launch` takes, it takes as well: `--num_processes 2`, or
`--accelerate_config` with a file or with the name of a config of TRL's.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from ..trainer.reward_config import DiscoRewardConfig


if TYPE_CHECKING:
    from ..trainer.reward_trainer import DiscoRewardTrainer

Arguments = (ScriptArguments, DiscoRewardConfig, ModelConfig, DatasetMixtureConfig)


def make_trainer(
    script_args: ScriptArguments,
    training_args: DiscoRewardConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> DiscoRewardTrainer:
    """Load the data and the model that the arguments name."""
    from ..trainer.reward_trainer import DiscoRewardTrainer

    return DiscoRewardTrainer(**trainer_arguments(script_args, training_args, model_args, dataset_args))


def trainer_arguments(
    script_args: ScriptArguments, training_args: Any, model_args: ModelConfig, dataset_args: DatasetMixtureConfig
) -> dict[str, Any]:
    """
    Read what one of TRL's trainers is constructed with from the arguments of its command.

    Args:
        script_args, training_args, model_args, dataset_args:
            The arguments. `training_args`, a configuration of any trainer, gets `model_init_kwargs`.

    Returns:
        `dict[str, Any]`: `model`, `args`, `train_dataset`, `eval_dataset`, `quantization_config` and `peft_config`.
    """
    from accelerate.logging import get_logger
    from trl import get_dataset, get_peft_config, get_quantization_config

    from ..data.files import choose_split, load_preferences

    logger = get_logger(__name__)

    # Model
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: name a model on the Hub or a local folder.")
    if (model_args.load_in_4bit or model_args.load_in_8bit) and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "--load_in_4bit and --load_in_8bit need bitsandbytes: pip install 'disco-trl[quantization]'."
        )
    # What the user wrote in `model_init_kwargs` goes before the general arguments, as in TRL's script of today. (The
    # script of TRL 1.12 threw it away.)
    own_kwargs: Any = training_args.model_init_kwargs or {}
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **own_kwargs,
    }

    # Data
    if dataset_args.datasets:
        if script_args.dataset_name:
            logger.warning(
                f"Both `datasets` and `dataset_name` are given; {script_args.dataset_name!r} is left out and the "
                "mixture in `datasets` is trained on."
            )
        dataset = get_dataset(dataset_args)
    elif script_args.dataset_name:
        dataset = load_preferences(
            script_args.dataset_name, script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    else:
        raise ValueError("There is no data to train on: pass --dataset_name, or `datasets` in a config file.")
    train_dataset = choose_split(dataset, script_args.dataset_train_split, "--dataset_train_split")
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = choose_split(
            dataset,
            script_args.dataset_test_split,
            "--dataset_test_split",
            ["set test_split_size if you mix `datasets`", "train without evaluation (--eval_strategy no)"],
        )

    return {
        "model": model_args.model_name_or_path,
        "args": training_args,
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": get_peft_config(model_args),
    }


def train(
    trainer: Any,
    script_args: ScriptArguments,
    training_args: Any,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    made: str = "reward model",
) -> None:
    """Train, save to `training_args.output_dir` and, if asked, push to the Hub. `made` is what there is then."""
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    # Hand-over. The model card is written last, as PEFT leaves one of its own where it saves. A local path would mean
    # nothing to the card's readers.
    dataset_name = script_args.dataset_name
    if dataset_name is not None and Path(dataset_name).exists():
        dataset_name = None
    output_dir = str(training_args.output_dir)
    trainer.save_model(output_dir)
    trainer.create_model_card(model_name=Path(output_dir).name, dataset_name=dataset_name)
    trainer.accelerator.print(f"The {made} is in {output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        trainer.accelerator.print(f"It is on the Hub as {trainer.hub_model_id}.")

    trainer.end()  # closes the trackers and the process group


def how_to_go_on(
    script_args: ScriptArguments,
    training_args: Any,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> str:
    """What to do after an interrupt: resume from the newest checkpoint, if one was saved as a whole."""
    from ..trainer.checkpoints import why_torn

    checkpoints = Path(str(training_args.output_dir)).glob("checkpoint-*")
    newest_first = sorted(checkpoints, key=lambda path: path.stat().st_mtime, reverse=True)
    whole = next((path for path in newest_first if why_torn(path) is None), None)
    return "" if whole is None else f"run again with --resume_from_checkpoint {whole} to go on"
