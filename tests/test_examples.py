"""The examples, run as a reader runs them, with tiny models in place of real ones."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from preference_rows import write_pairs
from reward_server import serve, tiny_reward
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from disco_trl import DiscoRewardModel


EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.slow


def run(script: str, *arguments: str, cwd: Path) -> str:
    """What an example prints."""
    result = subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments], cwd=cwd, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_grpo(reward_dirs, tiny_llama_dir, tmp_path):
    shown = run("grpo.py", reward_dirs["adapter"], tiny_llama_dir, "--steps", "5", "--output", "out", cwd=tmp_path)
    assert "After 5 steps on lower_bound {'k': 2.0}:" in shown
    logs = json.loads((tmp_path / "out" / "logs.json").read_text())
    first = [logs[name][0][f"{name}/location/mean"] for name in ("disco_mean", "disco_lower_bound")]
    assert first[0] == first[1]  # from the same start
    assert logs["disco_mean"][0]["reward"] == pytest.approx(first[0], abs=1e-5)
    assert logs["disco_lower_bound"][0]["reward"] < first[0]
    assert (tmp_path / "out" / "grpo.png").stat().st_size > 10_000


def test_attributes(tiny_llama_dir, tmp_path):
    rows = [
        {
            **{"chosen": f"a good day {row}{'!' * (row % 4)}", "rejected": f"a BAD day {row}"},
            **{
                "chosen_votes": 0,
                "rejected_votes": 0,
                "chosen_rating": [2, 3, 1],
                "rejected_rating": [-2, -1, row % 3],
            },
        }
        for row in range(40)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = run("attributes.py", str(tmp_path), tiny_llama_dir, "--steps", "2", "--output", "out", cwd=tmp_path)
    assert "After 2 steps on sum of both:" in shown
    found = json.loads((tmp_path / "out" / "found.json").read_text())
    assert found.keys() == {"sum of both", "positive, a quarter calm", "positive, calm 4 or more"}
    assert all(len(values) == 64 for of_policy in found.values() for values in of_policy.values())
    assert (tmp_path / "out" / "attributes.png").stat().st_size > 5_000


def test_dpo(tiny_llama_dir, tmp_path):
    for name, rows in (("train", 32), ("test", 8)):
        said = [{"preference_strength": row % 3} if name == "train" else {"chosen_rating": [1]} for row in range(rows)]
        lines = [{"chosen": f"a good day {row}", "rejected": f"a bad day {row}", **said[row]} for row in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = run("dpo.py", str(tmp_path), tiny_llama_dir, "--samples", "4", "--output", "out", cwd=tmp_path)
    assert "choices: 21 of 32 comparisons" in shown and "strengths: 32 of 32 comparisons" in shown
    found = json.loads((tmp_path / "out" / "found.json").read_text())
    assert all(points[-1]["nll"] < 0.8 and points[-1]["kl"] == points[-1]["kl"] for points in found.values())
    assert (tmp_path / "out" / "dpo.png").stat().st_size > 5_000
    assert (tmp_path / "out" / "strengths" / "disco_likelihood.safetensors").exists()


def test_rloo(reward_dirs, tiny_llama_dir, tmp_path):
    lines = run("rloo.py", reward_dirs["adapter"], tiny_llama_dir, cwd=tmp_path).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [str(step) for step in range(5, 41, 5)]


def test_ppo(reward_dirs, tiny_llama_dir, tmp_path):
    if importlib.util.find_spec("trl.experimental.ppo") is None:
        pytest.skip("TRL 1.13 removed PPOTrainer")
    shown = run("ppo.py", reward_dirs["adapter"], tiny_llama_dir, cwd=tmp_path)
    assert "episode  640" in shown


def test_best_of_n(reward_dirs, tiny_llama_dir, tmp_path):
    shown = run("best_of_n.py", reward_dirs["adapter"], tiny_llama_dir, cwd=tmp_path)
    assert shown.count("The concert in the park") == 3


def test_qlora(wider_llama_dir, tmp_path):
    pytest.importorskip("bitsandbytes")
    run("qlora.py", wider_llama_dir, str(write_pairs(tmp_path / "pairs.jsonl")), cwd=tmp_path)
    assert_adapter_of_four_bits(tmp_path / "runs" / "qlora")


def test_the_qlora_recipe(wider_llama_dir, tmp_path):
    pytest.importorskip("bitsandbytes")
    pairs = str(write_pairs(tmp_path / "pairs.jsonl"))
    command = ["-m", "disco_trl", "train", "--config", str(EXAMPLES / "qlora.yaml")]
    arguments = ["--model_name_or_path", wider_llama_dir, "--dataset_name", pairs]
    options = ["--optim", "adamw_torch", "--use_cpu", "--report_to", "none"]  # as the file says for a CPU
    result = subprocess.run(
        [sys.executable, *command, *arguments, *options], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr
    assert_adapter_of_four_bits(tmp_path / "runs" / "qlora")


def assert_adapter_of_four_bits(path: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    config = json.loads((path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["task_type"]) == ("LORA", 16, "SEQ_CLS")
    loaded = DiscoRewardModel.from_pretrained(
        path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    assert sum(isinstance(module, Linear4bit) for module in loaded.modules()) == 2 * 7
    assert {head.weight.dtype for _, head in loaded.get_base_model().named_reward_heads()} == {torch.float32}
    state = load_file(path / "adapter_model.safetensors")
    targets = {name.split(".lora_")[0].rpartition(".")[2] for name in state if ".lora_" in name}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert state["base_model.model.score.weight"].dtype == torch.float32


def test_serve_client(tiny_llama_dir, tiny_tokenizer, tmp_path):
    with serve(tiny_reward(tiny_llama_dir, tiny_tokenizer)) as url:
        shown = run("serve_client.py", url, cwd=tmp_path)
    assert "What a lovely evening!" in shown
    assert "P(1st ≻ 2nd)" in shown
