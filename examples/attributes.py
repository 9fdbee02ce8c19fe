"""Two attributes in one reward model, and GRPO with one of them as a constraint, beside weighted sums.

    python -m benchmarks.human_ratings --said ratings --votes 1200 --output data/rated-tweets
    python examples/attributes.py data/rated-tweets .cache/SmolLM2-135M-Instruct

The first argument holds pairs of tweets with ten people's ratings of each, the second is the language model that both
the reward model and the policy start from. People have rated how positive a tweet is. How calm it is, from 1 to 5, is
the second attribute: three raters are simulated, who mind exclamation marks, capitals, emoji, and words such as "love"
and "amazing".

A positive remark is easily an excited one. The policies are trained as in `grpo.py`: the first on the sum of both
attributes, the second on a sum in which calm counts a quarter, and the third on how positive a remark is, with the
constraint that at least half of the people would rate it 4 or higher for calm. The script prints completions of
held-out openings, counts what the simulated raters mind, and writes `attributes.png`. With `--steps 30`:

    policy                        positive   calm  calm enough  minded
    sum of both                       1.40   1.26          97%    0.28
    positive, a quarter calm          1.80   0.85          95%    0.67
    positive, calm 4 or more          1.54   0.96          98%    0.31

The plain sum pays for calm beyond what was asked for, and gives up positive remarks for it. A sum with a smaller
weight of calm pays for excited words, of which it writes twice as many, and one remark in twenty is not calm enough.
With the constraint, remarks are more positive than with the plain sum, and as many of them are calm enough. With so
few steps, the differences are small.

A step takes 7 to 9 s on 2 cores without an accelerator, and the reward model 12 minutes on one.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import Dataset
from grpo import remarks, train
from openings import HELD_OUT_OPENINGS
from peft import LoraConfig

from disco_trl import DiscoReward, DiscoRewardConfig, DiscoRewardTrainer


ON_CPU = not torch.accelerator.is_available()
LEAST_CALM = 4
EXCITED_WORDS = frozenset(
    "adore amazing awesome best excellent fantastic great incredible love loved perfect so super thrilled very "
    "wonderful wow".split()
)
FLOOR = -4.0  # Below the reward of nearly all tweets, so that breaking the constraint never pays.


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="Folder of the rated tweets.")
    parser.add_argument("policy", help="Path of the language model.")
    parser.add_argument(
        "--steps", type=int, default=50, help="Number of optimizer steps of each policy (default: %(default)s)."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/attributes-grpo"), help="Folder (default: %(default)s)."
    )
    return parser.parse_args()


def excitement(text: str) -> int:
    """Counts exclamation marks, words in capitals, emoji, and excited words."""
    capitals = len(re.findall(r"\b[A-Z]{2,}\b", text))
    words = sum(word in EXCITED_WORDS for word in re.findall(r"\w+", text.lower()))
    return text.count("!") + capitals + sum(ord(letter) >= 0x2600 for letter in text) + words


def rated_tweets(path: Path) -> Dataset:
    """Pairs of tweets, rated in both attributes by different people: `None` where a person has not rated."""
    generator = np.random.default_rng(0)

    def with_calm(text: str, positive: list[int]) -> dict[str, list[int | None]]:
        calm = (5 - excitement(text) + generator.normal(0, 0.6, 3)).round().clip(1, 5).astype(int).tolist()
        return {"positive": [*positive, None, None, None], "calm": [None] * len(positive) + calm}

    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    for row in rows:
        for side in ("chosen", "rejected"):
            row[f"{side}_rating"] = with_calm(row[side], row[f"{side}_rating"])
    return Dataset.from_list(rows)


def train_reward_model(args: argparse.Namespace) -> str:
    """Trains the reward model, unless an earlier run has, and returns its path."""
    path = args.output / "reward_model"
    if path.exists():
        return str(path)
    trainer = DiscoRewardTrainer(
        model=args.policy,
        args=DiscoRewardConfig(
            output_dir=str(path),
            learning_rate=4e-4,
            per_device_train_batch_size=16,
            num_train_epochs=1,
            lr_scheduler_type="cosine",
            gradient_checkpointing=False,
            use_cpu=ON_CPU,
            bf16=True,
            model_init_kwargs={"dtype": "bfloat16"},
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=rated_tweets(args.data / "train.jsonl"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    return str(path)


def plot(found: dict[str, dict[str, list[Any]]], path: Path) -> None:
    """Plots what the policies write, one dot a remark: how positive it is, how calm, and whether that is enough."""
    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.6), sharex=True, sharey=True)
    for axis, (title, of_policy) in zip(axes, found.items(), strict=True):
        enough = np.array(of_policy["calm enough"])
        for kept, color, label in ((enough, "C0", "calm enough"), (~enough, "C3", "not calm enough")):
            positive, calm = (np.array(of_policy[name])[kept] for name in ("positive", "calm"))
            axis.scatter(positive, calm, s=14, alpha=0.6, color=color, label=label)
        axis.set(title=title, xlabel="how positive (reward)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="how calm (reward)")
    axes[0].legend(frameon=False, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Trains the reward model and the policies, and shows what they write."""
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = train_reward_model(args)
    positive, calm = DiscoReward(path, attribute="positive"), DiscoReward(path, attribute="calm")
    constraint = DiscoReward(path, attribute="positive", minimum={"calm": LEAST_CALM}, floor=FLOOR, name="constraint")
    rewards = {
        "sum of both": DiscoReward(path, weights={"positive": 1, "calm": 1}, name="sum"),
        "positive, a quarter calm": DiscoReward(path, weights={"positive": 1, "calm": 0.25}, name="quarter"),
        f"positive, calm {LEAST_CALM} or more": constraint,
    }
    prompts = HELD_OUT_OPENINGS * 16
    found = {}
    for title, reward in rewards.items():
        trainer = train(reward, args)
        answers = remarks(trainer.model.eval(), trainer.processing_class, prompts)
        cap = constraint.distribution(prompts, answers).cap  # infinite where the constraint holds
        assert cap is not None
        found[title] = {
            "positive": positive.distribution(prompts, answers).location.tolist(),
            "calm": calm.distribution(prompts, answers).location.tolist(),
            "calm enough": (cap > FLOOR).tolist(),
            "minded": [excitement(answer) for answer in answers],
        }
        print(f"\nAfter {args.steps} steps on {title}:")
        for opening, answer in list(zip(prompts, answers, strict=True))[:4]:
            print(f"  {(opening + answer).splitlines()[0]}")
    print(f"\n{'policy':28} {'positive':>9} {'calm':>6} {'calm enough':>12} {'minded':>7}")
    for title, of_policy in found.items():
        means = {name: float(np.mean(values)) for name, values in of_policy.items()}
        print(
            f"{title:28} {means['positive']:9.2f} {means['calm']:6.2f} {means['calm enough']:12.0%} "
            f"{means['minded']:7.2f}"
        )
    (args.output / "found.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, args.output / "attributes.png")
    print(f"The picture: {args.output / 'attributes.png'}")


if __name__ == "__main__":
    main()
