"""From texts to tokens, as TRL's `RewardTrainer` makes them: for whatever is scored, and for the data of training."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase


def tokenize(
    processing_class: PreTrainedTokenizerBase, content: str | list[dict[str, Any]], **chat_template_kwargs: Any
) -> list[int]:
    """
    Token ids of a text, or of a conversation, as TRL's `RewardTrainer` makes them.

    A text gets the end-of-text token unless it ends with it; a conversation goes through the chat template. Nothing is
    ever truncated: a reward is read at the last token, and a text without its end is another text.
    """
    encoded: Any
    if isinstance(content, str):
        eos_token = processing_class.eos_token
        encoded = processing_class(text=content if content.endswith(eos_token) else content + eos_token)
    else:
        encoded = processing_class.apply_chat_template(
            content, tokenize=True, return_dict=True, **chat_template_kwargs
        )
    return encoded["input_ids"]


def chat_template_arguments(example: dict[str, Any]) -> dict[str, Any]:
    """What a row says to the chat template: its `tools` (a list, or JSON of one) and `chat_template_kwargs`."""
    tools = example.get("tools")
    return {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(example.get("chat_template_kwargs") or {}),
    }


def tokenize_pair(example: dict[str, Any], processing_class: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """
    Token ids of the chosen and of the rejected side of a row of a preference dataset, of any type that TRL documents:
    plain text or messages, with or without a `prompt`, `tools` or `chat_template_kwargs`, or tokenized already.
    """
    if "chosen_ids" in example:
        return example["chosen_ids"], example["rejected_ids"]
    sides = []
    for side in ("chosen", "rejected"):
        content = example["prompt"] + example[side] if "prompt" in example else example[side]
        sides.append(tokenize(processing_class, content, **chat_template_arguments(example)))
    return sides[0], sides[1]
