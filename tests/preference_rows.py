"""Rows of every type of preference dataset that TRL documents, and datasets made of them."""

import json
import random
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Json


def user(content="What is two and two?"):
    return {"role": "user", "content": content}


def assistant(content="Four."):
    return {"role": "assistant", "content": content}


def system(content="Be brief."):
    return {"role": "system", "content": content}


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}],
}
TOOL = {"role": "tool", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]

STANDARD = {"prompt": "Two and two? ", "chosen": "Four.", "rejected": "Five."}
EXPLICIT = {"prompt": [user()], "chosen": [assistant()], "rejected": [assistant("Five.")]}
IMPLICIT = {"chosen": [user(), assistant()], "rejected": [user(), assistant("Five.")]}
TOKENIZED = {"chosen_ids": [1, 2, 3], "rejected_ids": [1, 2]}
LEGACY = {"chosen_input_ids": [1, 2, 3], "rejected_input_ids": [1, 2]}


def streamed(rows):
    """Rows handed over as they are; Arrow would refuse mixed ones."""
    return IterableDataset.from_generator(lambda: iter(rows))


def map_style(rows):
    """A `Dataset` of these rows: typed, or, where they mix types, as JSON, like `load_dataset("json")` makes it."""
    try:
        return Dataset.from_list(rows)
    except pa.ArrowException:
        return Dataset.from_list(rows, features=Features({name: Json() for name in rows[0]}))


# What TRL takes, we take: the rows of one dataset, all legal.
LEGAL = {
    "standard, explicit prompt": [STANDARD, {**STANDARD, "prompt": ""}],
    "standard, implicit prompt": [{"chosen": "Two and two? Four.", "rejected": "Two and two? Five."}],
    "explicit prompt": [EXPLICIT, {**EXPLICIT, "prompt": [system(), user()]}],
    "implicit prompt": [IMPLICIT],
    "several turns": [{**EXPLICIT, "prompt": [system(), user(), assistant(), user("And three?")]}],
    "consecutive users and assistants": [{**EXPLICIT, "prompt": [user(), user(), assistant(), assistant(), user()]}],
    "developer and unknown roles": [
        {**EXPLICIT, "prompt": [{"role": "developer", "content": "x"}, {"role": "critic", "content": "y"}]}
    ],
    "empty user turn": [{**EXPLICIT, "prompt": [user("")]}],
    "tools": [
        {
            "prompt": [system(), user(), CALL, {"role": "tool", "content": None}, TOOL],
            "chosen": [assistant()],
            "rejected": [CALL],
            "tools": TOOLS,
        },
        {**EXPLICIT, "tools": None},
    ],
    "tools as JSON": [{**EXPLICIT, "tools": json.dumps(TOOLS)}],
    "template arguments": [{**EXPLICIT, "chat_template_kwargs": {"add_generation_prompt": True}}],
    "margin": [{**STANDARD, "margin": 1}, {**STANDARD, "margin": -0.5}],
    "other columns": [{**EXPLICIT, "subset": "maths", "score": 1.5, "messages": [user(), assistant()]}],
    "tokenized": [TOKENIZED, {"chosen_ids": [0], "rejected_ids": [1]}],
    "tokenized, old names": [LEGACY],
}


def write_pairs(path: Path, number: int = 16) -> Path:
    rng = random.Random(0)
    words = ["a", "short", "answer", "about", "films", "and", "people"]
    with path.open("w") as file:
        for _ in range(number):
            chosen, rejected = (" ".join(rng.choices(words, k=length)) for length in (6, 3))
            prompt = [{"role": "user", "content": "What do you think?"}]
            row = {
                "chosen": [*prompt, {"role": "assistant", "content": chosen}],
                "rejected": [*prompt, {"role": "assistant", "content": rejected}],
            }
            file.write(json.dumps(row) + "\n")
    return path
