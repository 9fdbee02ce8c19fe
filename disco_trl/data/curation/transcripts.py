"""Conversations that are written as one text: hh-rlhf's transcripts, and HelpSteer2's prompts of several turns."""

from __future__ import annotations

import re
from typing import Any

from ..values import BadRow, shown


TURN = re.compile(r"\n\n(Human|Assistant):")


def is_transcript(text: Any) -> bool:
    """Whether it is written as hh-rlhf writes conversations."""
    return isinstance(text, str) and text.lstrip("\n").startswith("Human:") and "Assistant:" in text


def transcript_messages(column: str, text: str) -> list[dict[str, str]]:
    """
    The messages of a transcript in which a blank line and `Human:` or `Assistant:` begin a turn.

    Args:
        column (`str`):
            Column of the transcript, for the error.
        text (`str`):
            The transcript.

    Returns:
        `list[dict[str, str]]`: The messages.

    Raises:
        [`~disco_trl.data.values.BadRow`]: If it begins otherwise.
    """
    start, *parts = TURN.split("\n\n" + text.lstrip("\n"))
    if start or not parts:
        raise BadRow(column, f"{shown(text)} is no transcript", r'begin it with "\n\nHuman:"')
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[role], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


EXTRA_ID_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def prompt_messages(column: str, prompt: str) -> list[dict[str, str]]:
    """The messages of a prompt that is a text: one from the user, or the turns of a transcript."""
    if is_transcript(prompt):
        messages = transcript_messages(column, prompt)
        # A transcript that waits for the answer ends with the name of who gives it.
        return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages
    first, *parts = EXTRA_ID_TURN.split(prompt)
    turns = [("User", first), *zip(parts[::2], parts[1::2], strict=True)]
    return [{"role": role.lower(), "content": content} for role, content in turns]
