"""
A process that takes whatever HF_ENDPOINT says for the Hub. Prints scores of two texts as its last line.

    python push_and_load.py push full|adapter REPO BASE FOLDER STRATEGY    # train, pushing as TRL users do
    python push_and_load.py load REPO                                              # load it again from the Hub
"""

import json
import sys

import torch
from peft import LoraConfig
from tiny_training import disco_trainer, preferences
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from disco_trl import DiscoRewardModel
from disco_trl.models.inference import score


TEXTS = ["The answer to the question is short.", "Some people like this film a lot."]


def push(kind: str, repo: str, base: str, folder: str, strategy: str) -> dict:
    """Train two steps, save and push; the scores of what was trained."""
    trainer = disco_trainer(
        folder,
        model=base,
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=preferences(),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]) if kind == "adapter" else None,
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
        push_to_hub=True,
        hub_model_id=repo,
        hub_strategy=strategy,
    )
    trainer.train()
    if strategy == "end":
        trainer.push_to_hub(dataset_name="someone/preferences")
    return scores(trainer.model, trainer.processing_class)


def load(repo: str) -> dict:
    """The scores of what the Hub has, as a reward distribution and as any other tool would read it."""
    tokenizer = AutoTokenizer.from_pretrained(repo)
    found = scores(DiscoRewardModel.from_pretrained(repo), tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(repo, num_labels=1).eval()
    with torch.no_grad():
        found["scalar"] = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in TEXTS]
    return found


def scores(model, tokenizer) -> dict:
    """Locations and scales of the texts."""
    rewards = score(model, [tokenizer(text)["input_ids"] for text in TEXTS])
    return {"location": rewards.location.tolist(), "scale": rewards.scale.tolist()}


if __name__ == "__main__":
    action, *arguments = sys.argv[1:]
    print(json.dumps({"push": push, "load": load}[action](*arguments)))
