"""Train a reward model: a TRL script in which two class names have changed.

    python examples/train.py MODEL DATASET

MODEL is a Hub id or a folder of a language model, an existing reward model, a disco checkpoint, or a LoRA adapter of
one. DATASET is a preference dataset of any type that TRL accepts: a Hub id, a folder, or a .jsonl or .parquet file.
"""

import sys

from peft import LoraConfig

from disco_trl import DiscoRewardConfig, DiscoRewardTrainer
from disco_trl.data.files import load_preferences


model, dataset = sys.argv[1:]
trainer = DiscoRewardTrainer(  # was: RewardTrainer
    model=model,
    args=DiscoRewardConfig(output_dir="runs/reward"),  # was: RewardConfig
    train_dataset=load_preferences(dataset)["train"],
    peft_config=LoraConfig(target_modules="all-linear"),  # The reward head is trained and saved automatically.
)
trainer.train()
trainer.save_model()
