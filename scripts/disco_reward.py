"""Train a reward model with an error bar, from preference pairs. Takes the arguments of `trl reward`.

One GPU:

    python scripts/disco_reward.py \\
        --model_name_or_path Qwen/Qwen3-0.6B \\
        --dataset_name trl-lib/ultrafeedback_binarized \\
        --reward_family normal \\
        --eval_strategy steps --eval_steps 50 \\
        --output_dir outputs/Qwen3-0.6B-disco

Eight GPUs (`--config_file` takes an accelerate config for FSDP or DeepSpeed):

    accelerate launch --num_processes 8 scripts/disco_reward.py ...

QLoRA: the base model in 4 bits, the adapter and the reward head in full precision. Add

    --use_peft --load_in_4bit --lora_r 32 --lora_target_modules all-linear --learning_rate 1e-4

CPU, on your own pairs: `data/` holds train.jsonl and test.jsonl, each line {"chosen": ..., "rejected": ...}. Training
is in float32 there. On a CPU with fast bfloat16 add `--use_cpu --bf16 True`.

    python scripts/disco_reward.py \\
        --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name data/ \\
        --use_peft --activation_checkpointing False --output_dir outputs/disco

All of it may stand in a YAML file: `--config reward.yaml`. The installed command `disco-trl train ...` does the same
and starts `accelerate launch` by itself.
"""

from disco_trl.cli.launch import main


if __name__ == "__main__":
    main("train")
