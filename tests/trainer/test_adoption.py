"""How TRL's constructor comes by a disco model, and that nobody else does."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import patched_trl
import pytest
from tiny_training import disco_trainer, preferences, reward_trainer
from transformers import AutoModelForSequenceClassification
from trl.trainer import reward_trainer as trl_reward_trainer

from disco_trl import DiscoRewardModel
from disco_trl.trainer.adoption import Adoption


def test_a_plain_trainer_in_another_thread_keeps_its_class(tmp_path, tiny_llama_dir, monkeypatch):
    """TRL's global is one for the process: a plain `RewardTrainer` built while ours loads must not be ours."""
    ours_loads, plain_is_built = threading.Event(), threading.Event()
    load = Adoption.load

    def slow_load(*args, **kwargs):
        ours_loads.set()
        assert plain_is_built.wait(timeout=120)
        return load(*args, **kwargs)

    monkeypatch.setattr(Adoption, "load", slow_load)
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(disco_trainer, tmp_path / "ours", model=tiny_llama_dir, train_dataset=preferences())
        assert ours_loads.wait(timeout=120)
        try:
            plain = reward_trainer(tmp_path / "plain", model=tiny_llama_dir, train_dataset=preferences())
        finally:
            plain_is_built.set()
        assert isinstance(ours.result().model, DiscoRewardModel)
    assert not isinstance(plain.model, DiscoRewardModel)
    assert trl_reward_trainer.AutoModelForSequenceClassification is AutoModelForSequenceClassification


@pytest.mark.parametrize("order", ["before", "after"])
def test_trl_patched_by_another_library(tmp_path, tiny_llama_dir, order):
    """Its trainer is a generated one then, whose module has globals of its own."""
    result = subprocess.run(
        [sys.executable, patched_trl.__file__, order, tiny_llama_dir, str(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert ("PatchedRewardTrainer" in found["bases"]) is (order == "before")
    assert ("PatchedRewardConfig" in found["bases"]) is (order == "before")
    assert found["is_disco"] and found["is_adopted"]
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences(rows=8), max_steps=1)
    trainer.train()
    assert found["loss"] == trainer.state.log_history[0]["loss"]
    assert found["scale_mean"] == trainer.state.log_history[0]["scale_mean"]
