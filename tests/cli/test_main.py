"""The `disco-trl` command, and `disco-trl train` up to the point where training starts."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import refusal

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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1e-3"], "unknown argument --lerning_rate; did you mean --learning_rate?"),
        (["pairs.jsonl", "--model", "x"], "unknown argument --model; did you mean --model_init_kwargs or"),
        (["--num_proceses", "2"], "unknown argument --num_proceses; did you mean --num_processes?"),
        # accelerate would take it for the script to launch.
        (["model", "data", "out", "more"], "'more' belongs to no argument; write disco-trl train [MODEL] [DATA]"),
        (["model", "--model_name_or_path", "x"], "MODEL is given twice"),
        (["--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["--reward_family", "gamma"], "reward_family"),
    ],
)
def test_mistakes_on_the_command_line_of_train(words, message, capsys):
    said = refusal(capsys, "train", "--use_cpu", *words)
    assert re.search(rf"(?m)^disco-trl train: .*{re.escape(message)}", said)


def test_train_names_the_key_nearest_to_a_misspelt_one_in_yaml(tmp_path, capsys):
    config = tmp_path / "reward.yaml"
    config.write_text("num_processes: 1\nreward_famly: cauchy\n")  # the first is the launcher's, and fine
    said = refusal(capsys, "train", "--use_cpu", "--config", str(config))
    assert "reward.yaml: unknown argument reward_famly; did you mean --reward_family?" in said


@pytest.fixture
def launched(monkeypatch):
    """`launched(words)` is what `accelerate launch` is asked to do by `disco-trl train` with them."""

    def launch(*words: str):
        found = []
        monkeypatch.setattr("accelerate.commands.launch.launch_command", found.append)
        assert main(["train", "--use_cpu", *words]) == 0
        return found[0]

    return launch


def test_train_tells_its_own_arguments_and_the_launchers_apart(launched, tmp_path):
    config = tmp_path / "reward.yaml"
    config.write_text(f"num_machines: 1\nmain_process_port: 1\noutput_dir: {tmp_path}\n")
    words = ["--num_processes", "2", "m", "--multi_gpu", "--bf16", "False", "d.jsonl", "--main_process_port=3"]
    asked = launched(*words, "--config", str(config))
    assert (asked.num_processes, asked.num_machines, asked.multi_gpu, asked.main_process_port) == (2, 1, True, 3)
    assert asked.module and asked.quiet and asked.training_script == "disco_trl.cli.launch"
    own = ["--model_name_or_path=m", "--dataset_name=d.jsonl", "--use_cpu", "--bf16", "False"]
    assert asked.training_script_args == ["train", *own, "--config", str(config)]


def test_train_hands_on_an_accelerate_config(launched, tmp_path):
    asked = launched("m", "d", str(tmp_path), "--accelerate_config", "zero2")
    assert Path(asked.config_file).name == "zero2.yaml"
