"""Score two texts with a checkpoint, and compute the probability that the first is preferred.

python examples/compare_answers.py CHECKPOINT "first text" "second text"
"""

import sys

import torch
from transformers import AutoTokenizer

from disco_trl import DiscoRewardModel


checkpoint, *texts = sys.argv[1:]
model = DiscoRewardModel.from_pretrained(checkpoint)
tokenizer = AutoTokenizer.from_pretrained(checkpoint)

# As in training: a plain text ends with the end-of-text token. (A conversation goes through the chat template.)
inputs = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")
with torch.no_grad():
    reward = model.reward_distribution(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

for text, location, scale, low in zip(texts, reward.location, reward.scale, reward.quantile(0.05), strict=True):
    print(f"{location:5.2f} ± {scale:.2f}   (5 % quantile {low:.2f})   {text}")
print(f"P(first ≻ second) = {reward[0].prob_greater(reward[1]):.2f}")
