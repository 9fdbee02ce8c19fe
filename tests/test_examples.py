"""The examples, run as a reader runs them, with tiny models in place of real ones."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from reward_server import serve, tiny_reward


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


def test_serve_client(tiny_llama_dir, tiny_tokenizer, tmp_path):
    with serve(tiny_reward(tiny_llama_dir, tiny_tokenizer)) as url:
        shown = run("serve_client.py", url, cwd=tmp_path)
    assert "What a lovely evening!" in shown
    assert "P(1st ≻ 2nd)" in shown
