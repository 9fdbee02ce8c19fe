"""Contract C8: DPO's sigmoid loss, TRL's, is a special case of ours.

With `DiscoDPOConfig(reward_family="logistic", fixed_scale=2**-0.5)`, which is the default, the likelihood of a forced
choice is sigmoid(β (log-ratio of the chosen − log-ratio of the rejected answer)), so that a `DiscoDPOTrainer` must do
what `trl.DPOTrainer` does with the same arguments and seed. Plain paths are compared: `prefix_sharing=False`.
"""

import pytest
import torch
from dpo_training import disco_dpo_trainer, dpo_trainer, sigmoid_trainer
from peft import LoraConfig, get_peft_model
from tiny_training import furthest, preferences, weights
from train_both import run_both
from transformers import AutoModelForCausalLM


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
STOCHASTIC = {"max_steps": 6, "learning_rate": 0.3, "optim": "sgd"}


def assert_same_run(ours, theirs, tolerance: float = 3e-6) -> None:
    moved, difference = run_both(ours, theirs)
    assert moved > 1e-4
    assert difference < tolerance


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"precompute_ref_log_probs": True},
        {"ld_alpha": 0.3},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.2]},
        {"loss_type": ["apo_zero", "sigmoid"]},
        {"loss_type": ["sft", "sigmoid", "sft"], "loss_weights": [0.1, 0.7, 0.2]},
        {"max_length": 20, "truncation_mode": "keep_start"},
        {"sync_ref_model": True, "ref_model_sync_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 3},
    ],
    ids=lambda options: "-".join(map(str, [*options, *options.get("loss_type", [])])) or "plain",
)
@pytest.mark.parametrize("kind", ["standard", "conversational"])
def test_a_run_is_trls(tmp_path, tiny_llama_dir, kind, options):
    data = {"train_dataset": preferences(kind, rows=18), "eval_dataset": preferences(kind, rows=8, seed=1)}
    arguments = {"model": tiny_llama_dir, **data, **STOCHASTIC, **options}
    assert_same_run(sigmoid_trainer(tmp_path / "ours", **arguments), dpo_trainer(tmp_path / "theirs", **arguments))


@pytest.mark.parametrize("kind", ["standard implicit", "conversational implicit", "tools"])
def test_each_format_of_the_data_is_trls(tmp_path, tiny_llama_dir, kind):
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(kind, rows=8), **STOCHASTIC, "max_steps": 2}
    assert_same_run(sigmoid_trainer(tmp_path / "ours", **arguments), dpo_trainer(tmp_path / "theirs", **arguments))


def test_a_new_adapter_has_the_base_for_its_reference(tmp_path, tiny_llama_dir):
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(), "peft_config": LORA, **STOCHASTIC}
    trainers = []
    for build in (sigmoid_trainer, dpo_trainer):
        torch.manual_seed(1)  # TRL 1.12 seeds nothing before it makes the adapter.
        trainers.append(build(tmp_path, **arguments))
    assert_same_run(*trainers)


def test_an_adapter_that_is_trained_on_has_itself_for_its_reference(tmp_path, tiny_llama_dir, tiny_tokenizer):
    trainers = []
    for build in (sigmoid_trainer, dpo_trainer):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype="float32")
        model = get_peft_model(model, LoraConfig(**{**LORA.to_dict(), "init_lora_weights": False}))
        trainers.append(
            build(tmp_path, model=model, processing_class=tiny_tokenizer, train_dataset=preferences(), **STOCHASTIC)
        )
    assert_same_run(*trainers)


def test_a_reference_of_ones_own(tmp_path, tiny_llama_dir, tiny_tokenizer):
    trainers = []
    for build in (sigmoid_trainer, dpo_trainer):
        torch.manual_seed(1)
        other = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype="float32")
        with torch.no_grad():
            other.lm_head.weight.add_(0.1 * torch.randn_like(other.lm_head.weight))
        trainers.append(
            build(tmp_path, model=tiny_llama_dir, ref_model=other, train_dataset=preferences(), **STOCHASTIC)
        )
    assert_same_run(*trainers)


def test_the_default_is_trls_loss(tmp_path, tiny_llama_dir):
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(), **STOCHASTIC}
    assert_same_run(disco_dpo_trainer(tmp_path, **arguments), dpo_trainer(tmp_path, **arguments), tolerance=1e-5)


def test_what_is_saved_is_what_trl_saves(tmp_path, tiny_llama_dir):
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(), "max_steps": 1}
    for build, name in ((sigmoid_trainer, "ours"), (dpo_trainer, "theirs")):
        trainer = build(tmp_path / name, **arguments)
        trainer.train()
        trainer.save_model()
    ours, theirs = ({path.name for path in (tmp_path / name).iterdir()} for name in ("ours", "theirs"))
    assert ours == theirs
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert "shared_prefix" not in (tmp_path / "ours" / "config.json").read_text()
    assert furthest(weights(loaded), weights(trainer.model)) < 1e-5
