"""Contract C4: adapters are trained as with TRL, and the reward head is trained and saved beside them."""

import copy
import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import SCALE_STATE
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
}


@pytest.mark.parametrize("peft_config", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_adapters_keep_the_head(tmp_path, tiny_llama_dir, peft_config):
    """Trained, in float32, saved, and the same when the adapter is loaded by its path."""
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(), "peft_config": peft_config}
    trainer = disco_trainer(tmp_path, reward_family="cauchy", **arguments)
    start = weights(trainer.model)
    trainer.train()
    changed = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, start[name])}
    head = {"weight", *(f"scale.{name}" for name in SCALE_STATE)}
    assert {name.rpartition("modules_to_save.default.")[2] for name in changed if "score" in name} == head
    assert all(module.weight.dtype == torch.float32 for _, module in trainer._reward_model.named_reward_heads())

    trainer.save_model()
    assert json.loads((tmp_path / "disco_config.json").read_text()) == {"reward_family": "cauchy", "fixed_scale": None}
    loaded = DiscoRewardModel.from_pretrained(tmp_path, dtype="float32").eval()
    batch = {"input_ids": torch.arange(12).reshape(2, 6) + 5}
    with torch.no_grad():
        reward = loaded.reward_distribution(**batch) if hasattr(loaded, "reward_distribution") else None
        outputs = [model.eval()(**batch) for model in (trainer.model, loaded)]
    assert torch.allclose(outputs[0].logits, outputs[1].logits, atol=1e-6)
    assert torch.allclose(outputs[0].scale, outputs[1].scale, atol=1e-6)
    assert reward is not None and reward.family == "cauchy"


def test_a_peft_model(tmp_path, tiny_llama_dir, tiny_tokenizer):
    trainers = []
    for build in (bradley_terry_trainer, reward_trainer):
        torch.manual_seed(1)
        stock = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1, dtype="float32")
        model = get_peft_model(stock, LoraConfig(task_type="SEQ_CLS"))
        arguments = {"model": model, "train_dataset": preferences(), "processing_class": tiny_tokenizer}
        trainer = build(tmp_path, **arguments)
        trainer.train()
        assert trainer.model is model
        trainers.append(trainer)
    assert furthest(*(weights(trainer.model) for trainer in trainers)) < 1e-4
