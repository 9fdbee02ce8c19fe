"""Contract C4: what training saves, and how it goes on from there."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_training import disco_trainer, furthest, logged, preferences, reward_trainer, weights
from transformers import TrainerCallback


class WeightsAfterEachStep(TrainerCallback):
    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = weights(model)


# During training


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resuming_gives_the_same_bits(tmp_path, tiny_llama_dir, lora):
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(rows=32)}
    arguments |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    arguments |= {"peft_config": LoraConfig(task_type="SEQ_CLS") if lora else None}
    straight = disco_trainer(tmp_path, **arguments)
    straight.train()
    resumed = disco_trainer(tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert straight.state.global_step == resumed.state.global_step == 6
    assert furthest(weights(straight.model), weights(resumed.model)) == 0
    assert straight._reward_model.scale_head.mean_hidden.any()  # it is among the weights
    assert logged(straight, "scale")[-1] == logged(resumed, "scale")[-1]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_load_best_model_at_end(tmp_path, tiny_llama_dir, lora):
    trainer = disco_trainer(
        tmp_path,
        model=tiny_llama_dir,
        train_dataset=preferences(),
        eval_dataset=preferences(rows=4, seed=1),
        peft_config=LoraConfig(task_type="SEQ_CLS") if lora else None,
        load_best_model_at_end=True,
        metric_for_best_model="num_tokens",  # the fewer tokens seen the better: the first checkpoint is the best
        greater_is_better=False,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
    )
    after_step = WeightsAfterEachStep()
    trainer.add_callback(after_step)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert furthest(weights(trainer.model), after_step.weights[2]) == 0
    assert furthest(weights(trainer.model), after_step.weights[4]) > 0


# Going on from a checkpoint


def locations(model, tokenizer) -> torch.Tensor:
    batch = tokenizer(["the answer", "a short film about people"], return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_from_a_bradley_terry_checkpoint(tmp_path, tiny_llama_dir, tiny_tokenizer):
    theirs = reward_trainer(tmp_path / "bt", model=tiny_llama_dir, train_dataset=preferences())
    theirs.train()
    theirs.save_model()
    options = {"scale_training": "joint", "calibrate": False}
    ours = disco_trainer(tmp_path / "disco", model=str(tmp_path / "bt"), train_dataset=preferences(), **options)
    assert torch.allclose(locations(ours.model, tiny_tokenizer), locations(theirs.model, tiny_tokenizer), atol=1e-6)
    ours.train()
    assert ours.model.scale_head.weight.abs().max() > 0


@pytest.mark.parametrize("lora", [False, True], ids=["full", "adapter"])
def test_from_a_checkpoint_of_ours(tmp_path, tiny_llama_dir, tiny_tokenizer, lora):
    first = disco_trainer(
        tmp_path / "first",
        model=tiny_llama_dir,
        train_dataset=preferences(),
        reward_family="cauchy",
        peft_config=LoraConfig() if lora else None,
    )
    first.train()
    first.save_model()
    second = disco_trainer(tmp_path / "second", model=str(tmp_path / "first"), train_dataset=preferences())
    assert isinstance(second.model, PeftModel) == lora
    assert second._family.name == "cauchy"
    assert furthest(weights(first.model), weights(second.model)) == 0
    before = locations(second.model, tiny_tokenizer)
    # The same weights at other addresses: matrix products may round differently.
    assert torch.allclose(before, locations(first.model, tiny_tokenizer), atol=1e-6)
    second.train()
    trained = {name for name, parameter in second.model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in first.model.named_parameters() if parameter.requires_grad}
    assert not torch.equal(before, locations(second.model, tiny_tokenizer))


# What is saved


@pytest.mark.parametrize("lora", [False, True], ids=["full", "adapter"])
def test_tags_and_model_card(tmp_path, tiny_llama_dir, lora):
    trainer = disco_trainer(
        tmp_path,
        model=tiny_llama_dir,
        train_dataset=preferences(),
        eval_dataset=preferences(rows=4, seed=1),
        peft_config=LoraConfig() if lora else None,
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train()
    trainer.evaluate()
    assert {"trl", "reward-trainer", "disco-trl"} <= set(trainer._reward_model.model_tags or trainer.model.model_tags)
    assert (tmp_path / "README.md").exists()  # with the checkpoint, as TRL writes its own
    trainer.create_model_card(model_name="my-model", dataset_name="someone/votes", tags="extra")
    card = ModelCard.load(tmp_path / "README.md")
    assert set(card.data.tags) == {"trl", "reward-trainer", "disco-trl", "extra"}
    assert card.data.datasets in ("someone/votes", ["someone/votes"])
    assert card.data.library_name == ("peft" if lora else "transformers")
    assert card.data.model_name == "my-model"
    for part in ("# my-model", "normal", "Φ(", "eval_nll", "someone/votes", "AutoModelForSequenceClassification"):
        assert part in card.text
    assert tiny_llama_dir not in card.content  # a path on this machine means nothing to a reader


def test_a_saved_model_holds_the_head(tmp_path, tiny_llama_dir):
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences())
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    for name in ("score.weight", "score.scale.weight", "score.scale.mean_hidden"):
        assert torch.equal(saved[name], trainer.model.state_dict()[name])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
