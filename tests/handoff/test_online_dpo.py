"""A disco reward model in TRL's experimental `OnlineDPOTrainer`, which ranks two completions of each prompt by it."""

import pytest
import torch
from policy_training import SMALL_RUN, by_hand, handed_off, prompts, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer


@pytest.mark.parametrize(
    ("how", "checkpoint"),
    [("path", "full"), ("path", "adapter"), ("live", "full"), ("live", "adapter"), ("DiscoReward", "adapter")],
)
@pytest.mark.parametrize("kind", ["text", "messages"])
def test_the_score_is_the_location(how, checkpoint, kind, reward_dirs, tiny_llama_dir, tmp_path):
    conversations = []

    def record(prompts, completions, **columns):
        conversations.extend(prompt + completion for prompt, completion in zip(prompts, completions, strict=True))
        return [100.0] * len(prompts)

    path = reward_dirs[checkpoint]
    tokenizer = AutoTokenizer.from_pretrained(path)
    args = OnlineDPOConfig(
        str(tmp_path),
        max_new_tokens=6,
        max_length=128,
        missing_eos_penalty=None,
        reward_weights=[1.0, 0.0],
        **SMALL_RUN,
    )
    trainer = OnlineDPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_llama_dir),
        reward_funcs=[handed_off(path, how), record],
        reward_processing_classes=[tokenizer, None],
        args=args,
        train_dataset=prompts(kind),
        processing_class=tokenizer,
    )
    trainer.train()
    (score,) = (entry["objective/scores"] for entry in trainer.state.log_history if "objective/scores" in entry)
    location, _ = by_hand(path, [token_ids(tokenizer, row, end=how == "DiscoReward") for row in conversations])
    assert len(location) == 8
    assert score == pytest.approx(location.mean().item(), rel=1e-5, abs=1e-5)
    # The two completions of a prompt are half a batch apart.
    margins = (location[:4] - location[4:]).abs()
    assert torch.all(margins > 1e-3)
    (margin,) = (entry["objective/scores_margin"] for entry in trainer.state.log_history if "loss" in entry)
    assert margin == pytest.approx(margins.mean().item(), rel=1e-4, abs=1e-5)
