"""A disco reward model in TRL's `PPOTrainer`, which TRL had until 1.12: its scores are the rewards worked out by hand.

PPO runs the backbone over padded token ids and reads `model.score` at the last token before the padding.
"""

import pytest
import torch
from policy_training import SMALL_RUN, by_hand, prompts
from tiny_models import load, randomize_heads
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from disco_trl import DiscoRewardModel


ppo = pytest.importorskip("trl.experimental.ppo", reason="TRL 1.13 removed PPOTrainer")


def run_ppo(policy, reward_model, output_dir):
    """The scores that each of two updates logged, and the token ids that they are of."""
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    dataset = prompts().map(
        lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=["prompt"]
    )
    sequences = []

    def record(backbone, args, kwargs):
        rows = zip(kwargs["input_ids"].tolist(), kwargs["attention_mask"].tolist(), strict=True)
        sequences.append([[token for token, is_text in zip(*row, strict=True) if is_text] for row in rows])

    getattr(reward_model, reward_model.base_model_prefix).register_forward_pre_hook(record, with_kwargs=True)
    settings = {**SMALL_RUN, "max_steps": -1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    args = ppo.PPOConfig(
        str(output_dir),
        **settings,
        total_episodes=8,
        num_mini_batches=1,
        num_ppo_epochs=1,
        response_length=6,
        stop_token="eos",
        missing_eos_penalty=None,
        num_sample_generations=0,
    )
    trainer = ppo.PPOTrainer(
        args,
        tokenizer,
        AutoModelForCausalLM.from_pretrained(policy),
        AutoModelForCausalLM.from_pretrained(policy),
        reward_model,
        dataset,
        value_model=randomize_heads(DiscoRewardModel.from_pretrained(policy)),
        eval_dataset=dataset,
    )
    trainer.train()
    return [entry["objective/scores"] for entry in trainer.state.log_history if "objective/scores" in entry], sequences


def assert_scores(scores, sequences, path, transform=lambda location, scale: location, scale_layer=None):
    assert len(scores) == len(sequences) == 2
    for score, ids in zip(scores, sequences, strict=True):
        location, scale = by_hand(path, ids, scale_layer)
        expected = transform(location, scale)
        assert expected.std() > 0.01
        assert score == pytest.approx(expected.mean().item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("checkpoint", ["full", "adapter", "merged"])
def test_live(checkpoint, reward_dirs, tiny_llama_dir, tmp_path):
    scores, sequences = run_ppo(tiny_llama_dir, load(reward_dirs[checkpoint]), tmp_path)
    assert_scores(scores, sequences, reward_dirs[checkpoint])


@pytest.mark.parametrize("checkpoint", ["full", "adapter", "merged"])
def test_by_path(checkpoint, reward_dirs, tiny_llama_dir, tmp_path):
    """As TRL's PPO script does."""
    model = AutoModelForSequenceClassification.from_pretrained(reward_dirs[checkpoint], num_labels=1)
    scores, sequences = run_ppo(tiny_llama_dir, model, tmp_path)
    assert_scores(scores, sequences, reward_dirs[checkpoint])


@pytest.mark.parametrize("checkpoint", ["full", "adapter", "merged"])
def test_with_the_uncertainty_used(checkpoint, reward_dirs, tiny_llama_dir, tmp_path):
    model = load(reward_dirs[checkpoint]).as_scalar("lower_bound", k=1)
    scores, sequences = run_ppo(tiny_llama_dir, model, tmp_path)
    assert_scores(scores, sequences, reward_dirs[checkpoint], lambda location, scale: location - scale)


@pytest.mark.parametrize("scale_layer", [1, 2])
def test_with_a_scale_that_reads_a_layer(scale_layer, tiny_llama_dir, tiny_tokenizer, tmp_path):
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir)
    model.set_scale_layer(scale_layer)
    randomize_heads(model).save_pretrained(tmp_path / "reward")
    tiny_tokenizer.save_pretrained(tmp_path / "reward")
    scalar = load(tmp_path / "reward").as_scalar("lower_bound", k=1)
    scores, sequences = run_ppo(tiny_llama_dir, scalar, tmp_path)
    assert_scores(scores, sequences, tmp_path / "reward", lambda location, scale: location - scale, scale_layer)


@pytest.mark.parametrize(
    ("transform", "options", "by_hand_too"),
    [
        ("mean", {}, lambda location, scale: location),
        ("quantile", {"q": 0.2}, lambda location, scale: location - 0.8416212 * scale),  # Φ⁻¹(0.8)
        ("certainty_equivalent", {"beta": 2.0}, lambda location, scale: location - scale.square() / 4),
    ],
)
def test_other_transforms(transform, options, by_hand_too, reward_dirs, tiny_llama_dir, tmp_path):
    model = load(reward_dirs["full"]).as_scalar(transform, **options)
    scores, sequences = run_ppo(tiny_llama_dir, model, tmp_path)
    assert_scores(scores, sequences, reward_dirs["full"], by_hand_too)


def test_draws_differ_from_the_location_by_their_scale(reward_dirs, tiny_llama_dir, tmp_path):
    model = load(reward_dirs["full"]).as_scalar("sample", seed=3)
    scores, sequences = run_ppo(tiny_llama_dir, model, tmp_path)
    for score, ids in zip(scores, sequences, strict=True):
        location, scale = by_hand(reward_dirs["full"], ids)
        error = scale.square().mean().sqrt() / len(ids) ** 0.5  # standard deviation of the mean of the draws
        assert 1e-3 < abs(score - location.mean()) / error < 4
    assert torch.tensor(scores).std() > 1e-3
