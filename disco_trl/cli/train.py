"""`disco-trl train`: start `disco_trl.cli.train_reward` in as many processes as asked for."""

import sys

from accelerate.commands.launch import launch_command, launch_command_parser
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from .train_reward import check_config_file, make_parser, refuse_unknown_arguments


def main(argv: list[str]) -> None:
    """
    Start `disco_trl.cli.train_reward` through `accelerate launch`, as `trl reward` starts its script.

    What the training parser does not know (`--num_processes 2`, `--accelerate_config zero2`, on the command line or in
    the YAML file) goes to the launcher, the rest to the training processes.
    """
    parser = make_parser(prog="disco-trl train")
    check_config_file(parser.prog, argv)
    *_, launcher_keys, launcher_argv = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    refuse_unknown_arguments(parser, launcher_keys + launcher_argv)

    # The parser leaves the launcher's arguments in their order, so one pass over both lists separates them.
    training_argv, position = [], 0
    for argument in argv:
        if position < len(launcher_argv) and argument == launcher_argv[position]:
            position += 1
        else:
            training_argv.append(argument)

    # Started as a module: by its path, the package's folder would come first on sys.path and hide other modules named
    # `data` or `config`. `--quiet`: the training process has told its error; the launcher's own adds nothing.
    launch_args = launch_command_parser().parse_args(
        [
            *resolve_accelerate_config_argument(launcher_keys + launcher_argv),
            "--quiet",
            "--module",
            "disco_trl.cli.train_reward",
            *training_argv,
        ]
    )
    if launch_args.training_script != "disco_trl.cli.train_reward":
        sys.exit(f"{parser.prog}: {launch_args.training_script!r} belongs to no argument.")
    launch_command(launch_args)
