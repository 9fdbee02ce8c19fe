"""From texts to token ids, as TRL's `RewardTrainer` makes them: for training data and for whatever is scored."""

import json
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase, TokenizersBackend

from .columns import TEMPLATE_COLUMNS
from .contents import text_of, without_nulls
from .records import Record, read_answers
from .rendering import TOKEN_PARAMETERS, LeftOutError, fit_to_template, is_left_out, render
from .values import is_missing


Content = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""


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
            texts = [text for message in content for text in (message["role"], text_of(message.get("content")))]
        return next((match.group() for match in map(self.pattern.search, texts) if match), None)


def tokenize(processing_class: PreTrainedTokenizerBase, content: Content, /, **chat_template_kwargs: Any) -> list[int]:
    """
    Token ids of a text or of a conversation, as TRL's `RewardTrainer` makes them.

    A text gets the end-of-text token unless it ends with it. A conversation goes through the chat template. Nothing is
    ever truncated: the reward is read at the last token, and a text without its end is another text.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, which also renders the conversation.
        content (`str` or `list[dict]`):
            Text or conversation, see [`~disco_trl.data.rendering.fit_to_template`].
        **chat_template_kwargs:
            Arguments of the chat template, see `chat_template_arguments`.

    Returns:
        `list[int]`: The ids.

    Raises:
        `ValueError`: If the tokenizer or the chat template does not take it, or the template leaves out a turn's text.
    """
    return tokenize_all(processing_class, [content], [chat_template_kwargs])[0]


def tokenize_all(
    processing_class: PreTrainedTokenizerBase,
    contents: Sequence[Content],
    arguments: Sequence[dict[str, Any]],
    refuse_empty: bool = False,
) -> list[list[int]]:
    """
    Token ids of texts, or of conversations, many at a time; see [`tokenize`].

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, which also renders the conversations.
        contents (`Sequence`):
            `N` texts, or `N` conversations.
        arguments (`Sequence[dict]`):
            What each conversation passes to the chat template.
        refuse_empty (`bool`, *optional*, defaults to `False`):
            Whether to refuse an answer of which the template leaves nothing. (A policy may well answer nothing.)

    Returns:
        `list[list[int]]`: The ids of each.

    Raises:
        `ValueError`: As in [`tokenize`], for any of them.
    """
    is_text = isinstance(contents[0], str)
    try:
        if is_text:
            return _tokenize_texts(processing_class, contents)
        return _tokenize_conversations(processing_class, contents, arguments, refuse_empty)
    except LeftOutError:
        raise
    except Exception as error:  # templates raise what they like
        what = "the tokenizer" if is_text else "the chat template, or the tokenizer,"
        raise ValueError(f"{what} does not take it ({type(error).__name__}: {error})") from error


def _tokenize_texts(processing_class: PreTrainedTokenizerBase, texts: Sequence[Any]) -> list[list[int]]:
    end = processing_class.eos_token
    if end is None:
        raise ValueError("it has no end-of-text token, which every text gets; set tokenizer.eos_token")
    texts = [text if text.endswith(end) else text + end for text in texts]
    if not _takes_many(processing_class):
        return [processing_class(text=text)["input_ids"] for text in texts]
    return processing_class(texts)["input_ids"]


def _tokenize_conversations(
    processing_class: PreTrainedTokenizerBase,
    conversations: Sequence[Any],
    arguments: Sequence[dict[str, Any]],
    refuse_empty: bool,
) -> list[list[int]]:
    conversations = [
        fit_to_template(processing_class, conversation, **of_row)
        for conversation, of_row in zip(conversations, arguments, strict=True)
    ]
    many = _takes_many(processing_class) and not any(TOKEN_PARAMETERS & of_row.keys() for of_row in arguments)
    texts: list[str] = []
    if not many and refuse_empty:
        texts = [
            render(processing_class, conversation, **of_row)
            for conversation, of_row in zip(conversations, arguments, strict=True)
        ]
    elif many:
        # repr tells apart what == does not, and a template may: True and 1
        for _, rows in groupby(zip(conversations, arguments, strict=True), key=lambda row: repr(row[1])):
            alike, same_arguments = zip(*rows, strict=True)
            texts += render(processing_class, list(alike), **same_arguments[0])
    if refuse_empty:
        for conversation, text, of_row in zip(conversations, texts, arguments, strict=True):
            if is_left_out(processing_class, conversation, text, of_row):
                raise LeftOutError(
                    "the chat template leaves nothing of the answer, which is reasoning alone; use a template that "
                    "keeps the reasoning"
                )
    if many:
        return processing_class(texts, add_special_tokens=False)["input_ids"]
    encoded: list[Any] = [
        processing_class.apply_chat_template(conversation, tokenize=True, return_dict=True, **of_row)
        for conversation, of_row in zip(conversations, arguments, strict=True)
    ]
    return [of_one["input_ids"] for of_one in encoded]


def _takes_many(processing_class: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer gives many texts at once the tokens that each gets alone: tokenizers-backed ones whose own
    methods these are do. CodeLlama's, for one, has its own: it looks for the place to fill in a text, and would look
    for it in the list.
    """
    kind: Any = type(processing_class)
    return (
        kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind.apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        and kind._encode_plus is TokenizersBackend._encode_plus
    )


def chat_template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """
    What a row passes to the chat template.

    Args:
        row (`dict`):
            Row that may have `tools` (a list, or JSON of one) and `chat_template_kwargs` (a dict).

    Returns:
        `dict`: Arguments of [`~transformers.PreTrainedTokenizerBase.apply_chat_template`], without the nulls that
        Arrow puts there.
    """
    tools, kwargs = (None if is_missing(value) else value for value in map(row.get, TEMPLATE_COLUMNS))
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": without_nulls(tools), **without_nulls(kwargs or {})}


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
    contents = record.contents
    arguments = [chat_template_arguments(record.template)] * len(contents)
    return tokenize_all(processing_class, contents, arguments, refuse_empty=True)


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
