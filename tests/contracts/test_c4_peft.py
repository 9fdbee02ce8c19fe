"""Contract C4: adapters are trained as with TRL, and the reward head is trained and saved beside them."""

import copy
import json

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    CPTConfig,
    IA3Config,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from tiny_models import MOMENTS
from tiny_training import bradley_terry_trainer, disco_trainer, furthest, preferences, reward_trainer, weights
from transformers import AutoModelForSequenceClassification

from disco_trl import DiscoRewardModel


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "SEQ_CLS"])
def test_lora_on_all_linear_layers_needs_no_more_said(tmp_path, tiny_llama_dir, task_type):
    """TRL, told everything, is the reference; told less, it would adapt the head instead of training it."""
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(), "max_steps": 2}
    users = LoraConfig(r=4, target_modules="all-linear", task_type=task_type)
    before = copy.deepcopy(users.to_dict())
    ours = bradley_terry_trainer(tmp_path, peft_config=users, **arguments)
    full = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    theirs = reward_trainer(tmp_path, peft_config=full, **arguments)
    for trainer in (ours, theirs):
        trainer.train()
    assert furthest(weights(ours.model), weights(theirs.model)) < 1e-4
    assert users.to_dict() == before
    assert users.modules_to_save is None


def test_modules_to_save_of_the_users(tmp_path, tiny_llama_dir):
    users = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences(), peft_config=users)
    assert users.modules_to_save == ["embed_tokens"]
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    whole = {name.partition(".modules_to_save.")[0] for name in trained if "modules_to_save" in name}
    assert whole == {"base_model.model.model.embed_tokens", "base_model.model.score"}


def test_tokens_that_a_chat_template_adds_are_trained(tmp_path, tiny_llama_dir, tiny_tokenizer):
    tiny_tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tiny_tokenizer.save_pretrained(tmp_path / "chat")
    users = LoraConfig(target_modules=["q_proj"])
    trainer = disco_trainer(
        tmp_path,
        model=tiny_llama_dir,
        train_dataset=preferences("conversational"),
        peft_config=users,
        chat_template_path=str(tmp_path / "chat"),
        scale_training="joint",
        calibrate=False,
    )
    assert users.trainable_token_indices is None and users.modules_to_save is None
    new = tiny_tokenizer.convert_tokens_to_ids("<|end|>")
    assert new in trainer.model.peft_config["default"].trainable_token_indices["embed_tokens"]
    trainer.train()
    assert trainer.model.get_base_model().scale_head.weight.abs().max() > 0


PEFT_CONFIGS = {
    "lora": LoraConfig(target_modules="all-linear"),
    "dora": LoraConfig(use_dora=True),
    "ia3": IA3Config(),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=4),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16),
}


@pytest.mark.parametrize("peft_config", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_adapters_keep_the_head(tmp_path, tiny_llama_dir, peft_config):
    """Trained, in float32, saved, and the same when the adapter is loaded by its path."""
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(), "peft_config": peft_config}
    options = {"scale_training": "joint", "calibrate": False}
    trainer = disco_trainer(tmp_path, reward_family="cauchy", **options, **arguments)
    start = weights(trainer.model)
    trainer.train()
    changed = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, start[name])}
    head = {"weight", *(f"scale.{name}" for name in ("weight", *MOMENTS))}
    assert {name.rpartition("modules_to_save.default.")[2] for name in changed if "score" in name} == head
    assert all(module.weight.dtype == torch.float32 for _, module in trainer._reward_model.named_reward_heads())

    trainer.save_model()
    assert json.loads((tmp_path / "disco_config.json").read_text()) == {
        "reward_family": "cauchy",
        "fixed_scale": None,
        "scale_layer": 1,
    }
    loaded = DiscoRewardModel.from_pretrained(tmp_path, dtype="float32").eval()
    batch = {"input_ids": torch.arange(12).reshape(2, 6) + 5}
    with torch.no_grad():
        reward = loaded.reward_distribution(**batch) if hasattr(loaded, "reward_distribution") else None
        outputs = [model.eval()(**batch) for model in (trainer.model, loaded)]
    assert torch.allclose(outputs[0].logits, outputs[1].logits, atol=1e-6)
    assert torch.allclose(outputs[0].scale, outputs[1].scale, atol=1e-6)
    assert reward is not None and reward.family == "cauchy"


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        (
            TrainableTokensConfig(token_indices=[3]),
            r"TRAINABLE_TOKENS.*neither trains nor saves.*trainable_token_indices",
        ),
        (AdaptionPromptConfig(adapter_len=3, adapter_layers=1), r"ADAPTION_PROMPT: it neither trains nor saves.*LoRA"),
        (
            CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3], cpt_mask=[1], cpt_tokens_type_mask=[1]),
            r"CPT: .*causal language models only",
        ),
        (MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2), r"MULTITASK_PROMPT_TUNING: .*task id"),
    ],
    ids=lambda value: getattr(value, "peft_type", ""),
)
def test_kinds_that_cannot_carry_a_reward_are_refused_before_training(tmp_path, tiny_llama_dir, peft_config, message):
    with pytest.raises(ValueError, match=rf"peft_config: a reward model cannot have .*{message}"):
        disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences(), peft_config=peft_config)


def test_a_config_in_inference_mode_is_trained(tmp_path, tiny_llama_dir, caplog):
    # What `PeftConfig.from_pretrained` reads from a saved adapter. TRL's trainer fails in its first backward.
    users = LoraConfig(target_modules=["q_proj"], inference_mode=True)
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences(), peft_config=users)
    assert "inference_mode=True" in caplog.text
    start = weights(trainer.model)
    trainer.train()
    changed = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, start[name])}
    assert any("lora_B" in name for name in changed) and any("score.modules_to_save" in name for name in changed)
    assert users.inference_mode


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_a_peft_model(tmp_path, tiny_llama_dir, tiny_tokenizer, task_type):
    """TRL trains one that was made without a task type, too, but with a frozen head, which it does not save."""
    trainers = []
    for build, config in (
        (bradley_terry_trainer, LoraConfig(task_type=task_type)),
        (reward_trainer, LoraConfig(task_type="SEQ_CLS")),
    ):
        torch.manual_seed(1)
        stock = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1, dtype="float32")
        model = get_peft_model(stock, config)
        arguments = {"model": model, "train_dataset": preferences(), "processing_class": tiny_tokenizer}
        trainer = build(tmp_path, **arguments)
        trainer.train()
        assert trainer.model is model
        trainers.append(trainer)
    assert furthest(*(weights(trainer.model) for trainer in trainers)) < 1e-4
    trainers[0].save_model()
    loaded = DiscoRewardModel.from_pretrained(tmp_path, dtype="float32").eval()
    ids = torch.arange(12).reshape(2, 6) + 5
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainers[1].model.eval()(ids).logits, rtol=0, atol=1e-5)
