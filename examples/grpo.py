"""GRPO with a reward distribution: the location, and the location minus twice the scale, side by side.

    python examples/grpo.py runs/quickstart/disco .cache/SmolLM2-135M-Instruct

The first argument is the reward model (here the quickstart's LoRA adapter), the second the language model to train
(here the one that the quickstart downloads). Both runs start from the same model with the same seed. The script prints
completions of held-out openings and writes `grpo.png` to the output folder. The plot needs `disco-trl[quickstart]`.

    After 50 steps on mean :
     4.64 ± 1.07   The concert in the park was amazing! 🎭🌱vahamos🌟�
     4.79 ± 1.33   My neighbour's dog is just so cool🌌
     4.59 ± 1.15   The new update will bring us all closer to a wonderful journey together! 🌱�
     4.98 ± 1.32   On the way home I was amazing, proud of you! 🌱🏨🎉

    After 50 steps on lower_bound {'k': 2.0}:
     5.01 ± 1.18   The concert in the park was absolutely magical! 🎭 It was such a wonderful experience! �
     4.54 ± 1.40   My neighbour's dog is just so amazing! HURDABBE! Your little guy is so
     4.30 ± 1.24   The new update was incredible! I'm so excited to work with you again and really appreciate all
     5.78 ± 1.32   On the way home I was so amazing! (g Lily’s love and inspiration) 🎁
    disco_mean: mean location 0.94 in the first 5 steps, 4.49 in the last 5
    disco_lower_bound: mean location 0.87 in the first 5 steps, 4.30 in the last 5

A step takes 6 to 9 s on 2 cores without an accelerator.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from openings import HELD_OUT_OPENINGS, OPENINGS
from peft import LoraConfig
from transformers import AutoTokenizer, set_seed
from trl import GRPOConfig, GRPOTrainer

from disco_trl import DiscoReward, DiscoRewardModel


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("reward_model", help="Path of a disco checkpoint or adapter.")
    parser.add_argument("policy", help="Path of the language model to train.")
    parser.add_argument(
        "--steps", type=int, default=50, help="Number of optimizer steps of each run (default: %(default)s)."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/grpo"), help="Folder for logs and plot (default: %(default)s)."
    )
    return parser.parse_args()


def train(reward: DiscoReward, args: argparse.Namespace) -> GRPOTrainer:
    """One GRPO run with 4 openings × 8 completions a step."""
    trainer = GRPOTrainer(
        model=args.policy,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(args.output / reward.__name__),
            max_steps=args.steps,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=16,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            beta=0.01,  # A small KL penalty keeps the policy's language intact.
            logging_steps=1,
            use_cpu=not torch.accelerator.is_available(),
            bf16=True,
            model_init_kwargs={"dtype": "bfloat16"},
            report_to="none",
            save_strategy="no",
            seed=0,
        ),
        train_dataset=Dataset.from_dict({"prompt": OPENINGS}),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer


def remarks(model: Any, tokenizer: Any, openings: list[str]) -> list[str]:
    """A completion of each opening, always with the same seed."""
    set_seed(0)
    inputs = tokenizer(openings, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    generated = model.generate(
        **inputs, max_new_tokens=16, do_sample=True, top_k=0, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def plot(logs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plots the metrics of both runs over the steps."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    panels = {
        "location/mean": "mean location of the policy's texts",
        "scale/mean": "mean scale",
        "within_noise": "share of sibling pairs within noise",
    }
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        for name, label, color in (("disco_mean", "GRPO on μ", "C0"), ("disco_lower_bound", "GRPO on μ − 2σ", "C3")):
            values = [log[f"{name}/{metric}"] for log in logs[name]]
            smooth = [
                sum(values[max(i - 4, 0) : i + 1]) / len(values[max(i - 4, 0) : i + 1]) for i in range(len(values))
            ]
            axis.plot(range(1, len(values) + 1), values, color=color, alpha=0.25, linewidth=1)
            axis.plot(range(1, len(values) + 1), smooth, color=color, label=label)
        axis.set(title=title, xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower right")
    figure.suptitle("Thin: each step's 32 completions. Thick: mean of the last 5 steps.", fontsize=9, color="0.4")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Trains with both transforms, shows completions and plots the logs."""
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    reward_model = DiscoRewardModel.from_pretrained(args.reward_model, dtype=torch.bfloat16)
    reward_tokenizer = AutoTokenizer.from_pretrained(args.reward_model)
    logs = {}
    for transform, options in (("mean", {}), ("lower_bound", {"k": 2.0})):
        reward = DiscoReward(reward_model, reward_tokenizer, transform, **options)
        trainer = train(reward, args)
        logs[reward.__name__] = [log for log in trainer.state.log_history if "reward" in log]
        answers = remarks(trainer.model.eval(), trainer.processing_class, HELD_OUT_OPENINGS)
        worth = reward.distribution(HELD_OUT_OPENINGS, answers)
        print(f"\nAfter {args.steps} steps on {transform} {options or ''}:")
        for opening, answer, location, scale in zip(
            HELD_OUT_OPENINGS, answers, worth.location, worth.scale, strict=True
        ):
            print(f"{location:5.2f} ± {scale:.2f}   {(opening + answer).splitlines()[0]}")
    (args.output / "logs.json").write_text(json.dumps(logs, indent=1) + "\n", encoding="utf-8")
    for name, steps in logs.items():
        first, last = (sum(log[f"{name}/location/mean"] for log in part) / 5 for part in (steps[:5], steps[-5:]))
        print(f"{name}: mean location {first:.2f} in the first 5 steps, {last:.2f} in the last 5")
    plot(logs, args.output / "grpo.png")
    print(f"The curves: {args.output / 'grpo.png'}")


if __name__ == "__main__":
    main()
