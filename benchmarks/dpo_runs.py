"""A policy of `benchmarks.dpo_studies`: it is trained, and on the way asked what it predicts and how far it has moved.

What flows: training rows and held-out pairs → a trainer, TRL's or ours → at each of four points the log-probabilities
of the held-out answers under policy and reference, and texts that the policy writes → a folder with the figures. A
folder that is there is a run that has finished, and is not repeated.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from disco_trl import DiscoDPOConfig, DiscoDPOTrainer, DiscoRewardConfig, DiscoRewardTrainer, RewardDistribution
from disco_trl.data.columns import SCALES
from disco_trl.data.files import written_at_once
from disco_trl.data.tokenization import tokenize_answers
from disco_trl.distributions.reward_distribution import get_family
from disco_trl.models.inference import load_trained, score
from disco_trl.trainer.dpo_scales import geometric_mean_of_scales


BETA = 0.1
POINTS = 4
WRITTEN = 64
"""Number of texts that a policy writes at each point."""
NEW_TOKENS = 48
AT_ONCE = 16
"""Number of sequences whose logits are held at once."""
FIGURES_FILE, PREDICTIONS_FILE = "points.json", "predictions.npz"
SIDES = ("chosen", "rejected")
SETTINGS: dict[str, Any] = {
    **{"per_device_train_batch_size": 16, "num_train_epochs": 1, "train_sampling_strategy": "sequential"},
    **{"gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "logging_steps": 10},
    **{"use_cpu": not torch.accelerator.is_available(), "disable_tqdm": True},
}
"""Settings of all trainers. Blocks of comparisons are batches, and in random order as they are drawn."""


@dataclass(frozen=True)
class HeldOutPairs:
    """Pairs that nobody is trained on.

    Attributes:
        rows (`list[dict]`):
            The pairs, with `prompt`, `chosen` and `rejected` as messages.
        share (`np.ndarray` of shape `(N,)`):
            Share of people's votes that the chosen side gets. A tie is half a vote.
        groups (`np.ndarray` of shape `(N, 2)`):
            Number of the text on each side.
        prompts (`list`):
            What the policies are asked to write.
    """

    rows: list[dict[str, Any]]
    share: np.ndarray
    groups: np.ndarray
    prompts: list[Any]

    @property
    def is_clear(self) -> np.ndarray:
        """Whether at least four in five votes agree, of shape `(N,)`."""
        return np.abs(self.share - 0.5) >= 0.3 - 1e-9

    @property
    def is_contested(self) -> np.ndarray:
        """Whether neither side gets more than three in five, of shape `(N,)`."""
        return np.abs(self.share - 0.5) <= 0.1 + 1e-9


@dataclass(frozen=True)
class Policy:
    """How a policy is trained.

    Attributes:
        trainer (`type`, *optional*, defaults to [`DiscoDPOTrainer`]):
            TRL's class or ours.
        options (`dict`, *optional*, defaults to `{}`):
            Options of its configuration, beyond those that all share.
    """

    trainer: type[DPOTrainer] = DiscoDPOTrainer
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Point:
    """What is known of a policy on the way.

    Attributes:
        step (`int`):
            Number of steps that it has been trained for.
        kl (`float`):
            KL divergence from the model that it started from, in nats a text.
        written (`list[list]`):
            Texts that it has written, each with its prompt.
    """

    step: int
    kl: float
    written: list[tuple[Any, str]]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        points (`list[Point]`):
            What is known of the policy on the way.
        location (`np.ndarray` of shape `(points, N, 2)`):
            Rewards of the held-out answers.
        scale (`np.ndarray` of shape `(points, N, 2)`):
            Their scales.
    """

    points: list[Point]
    location: np.ndarray
    scale: np.ndarray

    @property
    def probability(self) -> np.ndarray:
        """P(chosen ≻ rejected) of each held-out pair, of shape `(points, N)`."""
        sides = [
            RewardDistribution(torch.tensor(self.location[..., side]), torch.tensor(self.scale[..., side]), "logistic")
            for side in range(2)
        ]
        return sides[0].prob_greater(sides[1]).numpy()


def adapter(task_type: str) -> LoraConfig:
    """The adapter that is trained, of a policy or of a reward model."""
    return LoraConfig(task_type=task_type, r=16, lora_alpha=32, target_modules="all-linear")


def precision(dtype: str) -> dict[str, Any]:
    """Settings of a trainer for a dtype."""
    return {"bf16": dtype == "bfloat16", "model_init_kwargs": {"dtype": dtype}}


# Reward models


