"""From the bytes of a body to a validated request, at a cost in time and memory that the size of the body limits.

JSON that is small and wrong can be expensive: half a million numbers in the place of texts are as many validation
errors, and brackets nested 20,000 deep overflow the stack of whoever walks them. So a body is read in three steps.
pydantic's JSON parser, which refuses more than 200 levels, turns it into Python values; the lengths of lists are
compared with the server's limits; and only then are the values validated, up to the first error in each list.
"""

from __future__ import annotations

import codecs
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from ..models.settings import MOST_ATTRIBUTES
from .middleware import Limits
from .schemas import RefusalError, field_name


_Request = TypeVar("_Request", bound=BaseModel)


def read_request(kind: type[_Request], content_type: str, body: bytes, limits: Limits) -> _Request:
    """Reads the body of a request.

    Args:
        kind (`type[pydantic.BaseModel]`):
            Schema of the request.
        content_type (`str`):
            Header of the request. Browsers ask before a page sends `application/json` to another site, and do not ask
            for other types, so that nothing else is read.
        body (`bytes`):
            JSON in UTF-8, with or without a byte order mark.
        limits ([`~disco_trl.serving.middleware.Limits`]):
            Limits on the lengths of lists.

    Returns:
        `kind`: The validated request.

    Raises:
        `RefusalError`: If the body is not JSON (400), a list is too long (413), or a field is invalid (422).
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise _no_object()
    try:
        values = from_json(body.removeprefix(codecs.BOM_UTF8), cache_strings="keys")
    except ValueError as error:
        raise RefusalError(400, f"the body is not JSON in UTF-8: {error}") from None
    if not isinstance(values, dict):
        raise _no_object()
    _check_lengths(values, limits)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _invalid(error) from None


def _no_object() -> RefusalError:
    return RefusalError(422, "the body must be a JSON object, sent with Content-Type: application/json")


def _check_lengths(values: dict[str, Any], limits: Limits) -> None:
    texts = (limits.max_texts_per_request, "texts")
    most = {"items": texts, "query": texts, "prompts": texts, "labels": texts}
    most["pairs"] = (limits.max_pairs_per_request, "pairs")
    for name, (limit, what) in most.items():
        value = values.get(name)
        if isinstance(value, list) and len(value) > limit:
            raise RefusalError(413, f"{len(value)} {what}, and {limit} are the most in one request", name)
    for name in ("weights", "minimum"):
        value = values.get(name)
        if isinstance(value, dict) and len(value) > MOST_ATTRIBUTES:
            reason = f"{len(value)} attributes, and {MOST_ATTRIBUTES} are the most that a model knows"
            raise RefusalError(413, reason, name)


def _invalid(error: ValidationError) -> RefusalError:
    first, *others = error.errors(include_url=False, include_input=False)
    reason = first["msg"]
    if others:
        reason += f" (and {len(others)} more)"
    return RefusalError(422, reason, field_name(first["loc"]))
