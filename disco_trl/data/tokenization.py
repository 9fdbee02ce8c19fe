"""From texts to token ids, as TRL's `RewardTrainer` makes them: for training data and for whatever is scored."""

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from .columns import TEMPLATE_COLUMNS
from .records import Record, read_answers
from .values import is_missing


class SpecialTokens:
    """
    Finds special tokens in texts that people or policies wrote.

    A tokenizer takes `<|im_end|>` in a message for the token that ends a turn, as if the chat template had put it
    there. TRL trains on such tokens and scores with them, so they are not removed here. But whoever writes them can
    end a turn and begin another one, which is worth a warning.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer whose special tokens are looked for.
    """

    def __init__(self, processing_class: PreTrainedTokenizerBase):
        added = getattr(processing_class, "added_tokens_decoder", {}).values()
        tokens = {str(token) for token in added if token.special} | {*processing_class.all_special_tokens}
        # The longest first, as a tokenizer takes them. Without any token the pattern matches nothing.
        names = sorted(filter(None, tokens), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self.eos_token = processing_class.eos_token or ""

    def find(self, content: Any) -> str | None:
        """
        The first special token in a text, or in the roles and texts of messages.

        Args:
            content (`str` or `list[dict]`):
                Text or conversation. A text may end with the end-of-text token.

        Returns:
            `str` or `None`: The token.
        """
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
    Token ids of a text or of a conversation, as TRL's `RewardTrainer` makes them.

    A text gets the end-of-text token unless it ends with it. A conversation goes through the chat template. Nothing is
    ever truncated: the reward is read at the last token, and a text without its end is another text.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, which also renders the conversation.
        content (`str` or `list[dict]`):
            Text or conversation.
        **chat_template_kwargs:
            Arguments of the chat template, see `chat_template_arguments`.

    Returns:
        `list[int]`: The ids.

    Raises:
        `ValueError`: If the tokenizer or the chat template does not take it.
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


def chat_template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """
    What a row passes to the chat template.

    Args:
        row (`dict`):
            Row that may have `tools` (a list, or JSON of one) and `chat_template_kwargs` (a dict).

    Returns:
        `dict`: Arguments of [`~transformers.PreTrainedTokenizerBase.apply_chat_template`].
    """
    tools, kwargs = (None if is_missing(value) else value for value in map(row.get, TEMPLATE_COLUMNS))
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(kwargs or {})}


def tokenize_record(record: Record, processing_class: PreTrainedTokenizerBase) -> list[list[int]]:
    """
    Token ids of the answers of a record, each after its prompt.

    Args:
        record ([`~disco_trl.data.records.Record`]):
            Record of a row.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, which also renders the conversations.

    Returns:
        `list[list[int]]`: The ids of each answer.

    Raises:
        `ValueError`: If the tokenizer or the chat template refuses an answer.
    """
    if record.kind == "tokenized":
        return list(record.answers)
    arguments = chat_template_arguments(record.template)
    return [tokenize(processing_class, content, **arguments) for content in record.contents]


def tokenize_answers(row: dict[str, Any], processing_class: PreTrainedTokenizerBase) -> tuple[list[int], ...]:
    """
    Token ids of the answers of a row, as training makes them.

    Args:
        row (`dict`):
            Row of a preference dataset of any type that TRL documents (plain text or messages, with or without
            `prompt`, `tools` or `chat_template_kwargs`, or tokenized already), or with ranked `completions`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, which also renders the conversations.

    Returns:
        `tuple[list[int], ...]`: The ids of the chosen and of the rejected side, or of each ranked answer.

    Raises:
        `ValueError`: If the tokenizer or the chat template refuses an answer.
    """
    return tuple(tokenize_record(read_answers(row), processing_class))
