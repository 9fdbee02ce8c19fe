"""From texts to tokens, as TRL's `RewardTrainer` makes them: for whatever is scored, and for the data of training."""

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from .values import is_missing


class SpecialTokens:
    """
    Finds special tokens that stand in what people or policies wrote.

    A tokenizer takes `<|im_end|>` in a message for the token that ends a turn, as if the chat template had put it
    there. TRL trains on such tokens and scores with them, so they are not taken out here; but whoever writes them can
    end a turn and begin another one, and that should be known.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer whose special tokens are looked for.
    """

    def __init__(self, processing_class: PreTrainedTokenizerBase):
        added = getattr(processing_class, "added_tokens_decoder", {}).values()
        tokens = {str(token) for token in added if token.special} | {*processing_class.all_special_tokens}
        # The longest first, as a tokenizer takes them. No token, no match.
        names = sorted(filter(None, tokens), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self.eos_token = processing_class.eos_token or ""

    def find(self, content: Any) -> str | None:
        """The first in a text, or in the roles and texts of messages. A text may end with its end-of-text token."""
        if isinstance(content, str):
            texts = [content.removesuffix(self.eos_token)]
        else:
            texts = [
                text if isinstance(text, str) else str(text)
                for message in content
                for text in (message.get("role"), message.get("content"))
                if text is not None
            ]
        return next((match.group() for match in map(self.pattern.search, texts) if match), None)


def tokenize(
    processing_class: PreTrainedTokenizerBase, content: str | list[dict[str, Any]], /, **chat_template_kwargs: Any
) -> list[int]:
    """
    Token ids of a text, or of a conversation, as TRL's `RewardTrainer` makes them.

    A text gets the end-of-text token unless it ends with it; a conversation goes through the chat template. Nothing is
    ever truncated: a reward is read at the last token, and a text without its end is another text.

    Raises:
        ValueError: the tokenizer or the chat template does not take it.
    """
    try:
        return _tokenize(processing_class, content, **chat_template_kwargs)
    except Exception as error:  # templates raise what they like
        what = "the tokenizer" if isinstance(content, str) else "the chat template, or the tokenizer,"
        raise ValueError(f"{what} does not take it ({type(error).__name__}: {error})") from error


def _tokenize(
    processing_class: PreTrainedTokenizerBase, content: str | list[dict[str, Any]], /, **chat_template_kwargs: Any
) -> list[int]:
    encoded: Any
    if isinstance(content, str):
        eos_token = processing_class.eos_token
        if eos_token is None:
            raise ValueError("it has no end-of-text token, which every text gets; set tokenizer.eos_token")
        encoded = processing_class(text=content if content.endswith(eos_token) else content + eos_token)
    else:
        encoded = processing_class.apply_chat_template(
            content, tokenize=True, return_dict=True, **chat_template_kwargs
        )
    return encoded["input_ids"]


def chat_template_arguments(example: dict[str, Any]) -> dict[str, Any]:
    """What a row says to the chat template: its `tools` (a list, or JSON of one) and `chat_template_kwargs`."""
    tools, kwargs = (
        None if is_missing(value) else value for value in map(example.get, ("tools", "chat_template_kwargs"))
    )
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(kwargs or {})}


def tokenize_pair(example: dict[str, Any], processing_class: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """
    Token ids of the chosen and of the rejected side of a row of a preference dataset, of any type that TRL documents:
    plain text or messages, with or without a `prompt`, `tools` or `chat_template_kwargs`, or tokenized already.
    """
    if "chosen_ids" in example and "rejected_ids" in example:
        return example["chosen_ids"], example["rejected_ids"]
    sides = []
    for side in ("chosen", "rejected"):
        content = example["prompt"] + example[side] if "prompt" in example else example[side]
        sides.append(tokenize(processing_class, content, **chat_template_arguments(example)))
    return sides[0], sides[1]
