"""The `disco-trl` command up to the point where training starts; `test_train_script.py` has the training."""

import importlib.metadata
import subprocess
import sys

import pytest

import disco_trl
from disco_trl.cli.main import main


def test_console_script_points_at_main():
    [script] = importlib.metadata.entry_points(group="console_scripts", name="disco-trl")
    assert script.load() is main


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_lists_the_commands(arguments):
    result = subprocess.run([sys.executable, "-m", "disco_trl", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: disco-trl")
    assert "train" in result.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"disco-trl {disco_trl.__version__}\n"


def test_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["trian"])
    assert exit_info.value.code == 2
    assert "'trian' (choose from" in capsys.readouterr().err


def test_train_help_shows_the_arguments_of_trl_and_of_disco(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: disco-trl train")
    for argument in ["--reward_family", "--fixed_scale", "--learning_rate", "--use_peft", "--dataset_name"]:
        assert argument in shown


def test_train_names_the_argument_nearest_to_a_misspelt_one():
    with pytest.raises(SystemExit, match=r"unknown argument --lerning_rate .* did you mean --learning_rate\?"):
        main(["train", "--use_cpu", "--lerning_rate", "1e-3"])


def test_train_names_the_key_nearest_to_a_misspelt_one_in_yaml(tmp_path):
    config = tmp_path / "reward.yaml"
    config.write_text("num_processes: 1\nreward_famly: cauchy\n")  # the first is the launcher's, and fine
    with pytest.raises(SystemExit, match=r"in a config file: reward_famly\); did you mean --reward_family\?"):
        main(["train", "--use_cpu", "--config", str(config)])


def test_train_refuses_a_word_that_belongs_to_no_argument(tmp_path):
    # accelerate would take it for the script to launch.
    with pytest.raises(SystemExit, match=r"'preferences\.jsonl' belongs to no argument"):
        main(["train", "--use_cpu", "--output_dir", str(tmp_path), "preferences.jsonl"])
