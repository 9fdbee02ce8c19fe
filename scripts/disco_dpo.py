"""Train a policy by DPO with the likelihood of what people said. Takes the arguments of `trl dpo`.

One GPU:

    python scripts/disco_dpo.py \\
        --model_name_or_path Qwen/Qwen3-0.6B \\
        --dataset_name trl-lib/ultrafeedback_binarized \\
        --eval_strategy steps --eval_steps 50 \\
        --output_dir outputs/Qwen3-0.6B-dpo

Eight GPUs (`--config_file` takes an accelerate config for FSDP or DeepSpeed):

    accelerate launch --num_processes 8 scripts/disco_dpo.py ...

QLoRA: the policy in 4 bits, which is its own reference without the adapter. Add

    --use_peft --load_in_4bit --lora_r 32 --lora_target_modules all-linear --learning_rate 1e-5

CPU, on your own pairs: `data/` holds train.jsonl and test.jsonl, each line {"prompt": ..., "chosen": ...,
"rejected": ...}, and perhaps "preference_strength" or other judgements. Training is in float32 there. On a CPU with
fast bfloat16 add `--use_cpu --bf16 True`.

    python scripts/disco_dpo.py \\
        --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name data/ \\
        --use_peft --activation_checkpointing False --output_dir outputs/dpo

All of it may stand in a YAML file: `--config dpo.yaml`. The installed command `disco-trl dpo ...` does the same and
starts `accelerate launch` by itself.
"""

from disco_trl.cli.launch import main


if __name__ == "__main__":
    main("dpo")
