"""QLoRA: a language model in 4 bits, LoRA adapters on all linear layers, and the full reward head in float32.

    pip install "disco-trl[quantization]"
    python examples/qlora.py MODEL DATASET

MODEL is a Hub id or a folder of a language model, DATASET a preference dataset as in `train.py`. The reward head needs
no settings: it is excluded from quantization, trained, kept in float32 and saved with the adapter automatically. The
script runs on a GPU and, slowly, on a CPU. `qlora.yaml` is its counterpart for the command line.
"""

import sys

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from disco_trl import DiscoRewardConfig, DiscoRewardTrainer
from disco_trl.data.files import load_preferences


model, dataset = sys.argv[1:]
trainer = DiscoRewardTrainer(
    model=model,
    args=DiscoRewardConfig(
        output_dir="runs/qlora",
        learning_rate=2e-4,
        # Pages the optimizer state out of GPU memory when it runs short. bitsandbytes supports it on CUDA only.
        optim="paged_adamw_8bit" if torch.cuda.is_available() else "adamw_torch",
        use_cpu=not torch.accelerator.is_available(),
        model_init_kwargs={"dtype": "bfloat16"},  # dtype of what is not quantized: embeddings and norms
    ),
    train_dataset=load_preferences(dataset)["train"],
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()

# The adapter was trained on the quantized weights, so it is loaded onto them too. To merge it into the original
# weights, see docs/distributed.md and `disco-trl export`.
print("The adapter is in runs/qlora: DiscoRewardModel.from_pretrained('runs/qlora', quantization_config=...)")
