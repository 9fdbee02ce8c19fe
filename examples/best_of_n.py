"""Best-of-16: the same candidates, ranked by the location and by what nearly everybody would grant.

    python examples/best_of_n.py runs/quickstart/disco .cache/SmolLM2-135M-Instruct

The first argument is the reward model (here the quickstart's LoRA adapter), the second the language model to ask.

OUTPUT
"""

import sys

import torch
from openings import HELD_OUT_OPENINGS
from transformers import AutoModelForCausalLM, AutoTokenizer

from disco_trl import DiscoRewardModel, best_of_n


reward_path, policy_path = sys.argv[1:]
reward_model = DiscoRewardModel.from_pretrained(reward_path)
reward_tokenizer = AutoTokenizer.from_pretrained(reward_path)
tokenizer = AutoTokenizer.from_pretrained(policy_path, padding_side="left")
policy = AutoModelForCausalLM.from_pretrained(policy_path)

torch.manual_seed(0)
inputs = tokenizer(HELD_OUT_OPENINGS, padding=True, return_tensors="pt")
generated = policy.generate(**inputs, max_new_tokens=16, do_sample=True, num_return_sequences=16)
answers = tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
candidates = [answers[start : start + 16] for start in range(0, len(answers), 16)]

for transform, options in (("mean", {}), ("quantile", {"q": 0.05}), ("win_rate", {})):
    print(f"\n{transform} {options or ''}")
    picked = best_of_n(
        HELD_OUT_OPENINGS, candidates, transform, model=reward_model, processing_class=reward_tokenizer, **options
    )
    for opening, best in zip(HELD_OUT_OPENINGS, picked, strict=True):
        text = (opening + best.candidate).splitlines()[0]
        location, scale = best.distribution.location[best.index], best.distribution.scale[best.index]
        print(f"{best.rewards[best.index]:5.2f}   ({location:.2f} ± {scale:.2f})   {text}")
