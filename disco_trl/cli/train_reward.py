"""From a command line to a saved model: what `scripts/disco_reward.py` and `disco-trl train` run.

Arguments, YAML configs and defaults are those of TRL's own reward script, plus the fields of `DiscoRewardConfig`. Two
things are added: `--dataset_name` may be a local file, and a misspelt argument is an error wherever it stands.
"""

import difflib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from ..trainer.reward_config import DiscoRewardConfig
from ..data.files import choose_split, load_preferences


def make_parser(prog: str | None = None) -> "TrlParser":
    """TRL's parser over the four groups of arguments, in the order that `train` takes them."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from ..trainer.reward_config import DiscoRewardConfig

    argument_groups: Any = (ScriptArguments, DiscoRewardConfig, ModelConfig, DatasetMixtureConfig)
    return TrlParser(argument_groups, prog=prog)


def refuse_unknown_arguments(parser: "TrlParser", remaining: Iterable[str]) -> None:
    """
    Exit with a message if an argument that the parser left over is not one of `accelerate launch` either.

    Left alone, a key misspelt in a YAML file would be ignored and its default trained with.
    """
    from accelerate.commands.launch import launch_command_parser

    launcher_options = {*launch_command_parser()._option_string_actions, "--accelerate_config"}
    for argument in remaining:
        option = argument.split("=")[0]
        if option.startswith("--") and option not in launcher_options:
            near = difflib.get_close_matches(option, [*parser._option_string_actions, *launcher_options], n=1)
            fix = f"did you mean {near[0]}?" if near else "see --help for the arguments there are."
            sys.exit(f"{parser.prog}: unknown argument {option} (in a config file: {option[2:]}); {fix}")


MOST_VALUES = 100_000
"""Values in a config file at most, those that aliases repeat counted each time."""


def check_config_file(prog: str, arguments: Sequence[str]) -> None:
    """
    Exit with a message if the YAML file of `--config` cannot be read, or would not fit into memory once it is written
    out: a few lines of aliases of aliases are billions of values.

    Tags that make Python objects are refused by the reader, which is YAML's safe one.
    """
    if "--config" not in arguments[:-1]:
        return
    import yaml

    path = arguments[arguments.index("--config") + 1]
    try:
        values = _count_values(yaml.safe_load(Path(path).read_text(encoding="utf-8")), {})
    except (OSError, ValueError, yaml.YAMLError) as error:
        sys.exit(f"{prog}: --config {path}: it cannot be read: {error}")
    except RecursionError:
        sys.exit(f"{prog}: --config {path}: it is nested too deeply, or holds itself")
    if values > MOST_VALUES:
        sys.exit(f"{prog}: --config {path}: its aliases stand for more than {MOST_VALUES} values; write them out")


def _count_values(value: Any, counts: dict[int, int]) -> int:
    """How many values there are when nothing is shared; `counts` holds those of the lists and dicts by their ids."""
    if not isinstance(value, list | dict):
        return 1
    if id(value) not in counts:
        counts[id(value)] = MOST_VALUES + 1  # if it is met again inside of itself, there is no end
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        counts[id(value)] = 1 + sum(_count_values(part, counts) for part in parts)
    return counts[id(value)]


def train(
    script_args: "ScriptArguments",
    training_args: "DiscoRewardConfig",
    model_args: "ModelConfig",
    dataset_args: "DatasetMixtureConfig",
) -> None:
    """Load the data, train, save to `training_args.output_dir` and, if asked, push to the Hub."""
    from accelerate.logging import get_logger
    from trl import get_dataset, get_peft_config, get_quantization_config

    from ..trainer.reward_trainer import DiscoRewardTrainer

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
        eval_dataset = choose_split(dataset, script_args.dataset_test_split, "--dataset_test_split")

    # Training
    trainer = DiscoRewardTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    # Hand-over. The model card is written last, as PEFT leaves one of its own where it saves. A local path would mean
    # nothing to the card's readers.
    dataset_name = script_args.dataset_name
    if dataset_name is not None and Path(dataset_name).exists():
        dataset_name = None
    output_dir = str(training_args.output_dir)
    trainer.save_model(output_dir)
    trainer.create_model_card(model_name=Path(output_dir).name, dataset_name=dataset_name)
    trainer.accelerator.print(f"The reward model is in {output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        trainer.accelerator.print(f"It is on the Hub as {trainer.hub_model_id}.")

    trainer.end()  # closes the trackers and the process group


def main() -> None:
    """Train as `sys.argv` says."""
    parser = make_parser()
    check_config_file(parser.prog, sys.argv[1:])
    *arguments, launcher_keys, remaining = parser.parse_args_and_config(
        return_remaining_strings=True, separate_remaining_strings=True
    )
    # A config file may also hold what `accelerate launch` takes: by now the launcher has read that. On this command
    # line such an argument comes too late.
    refuse_unknown_arguments(parser, launcher_keys + remaining)
    if remaining and not remaining[0].startswith("--"):
        sys.exit(f"{parser.prog}: {remaining[0]!r} belongs to no argument.")
    if remaining:
        sys.exit(
            f"{parser.prog}: {' '.join(remaining)} came too late: it belongs to the launcher, before the script's "
            f"name (accelerate launch {' '.join(remaining)} {parser.prog} ...), or to `disco-trl train`."
        )
    train(*arguments)


if __name__ == "__main__":
    main()
