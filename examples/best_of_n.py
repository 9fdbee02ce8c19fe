"""Best-of-16: the same candidates, ranked by the location, by a low quantile, and by the win rate.

    python examples/best_of_n.py runs/quickstart/disco .cache/SmolLM2-135M-Instruct

The first argument is the reward model (here the quickstart's LoRA adapter), the second the policy.

    mean
     3.87   (3.87 ± 0.90)   The concert in the park.
     0.77   (0.77 ± 0.75)   My neighbour's dog will die. If she's a senior, that means she has less than
     1.92   (1.92 ± 1.10)   The new update will keep me close. You've been with the team alot, you're
     3.07   (3.07 ± 1.33)   On the way home I was just one moment away from making it myself. I'd always adore flying

    quantile {'q': 0.05}
     2.39   (3.87 ± 0.90)   The concert in the park.
    -0.46   (0.77 ± 0.75)   My neighbour's dog will die. If she's a senior, that means she has less than
     0.25   (1.75 ± 0.91)   The new update of the original article about a college basketball team’s ...
     0.88   (3.07 ± 1.33)   On the way home I was just one moment away from making it myself. I'd always adore flying

    win_rate
     0.82   (3.87 ± 0.90)   The concert in the park.
     0.81   (0.77 ± 0.75)   My neighbour's dog will die. If she's a senior, that means she has less than
     0.81   (1.92 ± 1.10)   The new update will keep me close. You've been with the team alot, you're
     0.84   (3.07 ± 1.33)   On the way home I was just one moment away from making it myself. I'd always adore flying

The three transforms mostly agree, because the scale varies little: on this model's training data, the standard
deviation of μ is 2.1 and that of log σ is 0.14.
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
