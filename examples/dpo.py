"""DPO from the same comparisons, read as choices and as how much better an answer is.

    python -m benchmarks.human_ratings --said grades --votes 800 --block 8 16 --test_votes 2000 --output data/graded
    python examples/dpo.py data/graded .cache/SmolLM2-135M-Instruct

The first argument holds pairs of tweets, of which people said how much more positive the one is than the other; the
second is the language model. Both policies start from it and see the same pairs in the same order. The first reads who
won, as TRL's DPOTrainer does, and the second reads the strengths, ties included. As they train, the script asks how
many held-out votes their rewards predict, with which probability, and how far they have moved: the KL divergence from
the model that they started from, on tweets that they write. It writes `dpo.png`.

    choices: 690 of 800 comparisons
    step  11   accuracy 0.59   NLL 0.680   KL  0.45
    step  22   accuracy 0.63   NLL 0.645   KL  1.24
    step  33   accuracy 0.73   NLL 0.592   KL  3.47
    step  44   accuracy 0.72   NLL 0.552   KL  6.15

    strengths: 800 of 800 comparisons
    step  13   accuracy 0.59   NLL 0.681   KL  0.71
    step  26   accuracy 0.64   NLL 0.629   KL  1.54
    step  39   accuracy 0.71   NLL 0.578   KL  3.70
    step  50   accuracy 0.74   NLL 0.557   KL  4.89

The two differ by no more than chance, as 256 votes tell accuracies apart to three points: the 110 ties and the
strengths of 800 comparisons do not change much of what such a policy prefers. The script takes about half an hour of
one core's time without an accelerator.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback

from disco_trl import DiscoDPOConfig, DiscoDPOTrainer


ON_CPU = not torch.accelerator.is_available()
PROMPT = [{"role": "user", "content": "Write a tweet."}]
STRENGTH = "preference_strength"


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="Folder of the graded comparisons.")
    parser.add_argument("policy", help="Path of the language model.")
    parser.add_argument("--held_out", type=int, default=256, help="Number of held-out votes (default: %(default)s).")
    parser.add_argument("--samples", type=int, default=64, help="Number of tweets to write (default: %(default)s).")
    parser.add_argument("--output", type=Path, default=Path("runs/dpo"), help="Folder (default: %(default)s).")
    return parser.parse_args()


def read(path: Path, most: int | None = None) -> Dataset:
    """Reads pairs of tweets as answers to one prompt."""
    rows = [json.loads(line) for line in path.open(encoding="utf-8")][:most]
    answers = [
        {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")} for row in rows
    ]
    strengths = [{STRENGTH: row[STRENGTH]} if STRENGTH in row else {} for row in rows]
    rows = [{"prompt": PROMPT, **sides, **said} for sides, said in zip(answers, strengths, strict=True)]
    return Dataset.from_list(rows)


@torch.no_grad()
def divergence(model: Any, tokenizer: Any, samples: int) -> tuple[float, list[str]]:
    """KL divergence of a policy from the model below its adapter, in nats a tweet, and the tweets that it is from."""
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    start = prompt["input_ids"].shape[1]
    torch.manual_seed(0)
    ids = model.generate(
        **prompt.to(model.device),
        do_sample=True,
        top_k=0,
        max_new_tokens=32,
        num_return_sequences=samples,
        pad_token_id=tokenizer.pad_token_id,
    )
    is_end = (ids[:, start:] == tokenizer.eos_token_id).int()
    is_written = is_end.cumsum(dim=1) - is_end == 0

    def log_probs() -> torch.Tensor:
        logits = model(ids).logits[:, start - 1 : -1].float()
        return logits.log_softmax(dim=-1).gather(-1, ids[:, start:, None])[..., 0]

    ours = log_probs()
    with model.disable_adapter():
        theirs = log_probs()
    tweets = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
    return ((ours - theirs) * is_written).sum(dim=1).mean().item(), tweets


class Divergences(TrainerCallback):
    """Adds the divergence to the figures of each evaluation."""

    def __init__(self, tokenizer: Any, samples: int):
        self.tokenizer, self.samples = tokenizer, samples
        self.found: list[dict[str, float]] = []
        self.tweets: list[str] = []

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        """Write some tweets."""
        kl, self.tweets = divergence(model, self.tokenizer, self.samples)
        self.found.append(
            {"step": state.global_step, "kl": kl} | {name: metrics[f"eval_{name}"] for name in ("accuracy", "nll")}
        )


def train(args: argparse.Namespace, data: Dataset, held_out: Dataset, name: str) -> Divergences:
    """Trains a policy, with four evaluations on the way."""
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    divergences = Divergences(tokenizer, args.samples)
    trainer = DiscoDPOTrainer(
        model=args.policy,
        args=DiscoDPOConfig(
            output_dir=str(args.output / name),
            beta=0.1,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            eval_strategy="steps",
            eval_steps=0.25,
            gradient_checkpointing=False,
            use_cpu=ON_CPU,
            bf16=True,
            model_init_kwargs={"dtype": "bfloat16"},
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=data,
        eval_dataset=held_out,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[divergences],
    )
    trainer.train()
    trainer.save_model()
    return divergences


def plot(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plots how well each policy's rewards predict held-out votes, against how far it has moved."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.4), layout="constrained")
    for axis, figure_name, title in zip(
        axes, ("accuracy", "nll"), ("held-out votes predicted", "NLL of held-out votes (nats)"), strict=True
    ):
        for name, points in found.items():
            axis.plot([p["kl"] for p in points], [p[figure_name] for p in points], "o-", markersize=4, label=name)
        axis.set(title=title, xlabel="KL from the model at the start (nats a tweet)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Trains both policies, and shows what they have learned and what they write."""
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    graded = read(args.data / "train.jsonl")
    held_out = read(args.data / "test.jsonl", args.held_out)
    # A tie is no choice: TRL's trainer cannot read it.
    choices = graded.filter(lambda row: row[STRENGTH] != 0).remove_columns(STRENGTH)
    found = {}
    for name, data in {"choices": choices, "strengths": graded}.items():
        divergences = train(args, data, held_out, name)
        found[name] = divergences.found
        print(f"\n{name}: {len(data)} of {len(graded)} comparisons", flush=True)
        for point in divergences.found:
            print("step {step:3d}   accuracy {accuracy:.2f}   NLL {nll:.3f}   KL {kl:5.2f}".format(**point))
        for tweet in divergences.tweets[:4]:
            print("   ", " ".join(tweet.split()))
    (args.output / "found.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, args.output / "dpo.png")


if __name__ == "__main__":
    main()
