"""What a checkpoint says about two texts, from Python.

python examples/compare_answers.py CHECKPOINT "first text" "second text"
"""

import sys

import torch
from transformers import AutoTokenizer

from disco_trl import DiscoRewardModel, RewardDistribution


checkpoint, *texts = sys.argv[1:]
model = DiscoRewardModel.from_pretrained(checkpoint)
tokenizer = AutoTokenizer.from_pretrained(checkpoint)

# As in training: a plain text ends with the end-of-text token. (A conversation goes through the chat template.)
inputs = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")
with torch.no_grad():
    reward = model.reward_distribution(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

for text, location, scale, low in zip(texts, reward.location, reward.scale, reward.quantile(0.05), strict=True):
    print(f"{location:5.2f} ± {scale:.2f}   (5 % quantile {low:.2f})   {text}")
first, second = (RewardDistribution(reward.location[i], reward.scale[i], reward.family) for i in (0, 1))
print(f"P(first ≻ second) = {first.prob_greater(second):.2f}")
