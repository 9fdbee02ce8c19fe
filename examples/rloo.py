"""RLOO with two weighted rewards: the 10 % quantile of a learned reward, and a Python function.

    python examples/rloo.py runs/quickstart/disco .cache/SmolLM2-135M-Instruct

The first argument is the reward model (here the quickstart's LoRA adapter), the second the language model to train.

    step   5   10 % quantile  0.00   location  1.25 ± 0.97   sentences 0.62
    step  10   10 % quantile  0.33   location  1.61 ± 1.00   sentences 0.63
    step  15   10 % quantile  0.94   location  2.29 ± 1.05   sentences 0.74
    step  20   10 % quantile  1.58   location  2.98 ± 1.10   sentences 0.82
    step  25   10 % quantile  2.02   location  3.51 ± 1.16   sentences 0.84
    step  30   10 % quantile  2.19   location  3.71 ± 1.19   sentences 0.84
    step  35   10 % quantile  2.46   location  3.98 ± 1.19   sentences 0.87
    step  40   10 % quantile  2.51   location  4.07 ± 1.21   sentences 0.93
"""

import sys

import torch
from datasets import Dataset
from openings import OPENINGS
from peft import LoraConfig
from trl import RLOOConfig, RLOOTrainer

from disco_trl import DiscoReward


def ends_a_sentence(completions: list[str], **columns: object) -> list[float]:
    """1 for a completion that contains a full stop, otherwise 0."""
    return [float("." in completion) for completion in completions]


reward_model, policy = sys.argv[1:]
trainer = RLOOTrainer(
    model=policy,
    reward_funcs=[DiscoReward(reward_model, transform="quantile", q=0.1), ends_a_sentence],
    args=RLOOConfig(
        output_dir="runs/rloo",
        reward_weights=[1.0, 0.5],
        max_steps=40,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=16,
        learning_rate=5e-4,
        logging_steps=5,
        use_cpu=not torch.accelerator.is_available(),
        bf16=True,
        model_init_kwargs={"dtype": "bfloat16"},
        report_to="none",
        save_strategy="no",
    ),
    train_dataset=Dataset.from_dict({"prompt": OPENINGS}),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
for log in trainer.state.log_history[:-1]:
    print(
        f"step {log['step']:3d}   10 % quantile {log['rewards/disco_quantile/mean']:5.2f}   "
        f"location {log['disco_quantile/location/mean']:5.2f} ± {log['disco_quantile/scale/mean']:.2f}   "
        f"sentences {log['rewards/ends_a_sentence/mean']:.2f}"
    )
