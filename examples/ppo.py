"""PPO with the certainty equivalent of a reward, μ - σ²/2β: what a risk-averse person would accept in its place.

    pip install "disco-trl[ppo]"    # trl 1.12 is the last with PPOTrainer
    python examples/ppo.py runs/quickstart/disco .cache/SmolLM2-135M-Instruct

The first argument is the reward model (here the quickstart's LoRA adapter), the second the language model to train.
For the location alone, pass `reward_model=reward_model`. TRL's PPO reads the reward at the last token of the answer.
If that is not the end-of-text token, it is the reward of an unfinished text, which `missing_eos_penalty` discourages.

    episode   80   certainty equivalent  0.49   KL   0.59   reward less KL  0.48
    episode  160   certainty equivalent  1.44   KL   1.60   reward less KL  1.41
    episode  240   certainty equivalent  1.03   KL   3.24   reward less KL  0.97
    episode  320   certainty equivalent  1.57   KL   6.05   reward less KL  1.45
    episode  400   certainty equivalent  2.19   KL   7.55   reward less KL  2.04
    episode  480   certainty equivalent  2.12   KL   8.18   reward less KL  1.96
    episode  560   certainty equivalent  2.30   KL   8.37   reward less KL  2.13
    episode  640   certainty equivalent  2.91   KL  10.74   reward less KL  2.70
"""

import sys

import torch
from datasets import Dataset
from openings import OPENINGS
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

from disco_trl import DiscoRewardModel


reward_path, policy_path = sys.argv[1:]
reward_model = DiscoRewardModel.from_pretrained(reward_path, dtype=torch.bfloat16).merge_and_unload()
tokenizer = AutoTokenizer.from_pretrained(policy_path, padding_side="left")
trainer = PPOTrainer(
    args=PPOConfig(
        output_dir="runs/ppo",
        total_episodes=16 * 40,
        per_device_train_batch_size=16,  # at most the number of prompts
        local_rollout_forward_batch_size=16,
        num_ppo_epochs=2,
        response_length=16,
        temperature=1.0,
        learning_rate=3e-4,
        kl_coef=0.02,
        stop_token="eos",
        num_sample_generations=0,
        logging_steps=1,
        gradient_checkpointing=False,
        use_cpu=not torch.accelerator.is_available(),
        bf16=True,
        report_to="none",
        save_strategy="no",
    ),
    processing_class=tokenizer,
    model=AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.bfloat16),
    ref_model=None,  # the policy without its adapter
    reward_model=reward_model.as_scalar("certainty_equivalent", beta=1.0),
    value_model=AutoModelForSequenceClassification.from_pretrained(policy_path, num_labels=1),
    train_dataset=Dataset.from_dict({"input_ids": tokenizer(OPENINGS)["input_ids"]}),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
for log in trainer.state.log_history[4::5]:
    print(
        f"episode {log['episode']:4d}   certainty equivalent {log['objective/scores']:5.2f}   "
        f"KL {log['objective/kl']:6.2f}   reward less KL {log['objective/rlhf_reward']:5.2f}"
    )
