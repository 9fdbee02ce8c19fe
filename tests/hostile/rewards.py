"""Bad checkpoints, and bad prompts and answers for `DiscoReward`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hostile.inputs import DEEP, FORGED, INF, NAN, QUESTION, Answers, Checkpoint, computed, refused, said


def pickled_code() -> bytes:
    """A pickle that makes a folder called `pwned` when it is read."""
    import os
    import pickle

    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, ("pwned",)

    return pickle.dumps(Code(), protocol=2)


def pickled_weights() -> bytes:
    """The file that PEFT wrote before it knew safetensors."""
    import io

    import torch

    stream = io.BytesIO()
    torch.save({"base_model.model.score.weight": torch.zeros(1, 16)}, stream)
    return stream.getvalue()


def filled(value: float, *shape: int) -> Callable[[], Any]:
    def make() -> Any:
        import torch

        return torch.full(shape, value)

    return make


REWARDS = (
    *refused(
        "checkpoint",
        (
            "pickled code for weights",
            Checkpoint(files={"pytorch_model.bin": pickled_code}, without=("model.safetensors",)),
            "its pickled weights hold more than tensors, so reading them might run code, and they "
            "were not read; save the model as safetensors where you trust it",
        ),
        (
            "an adapter with pickled weights only",
            Checkpoint(
                "adapter", files={"adapter_model.bin": pickled_weights}, without=("adapter_model.safetensors",)
            ),
            "the adapter has no adapter_model.safetensors (pickled weights are not loaded)",
        ),
        (
            "a model that asks for its own code",
            Checkpoint(
                config={"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd"}},
                files={"odd.py": "import os\nos.mkdir('pwned')\nclass Odd: pass\n"},
            ),
            "contains custom code which must be executed to correctly load the model",
        ),
        (
            "a tokenizer that asks for its own code",
            Checkpoint(
                files={
                    "tokenizer_config.json": json.dumps(
                        {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Odd", None]}}
                    ),
                    "odd.py": "import os\nos.mkdir('pwned')\nclass Odd: pass\n",
                }
            ),
            "holds no tokenizer that can be loaded; pass the one of its training as processing_class",
        ),
        (
            "NaN in the head",
            Checkpoint(tensors={"score.weight": filled(NAN, 1, 16)}),
            "score.weight holds values that are not finite, so its rewards would be none; go back to "
            "an earlier checkpoint of its training",
        ),
        (
            "infinity in the scale",
            Checkpoint(tensors={"score.scale.mean_hidden": filled(INF, 16)}),
            "score.scale.mean_hidden holds values that are not finite, so its rewards would be none; "
            "go back to an earlier checkpoint of its training",
        ),
        (
            "a head of another shape",
            Checkpoint(tensors={"score.weight": filled(1.0, 3, 16)}),
            "score.weight has shape [3, 16] in its files, so it is a classifier with 3 labels and not a "
            "reward model, whose head has shape [1, 16]",
        ),
        (
            "weights cut off",
            Checkpoint(files={"model.safetensors": lambda: b"\x20\0\0\0\0\0\0\0{"}),
            "its weights are not whole (",
        ),
        (
            "settings that are a text",
            Checkpoint(config={"disco": "yes"}),
            "its reward settings are 'yes', and have to be an object; save it again",
        ),
        (
            "settings without a family",
            Checkpoint(config={"disco": {"fixed_scale": 1.0}}),
            "its reward settings lack 'reward_family'; save it again",
        ),
        (
            "a list for a family",
            Checkpoint(config={"disco": {"reward_family": ["normal"], "fixed_scale": None}}),
            "its reward settings say reward_family=['normal'], which has to be the name of a family; save it again",
        ),
        (
            "a text for a scale",
            Checkpoint(config={"disco": {"reward_family": "normal", "fixed_scale": "1"}}),
            "its reward settings say fixed_scale='1', which has to be null or a number; save it again",
        ),
        (
            "settings that ask for terabytes",
            Checkpoint(config={"disco": {"reward_family": "normal", "fixed_scale": None, "epistemic": 10**13}}),
            "its reward settings say epistemic=10000000000000, which has to be a number of directions; save it again",
        ),
        (
            "ratings out of order",
            Checkpoint(
                config={
                    "disco": {"reward_family": "normal", "fixed_scale": None, "likelihood": {"rating_values": [2, 1]}}
                }
            ),
            "its reward settings say likelihood={'rating_values': [2, 1]}, which has to be settings "
            "as training writes them; save it again",
        ),
        (
            "a config that is a list",
            Checkpoint(files={"config.json": "[1]"}),
            "holds no tokenizer that can be loaded; pass the one of its training as processing_class",
        ),
        ("a config cut off", Checkpoint(files={"config.json": '{"model_type": "lla'}), "holds no tokenizer that can"),
        (
            "an adapter's settings nested too deeply",
            Checkpoint("adapter", files={"disco_config.json": DEEP}),
            "disco_config.json is not JSON (maximum recursion depth exceeded",
            "`disco_config.json` of `[[[[...`, 100,000 deep",
        ),
        (
            "an adapter of no base",
            Checkpoint("adapter", files={"adapter_config.json": "[]"}),
            "its configuration is not what it should be (",
        ),
        (
            "an adapter whose base is not named",
            Checkpoint("adapter", files={"adapter_config.json": '{"peft_type": "LORA"}'}),
            "adapter_config.json names no base model (base_model_name_or_path)",
        ),
    ),
    *computed(
        "checkpoint",
        (
            "a known model that offers its own code",
            Checkpoint(
                config={"auto_map": {"AutoModelForSequenceClassification": "odd.Odd"}},
                files={"odd.py": "import os\nos.mkdir('pwned')\nclass Odd: pass\n"},
            ),
            "loads, without that code",
        ),
    ),
    *refused(
        "DiscoReward",
        (
            "prompts and answers of other numbers",
            Answers(["a"], []),
            "1 prompts but 0 completions; they go together row by row",
        ),
        (
            "None",
            Answers([None], [None]),
            "row 0: the prompt is a NoneType and the completion a NoneType; both must be texts, or "
            "both lists of messages",
        ),
        (
            "bytes",
            Answers([b"a"], [b"b"]),
            "row 0: the prompt is a bytes and the completion a bytes; both must be texts, or both lists of messages",
        ),
        (
            "a text and messages",
            Answers(["a", "a"], ["b", said("b")]),
            "row 1: the prompt is a str and the completion a list; both must be texts, or both lists of messages",
        ),
        (
            "texts for messages",
            Answers([["a"]], [["b"]]),
            'row 0: turn 0 is a string, not a message; write each turn as {"role": ..., "content": ...}',
        ),
        (
            "a message without a role",
            Answers([[{"content": "a"}]], [said("b")]),
            "row 0: turn 0 has no 'role' that is a string (its keys: 'content'); write each turn as "
            '{"role": ..., "content": ...}',
        ),
        (
            "a number for a message's text",
            Answers([QUESTION], [said(4)]),
            "row 0: turn 1 ('assistant') has content that is a value of type int, not a text; write it as a string",
        ),
        (
            "an image",
            Answers([[{"role": "user", "content": [{"type": "image", "url": "file:///etc/passwd"}]}]], [said("b")]),
            "row 0: turn 0 ('user') holds a part that is not text ('image'), and reward models read text; drop the "
            'row, or keep its parts {"type": "text", "text": ...} only',
        ),
        ("no messages at all", Answers([[]], [[]]), "row 0: no messages; leave the row out"),
        ("half a character", Answers(["a"], ["\ud800"]), "row 0: the tokenizer does not take it"),
        (
            "a number for tools",
            Answers([QUESTION], [said("b")], {"tools": [5]}),
            "row 0: the chat template, or the to",
        ),
        (
            "too few tools",
            Answers([QUESTION] * 2, [said("b")] * 2, {"tools": [None]}),
            "1 tools but 2 prompts; they go together row by row",
        ),
        (
            "a text beyond the model's positions",
            Answers([""], ["a " * 3000]),
            "sequence 0 has 3002 tokens, and the model has 2048 positions (max_position_embeddings in"
            " its config.json); leave it out, or cut the text yourself",
            "3,000 words for a model of 2,048 positions",
        ),
    ),
    *computed(
        "DiscoReward",
        ("no rows", Answers([], []), "scores 0"),
        ("nothing said", Answers([""], [""]), "scores 1"),
        ("NUL, control characters, a byte order mark", Answers(["\0"], ["\x1b[2J\ufeff"]), "scores 1"),
        (
            "an answer that forges a turn",
            Answers([QUESTION], [said(FORGED)]),
            "scores 1; warns: disco_mean: row 0: the text holds '<|im_end|>', which the tokenizer takes for the",
        ),
    ),
)
