"""The token that server and client share, as both read it."""

from __future__ import annotations

import re


def checked_token(token: str, source: str) -> str:
    """Checks a token before it is used.

    Whitespace around it is dropped, because files and secrets often end with a line break. What is left has to survive
    an HTTP header: an unreadable token would be one that nobody can show.

    Args:
        token (`str`):
            Token as the user gave it.
        source (`str`):
            Where it comes from, for the error message.

    Returns:
        `str`: Token without whitespace around it.

    Raises:
        `ValueError`: If nothing is left, or if it contains anything but visible ASCII characters.
    """
    token = token.strip()
    if not token:
        raise ValueError(f"{source} is set, but empty: set it to a token, or unset it to go without one")
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError(
            f"{source} contains a space, a control character or a character outside ASCII, which an HTTP header "
            "cannot carry: take another token, such as the output of `openssl rand -hex 16`"
        )
    return token
