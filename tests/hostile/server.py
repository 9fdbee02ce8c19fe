"""Bad requests to `disco-trl serve`."""

from __future__ import annotations

import json

from hostile.inputs import DEEP, FORGED, QUESTION, Request, computed, refused, said


SERVER = (
    *refused(
        "server",
        ("no JSON", Request("/score", b"\x00", 400), "the body is not JSON in UTF-8: expected value"),
        (
            "JSON nested too deeply",
            Request("/score", DEEP, 400),
            "recursion limit exceeded",
            "`[[[[...`, 100,000 deep",
        ),
        (
            "a number of 5,001 digits",
            Request("/score", f'{{"seed": 1{"0" * 5000}}}', 400),
            "number out of range",
        ),
        (
            "tools nested too deeply",
            Request(
                "/score",
                '{"items": [{"completion": [{"role": "a"}], "tools": [{"a": ' + "[" * 800 + "]" * 800 + "}]}]}",
                400,
            ),
            "recursion limit exceeded",
            '`{"items": [{"completion": [{"role": "a"}], "tools": [{"a": [[[[...`, 800 deep',
        ),
        (
            "no items",
            Request("/score", '{"items": []}', 422),
            "List should have at least 1 item after validation, not 0",
        ),
        (
            "a number for an item",
            Request("/score", '{"items": [7]}', 422),
            "must be a text, a list of messages, or an object with 'completion' and maybe 'prompt'",
        ),
        ("half a character", Request("/score", '{"items": ["\\ud800"]}', 400), "unexpected end of hex escape"),
        (
            "half a character in a key",
            Request("/score", '{"items": ["a"], "\\ud800": 1}', 400),
            "unexpected end of hex escape",
        ),
        (
            "UTF-16",
            Request("/score", '{"items": ["a"]}'.encode("utf-16"), 400),
            "the body is not JSON in UTF-8: expected value",
        ),
        (
            "an image",
            Request("/score", '{"items": [[{"role": "u", "content": [{"url": "file:///etc"}]}]]}', 422),
            "must hold text only: a list of {'type': 'text', 'text': ...}",
        ),
        (
            "a model of the client's choice",
            Request("/score", '{"items": ["a"], "model": "../../etc"}', 422),
            "Extra inputs are not permitted",
        ),
        (
            "a chat template of the client's",
            Request(
                "/score",
                '{"items": [{"completion": [{"role": "a"}], "chat_template_kwargs": {"chat_template": "x"}}]}',
                422,
            ),
            "'chat_template' is no variable of the chat template and cannot be set here",
        ),
        ("a path out of the server", Request("/score/..%2f..%2fetc/passwd", "{}", 404), "Not Found"),
        (
            "NaN for an option",
            Request("/score", '{"items": ["a"], "transform": "lower_bound", "k": NaN}', 422),
            "transform 'lower_bound': k=nan must be a finite number of at least 0",
        ),
        (
            "an option beyond float32",
            Request("/score", '{"items": ["a"], "transform": "lower_bound", "k": 1e308}', 422),
            "the reward [-inf] is not finite after the transform 'lower_bound'",
        ),
        (
            "a seed beyond 64 bits",
            Request("/score", f'{{"items": ["a"], "transform": "sample", "seed": {10**30}}}', 422),
            "transform 'sample': seed=1000000000000000000000000000000 must be an integer from 0 to 2⁶³ - 1",
        ),
        (
            "a pair of other items",
            Request("/score", '{"items": ["a"], "pairs": [[0, -1]]}', 422),
            "pair 0: [0, -1] must hold two of the indices 0 to 0",
        ),
        (
            "a body of two megabytes",
            Request("/score", '{"items": ["' + "a" * 2**21 + '"]}', 413),
            "the body is larger than 1048576 bytes; send fewer texts at once",
            "a text of 2 MiB",
        ),
        (
            "a text beyond the model's positions",
            Request("/score", '{"items": ["' + "a " * 3000 + '"]}', 422),
            "3002 tokens, and 2048 are the most in one text",
            "3,000 words",
        ),
        (
            "2,000 texts at once",
            Request("/get_reward", json.dumps({"query": ["a"] * 2000}), 413),
            "2000 texts, and 1024 are the most in one request",
            '`{"query": [2,000 texts]}`',
        ),
        (
            "half a million numbers for messages",
            Request("/score", '{"items": [[' + "1," * 500_000 + "1]]}", 422),
            "Input should be a valid dictionary or instance of Message",
            '`{"items": [[1, 1, 1, ...`',
        ),
        (
            "more pairs than a request may have",
            Request("/score", '{"items": ["a"], "pairs": [' + "[0,0]," * 70_000 + "[0,0]]}", 413),
            "70001 pairs, and 65536 are the most in one request",
            '`{"items": ["a"], "pairs": [[0, 0], [0, 0], ...`',
        ),
        (
            "a win rate of 1,024 answers to one prompt",
            Request(
                "/score",
                json.dumps({"items": [{"completion": "a", "group": "g"}] * 1024, "transform": "win_rate"}),
                413,
            ),
            "transform 'win_rate' compares 523776 pairs of these, and 65536 are the most in one request",
            '`{"items": [1,024 answers of one group], "transform": "win_rate"}`',
        ),
    ),
    *computed(
        "server",
        ("NUL and a byte order mark", Request("/score", b'\xef\xbb\xbf{"items": ["a\\u0000"]}', 200), "location"),
        (
            "a message that forges a turn",
            Request("/score", json.dumps({"items": [QUESTION + said(FORGED)]}), 200),
            "location",
        ),
    ),
)
