"""`scripts/disco_dpo.py` and `disco-trl dpo`, from command line to saved policy, on a tiny random Llama."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from preference_rows import write_pairs
from transformers import AutoModelForCausalLM

from disco_trl.cli import launch


SCRIPT = Path(__file__).parents[2] / "scripts" / "disco_dpo.py"
SMALL_RUN = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--bf16", "False"]
SMALL_RUN += ["--gradient_checkpointing", "False", "--use_cpu", "--save_strategy", "no", "--disable_tqdm", "True"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pairs with strengths, of which some are ties."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, number in (("train", 16), ("test", 8)):
        path = folder / f"{name}.jsonl"
        write_pairs(path, number=number)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for index, row in enumerate(rows):
            row["preference_strength"] = index % 3
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_script_trains_a_policy(tiny_llama_dir, folder, tmp_path, monkeypatch, capfd, caplog):
    words = ["--model_name_or_path", tiny_llama_dir, "--dataset_name", str(folder), "--output_dir", str(tmp_path)]
    words += ["--eval_strategy", "steps", "--eval_steps", "1", "--label_noise", "0.05"]
    monkeypatch.setattr(sys, "argv", ["disco_dpo.py", *words, *SMALL_RUN])
    launch.main("dpo")
    said = capfd.readouterr()
    assert f"The policy is in {tmp_path}." in said.out and "eval_nll" in said.out
    assert "preference_strength: how much better" in caplog.text
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.architectures == ["LlamaForCausalLM"]
    assert json.loads((tmp_path / "disco_likelihood.json").read_text())["strength_levels"] == 2
    card = (tmp_path / "README.md").read_text()
    assert "disco-trl" in card and "Direct Preference Optimization" in card


@pytest.mark.slow
def test_the_command_launches_it(tiny_llama_dir, folder, tmp_path):
    command = [sys.executable, "-m", "disco_trl", "dpo", tiny_llama_dir, str(folder), str(tmp_path), *SMALL_RUN]
    command += ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_bad_row_is_named_before_training(tiny_llama_dir, tmp_path, monkeypatch):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_votes": 1, "rejected_votes": -1}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    words = ["--model_name_or_path", tiny_llama_dir, "--dataset_name", str(tmp_path), "--output_dir", "out"]
    monkeypatch.setattr(sys, "argv", ["disco_dpo.py", *words, *SMALL_RUN])
    with pytest.raises(SystemExit, match="row 0, column 'rejected_votes'"):
        launch.main("dpo")


def test_the_script_says_how_it_is_run():
    assert "accelerate launch --num_processes 8 scripts/disco_dpo.py" in SCRIPT.read_text()