def train_reward_model(model: str, rows: list[dict[str, Any]], folder: Path, dtype: str, seed: int) -> str:
    """Trains a reward model, unless the folder has it.

    Args:
        model (`str`):
            Path of the language model.
        rows (`list[dict]`):
            Comparisons.
        folder (`Path`):
            Folder of the reward model.
        dtype (`str`):
            Dtype of the language model.
        seed (`int`):
            Seed of the training.

    Returns:
        `str`: Path of the reward model.
    """
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}-unfinished")
        schedule: dict[str, Any] = {"learning_rate": 4e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
        trainer = DiscoRewardTrainer(
            model,
            DiscoRewardConfig(str(unfinished), seed=seed, **schedule, **SETTINGS, **precision(dtype)),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=adapter("SEQ_CLS"),
        )
        trainer.train()
        trainer.save_model()
        unfinished.rename(folder)
    return str(folder)


def rewards_of(reward_model: str, rows: list[dict[str, Any]]) -> RewardDistribution:
    """Rewards of both sides of N pairs, of shape `(N, 2)`."""
    model, tokenizer = load_trained(reward_model), AutoTokenizer.from_pretrained(reward_model)
    found = score(model, [ids for row in rows for ids in tokenize_answers(row, tokenizer)])
    return found.map(lambda parameter: parameter.reshape(len(rows), 2, *parameter.shape[1:]))


def mean_reward(reward_model: str, written: Sequence[tuple[Any, str]]) -> float:
    """Mean location of the texts that a policy has written."""
    rows = [{"prompt": prompt, "chosen": answer(text), "rejected": answer(text)} for prompt, text in written]
    return rewards_of(reward_model, rows).location[:, 0].mean().item()


def answer(text: str) -> list[dict[str, str]]:
    """A text as the answer of a model."""
    return [{"role": "assistant", "content": text}]


# Policies


def to_batch(
    sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """Pads S sequences of a prompt and an answer to tensors of shape `(S, L)`: `ids`, and where they are `attended`
    and an `answer`.
    """
    rows = [torch.tensor([*prompt, *answer_ids]) for prompt, answer_ids in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    places = torch.arange(ids.shape[1])
    attended = places < torch.tensor([[len(row)] for row in rows])
    return {
        "ids": ids,
        "attended": attended,
        "answer": attended & (places >= torch.tensor([[len(prompt)] for prompt, _ in sequences])),
    }


@torch.no_grad()
def log_probabilities(model: Any, pairs: Dataset, pad_token_id: int) -> tuple[np.ndarray, torch.Tensor]:
    """Log-probabilities of answers, each computed once however many pairs it is in.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Policy or reference.
        pairs ([`~datasets.Dataset`]):
            Tokenized pairs, with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        pad_token_id (`int`):
            Token that short sequences are padded with.

    Returns:
        `tuple[np.ndarray, torch.Tensor]`: The log-probabilities of shape `(N, 2)`, in nats, and the last hidden state
        of each answer, of shape `(N, 2, H)`.
    """
    sequences = [(tuple(row["prompt_ids"]), tuple(row[f"{side}_ids"])) for row in pairs for side in SIDES]
    different = sorted({*sequences}, key=lambda sequence: sum(map(len, sequence)))
    place = {sequence: number for number, sequence in enumerate(different)}
    sums, states = [], []
    for start in range(0, len(different), AT_ONCE):
        batch = {
            name: value.to(model.device)
            for name, value in to_batch(different[start : start + AT_ONCE], pad_token_id).items()
        }
        ids, attended = batch["ids"], batch["attended"]
        output = model(input_ids=ids, attention_mask=attended.long(), output_hidden_states=True)
        per_token = output.logits[:, :-1].float().log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
        sums.append((per_token * batch["answer"][:, 1:]).sum(dim=1))
        states.append(output.hidden_states[-1][torch.arange(len(ids)), attended.sum(dim=1) - 1].float())
    order = torch.tensor([place[sequence] for sequence in sequences]).reshape(-1, 2)
    return torch.cat(sums).cpu()[order].double().numpy(), torch.cat(states).cpu()[order]


@torch.no_grad()
def write(model: Any, tokenizer: Any, prompts: Sequence[Any], seed: int = 0) -> tuple[float, list[tuple[Any, str]]]:
    """Has a policy write texts, and computes how far it has moved from the model below its adapter.

    Args:
        model ([`~peft.PeftModel`]):
            The policy.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`Sequence`):
            Prompts, as messages. [`WRITTEN`] texts are shared out among them.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples.

    Returns:
        `tuple[float, list]`: The mean KL divergence in nats a text, and the texts, each with its prompt. The
        divergence is summed over all tokens that could follow at each place, of texts that the policy has written.
    """
    torch.manual_seed(seed)
    total, texts = 0.0, []
    for prompt in prompts:
        given = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        start = given["input_ids"].shape[1]
        found = model.generate(
            **given,
            **{"do_sample": True, "top_k": 0, "max_new_tokens": NEW_TOKENS, "pad_token_id": tokenizer.pad_token_id},
            num_return_sequences=WRITTEN // len(prompts),
        )
        for ids in found.split(AT_ONCE):
            is_end = (ids[:, start:] == tokenizer.eos_token_id).int()
            is_written = is_end.cumsum(dim=1) - is_end == 0
            ours = model(ids).logits[:, start - 1 : -1].float().log_softmax(dim=-1)
            with model.disable_adapter():
                theirs = model(ids).logits[:, start - 1 : -1].float().log_softmax(dim=-1)
            total += (((ours.exp() * (ours - theirs)).sum(dim=-1)) * is_written).sum().item()
            texts += [(prompt, text) for text in tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)]
    return total / len(texts), texts


class Watcher(TrainerCallback):
    """Asks a policy at four points of its training what it predicts, and how far it has moved."""

    def __init__(self, held_out: HeldOutPairs):
        self.held_out = held_out
        self.trainer: Any = None  # set once it is there
        self.points: list[Point] = []
        self.location: list[np.ndarray] = []
        self.scale: list[np.ndarray] = []
        self._reference: np.ndarray | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Looks at the policy at the end of each quarter."""
        if state.global_step not in {round(state.max_steps * (number + 1) / POINTS) for number in range(POINTS)}:
            return
        model.eval()
        pairs, tokenizer = self.trainer.eval_dataset, self.trainer.processing_class
        if self._reference is None:
            with model.disable_adapter():
                self._reference, _ = log_probabilities(model, pairs, tokenizer.pad_token_id)
        own, states = log_probabilities(model, pairs, tokenizer.pad_token_id)
        self.location.append(BETA * (own - self._reference))
        self.scale.append(self._scales(pairs, states))
        kl, written = write(model, tokenizer, self.held_out.prompts)
        self.points.append(Point(state.global_step, kl, written))
        model.train()

    def _scales(self, pairs: Dataset, states: torch.Tensor) -> np.ndarray:
        """Scales of the held-out answers, of shape `(N, 2)`."""
        if {*SCALES} <= {*pairs.column_names}:
            found = np.stack([np.array(pairs[name]) for name in SCALES], axis=1)
            mean = geometric_mean_of_scales(self.trainer.train_dataset, "train")
            return found / mean * get_family("logistic").unit_scale
        if isinstance(self.trainer, DiscoDPOTrainer):
            with torch.no_grad():
                scales, _ = self.trainer.policy_head(states.flatten(0, 1).to(self.trainer.model.device))
            return scales.reshape(-1, 2).double().cpu().numpy()
        return np.full((len(pairs), 2), get_family("logistic").unit_scale)


def train_policy(
    policy: Policy, model: str, rows: list[dict[str, Any]], held_out: HeldOutPairs, folder: Path, dtype: str, seed: int
) -> Run:
    """Trains a policy and watches it, unless the folder has the run.

    Args:
        policy ([`Policy`]):
            How it is trained.
        model (`str`):
            Path of the language model.
        rows (`list[dict]`):
            Training pairs.
        held_out ([`HeldOutPairs`]):
            What it is asked to predict and to write.
        folder (`Path`):
            Folder of the run.
        dtype (`str`):
            Dtype of the language model.
        seed (`int`):
            Seed of the training.

    Returns:
        [`Run`]: The run.
    """
    if not (folder / FIGURES_FILE).exists():
        watcher = Watcher(held_out)
        config_class = DPOConfig if policy.trainer is DPOTrainer else DiscoDPOConfig
        own = {"beta": BETA, "learning_rate": 2e-4, "lr_scheduler_type": "constant", "seed": seed}
        settings = {**SETTINGS, **own, **precision(dtype), **policy.options}
        watcher.trainer = policy.trainer(
            model,
            args=config_class(str(folder), **settings),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(held_out.rows),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=adapter("CAUSAL_LM"),
            callbacks=[watcher],
        )
        watcher.trainer.train()
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / PREDICTIONS_FILE, location=np.stack(watcher.location), scale=np.stack(watcher.scale))
        with written_at_once(folder / FIGURES_FILE) as unfinished:
            unfinished.write_text(json.dumps([asdict(point) for point in watcher.points]) + "\n", encoding="utf-8")
    points = [Point(**point) for point in json.loads((folder / FIGURES_FILE).read_text(encoding="utf-8"))]
    with np.load(folder / PREDICTIONS_FILE, allow_pickle=False) as found:
        return Run(points, found["location"], found["scale"])
