"""Small runs of TRL's policy trainers, and rewards worked out by hand from a checkpoint's files.

*By hand* means without disco-trl: the location from the stock classifier, one text at a time, and the scale from the
saved tensors by its formula.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.torch import load_file
from tiny_models import load, load_stock
from torch import Tensor

from disco_trl import DiscoReward


SMALL_RUN: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "seed": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
}
QUESTIONS = [
    "What is the capital of France?",
    "Do you like the film?",
    "How to learn the piano?",
    "Who asks for help?",
]

UNIT = 2 / math.sqrt(math.pi)
"""The scale of a new model of the normal family."""


def prompts(kind: str = "text", **columns: list[Any]) -> Dataset:
    """Prompts as `text` or `messages`, with further columns."""
    if kind == "text":
        return Dataset.from_dict({"prompt": [question + " " for question in QUESTIONS], **columns})
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return Dataset.from_dict({"prompt": messages, **columns})


def handed_off(path: str, how: str) -> Any:
    """What goes into `reward_funcs` in place of a reward function: `path`, `live` model or `DiscoReward`."""
    if how == "path":
        return path
    return load(path) if how == "live" else DiscoReward(path)


@dataclass
class Run:
    """What the last step of a run logged.

    Attributes:
        logs: its numbers.
        rewards: of each completion, by the name of the reward function.
        extra: the further columns of TRL's table of completions.
        advantages: of each completion.
        conversations: prompt and completion together, a text or a list of messages.
    """

    logs: dict[str, float]
    rewards: dict[str, list[float]]
    extra: dict[str, list[float]]
    advantages: list[float]
    conversations: list[Any]

    @property
    def reward(self) -> list[float]:
        """Those of the only reward function."""
        (reward,) = self.rewards.values()
        return reward

    @property
    def mean_reward(self) -> float:
        """The mean of the only reward function, as logged."""
        (name,) = self.rewards
        return self.logs[f"rewards/{name}/mean"]


def run(
    trainer_class: Any, config_class: Any, policy: str, reward_funcs: Any, output_dir: Path, **options: Any
) -> Run:
    """A step of GRPO or RLOO; options that the trainer does not take are for its config."""
    arguments = {name: options.pop(name) for name in ("train_dataset", "reward_processing_classes") if name in options}
    settings = {"num_generations": 2, "max_completion_length": 6}
    args = config_class(str(output_dir), **(SMALL_RUN | settings | options))
    conversations = []

    class Recorded(trainer_class):
        def _calculate_rewards(self, inputs, prompts, completions, *more):
            own = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
            conversations[:] = gather_object(own)
            return super()._calculate_rewards(inputs, prompts, completions, *more)

    trainer = Recorded(policy, reward_funcs=reward_funcs, args=args, **({"train_dataset": prompts()} | arguments))
    trainer.train()
    # TRL's table of completions, as it is kept for logging: RLOO writes it to no file, and TRL 1.12 does not keep
    # messages there.
    table = trainer._logs
    return Run(
        logs=[entry for entry in trainer.state.log_history if "reward" in entry][-1],
        rewards={name: list(values) for name, values in table["rewards"].items()},
        extra={name: list(values) for name, values in table["extra"].items()},
        advantages=list(table["advantages"]),
        conversations=conversations,
    )


def token_ids(tokenizer: Any, conversation: Any, end: bool = True, **chat_template_kwargs: Any) -> list[int]:
    """As in training: a text with its end (or, for TRL's own path, without), a conversation by the chat template."""
    if isinstance(conversation, str):
        return tokenizer(conversation + (tokenizer.eos_token if end else ""))["input_ids"]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, **chat_template_kwargs)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def by_hand(
    directory: str | Path, sequences: list[list[int]], scale_layer: int | None = None
) -> tuple[Tensor, Tensor]:
    """Location and scale `[N]` of token sequences from a checkpoint's files, normal family with a learned scale."""
    stock = load_stock(directory)
    outputs = [stock(torch.tensor([ids]), output_hidden_states=True) for ids in sequences]
    location = torch.cat([output.logits[:, 0] for output in outputs])
    hidden_states = torch.stack([output.hidden_states[-1][0, -1] for output in outputs])
    if scale_layer is not None:
        hidden_states = torch.stack([output.hidden_states[scale_layer][0].mean(dim=0) for output in outputs])

    (weights,) = Path(directory).glob("*model.safetensors")
    state = load_file(weights)
    scale = {key.rpartition(".")[2]: tensor for key, tensor in state.items() if ".scale." in key}
    raw = (hidden_states - scale["mean_hidden"]) @ scale["weight"][0]
    limit = math.log(1e3)
    return location, UNIT * torch.exp(limit * torch.tanh(raw / limit))
