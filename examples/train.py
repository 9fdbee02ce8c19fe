"""A TRL reward-modelling script in which two class names have changed.

    python examples/train.py MODEL DATASET

MODEL is a Hub id or a folder: a language model, a reward model that you have, a disco checkpoint, or a LoRA adapter of
one. DATASET is a preference dataset of any type that TRL takes: a Hub id, a folder, or a .jsonl or .parquet file.
"""

import sys

import torch
from peft import LoraConfig

from disco_trl import DiscoRewardConfig, DiscoRewardTrainer
from disco_trl.data.files import load_preferences


model, dataset = sys.argv[1:]
trainer = DiscoRewardTrainer(  # was: RewardTrainer
    model=model,
    args=DiscoRewardConfig(  # was: RewardConfig
        output_dir="runs/reward",
        use_cpu=not torch.accelerator.is_available(),  # TRL's default of bf16 has to be told so on a CPU
    ),
    train_dataset=load_preferences(dataset)["train"],
    peft_config=LoraConfig(target_modules="all-linear"),  # the reward head is trained and saved with it by itself
)
trainer.train()
trainer.save_model()
