"""How TRL's constructor comes by a disco model, and that nobody else does."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import patched_trl
import pytest
import torch
from tiny_training import disco_trainer, preferences, reward_trainer
from transformers import AutoModelForSequenceClassification
from trl.trainer import reward_trainer as trl_reward_trainer

from disco_trl import DiscoRewardModel, RewardDistribution
from disco_trl.distributions.judgements import Judgements
from disco_trl.distributions.likelihood import Responses, log_likelihood
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


# Margins beside label noise


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("margins", "label_noise", "count"),
    [
        ([20.0, 25.0, 0.5, 0.0], None, "2 of 4 margins, up to 25,"),
        ([20.0, 25.0, 0.5, 0.0], 0.1, "2 of 4 margins, up to 25,"),
        ([20.0, 25.0, 0.5, 0.0], 0.0, None),
        ([2.0, 1.0, 0.5, 0.0], None, None),
    ],
    ids=str,
)
def test_margins_that_label_noise_swallows(
    tmp_path, tiny_llama_dir, tiny_tokenizer, caplog, margins, label_noise, count, streaming
):
    data = preferences(rows=4).add_column("margin", margins)
    trainer = disco_trainer(
        tmp_path,
        model=tiny_llama_dir,
        processing_class=tiny_tokenizer,
        train_dataset=data.to_iterable_dataset() if streaming else data,
        label_noise=label_noise,
        max_steps=1,
        calibrate=False,
    )
    said = [record.getMessage() for record in caplog.records if "label noise explains" in record.getMessage()]
    assert len(said) == (count is not None)
    if count is None:
        return
    assert count in said[0] and "Divide the margins" in said[0]
    # And it is so: with margins of 20 alone the location gets no gradient to speak of.
    gradients = {}
    for margin in (20.0, 0.5):
        rewards = RewardDistribution(torch.zeros(2, requires_grad=True), torch.ones(2), "normal")
        one = Judgements.forced_choices(1, torch.device("cpu"), torch.tensor([margin]))
        noise = Responses(label_noise=torch.tensor(0.06))
        log_likelihood(rewards[:1], rewards[1:], one, noise).sum().backward()
        gradients[margin] = rewards.location.grad.abs().max().item()
    assert gradients[20.0] < 1e-3 * gradients[0.5]
    assert trainer.state.global_step == 0
