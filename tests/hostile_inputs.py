"""Bad data, way by way in, and what becomes of each: the table of `docs/hostile_inputs.md`.

    python tests/hostile_inputs.py > docs/hostile_inputs.md

`tests/data/test_hostile_inputs.py` puts every row through the code that users run.
"""

from __future__ import annotations

import json

from hostile.commands import COMMANDS
from hostile.inputs import Answers, Call, Hostile, Request
from hostile.rewards import REWARDS
from hostile.server import SERVER
from hostile.training import TRAINING


WAYS = {
    "trainer": "`DiscoRewardTrainer(train_dataset=...)`, and a step where nothing is refused",
    "stream": "the same with an `IterableDataset`, which may hold what no file can",
    "data check": "`disco-trl data check`",
    "data convert": "`disco-trl data convert`",
    "train": "`disco-trl train --config`",
    "score": "`disco-trl score`",
    "evaluate": "`disco-trl evaluate`",
    "DiscoReward": "`DiscoReward(...).distribution(prompts, completions, **columns)`",
    "server": "`disco-trl serve`, over HTTP",
    "checkpoint": "`DiscoReward(path)`, as all commands load a model",
}


HOSTILE: tuple[Hostile, ...] = (*TRAINING, *REWARDS, *COMMANDS, *SERVER)


# The document


ABOUT = """\
# Bad data, and what becomes of it

Made by `python tests/hostile_inputs.py > docs/hostile_inputs.md`; every row is put through the code that users run by
`tests/test_hostile_inputs.py`. A message names the row, the column and the fix; where it goes on in another library's
words, only its beginning is here. What is refused leaves the files that were there as they were. No code that came
with data or a checkpoint is run.

**Special tokens in a text.** A tokenizer takes `<|im_end|>` in a message for the token that ends a turn, wherever it
comes from. TRL trains on these tokens and scores with them, and disco-trl's tokens are TRL's, so they are neither
taken out nor escaped: the same text has the same reward in training, in scoring and in TRL. But whoever writes them, a
user or a policy, can end a turn and begin another one. So it is said: training warns of the first such row,
`disco-trl data check --model` counts all of them, and `DiscoReward`, also behind `disco-trl serve`, warns once.
(Policies that TRL trains cannot put the tokens themselves into an answer, which is decoded without special tokens, but
they can spell them.) A text that ends with the end-of-text token is as TRL wants it. `POST /get_reward` takes rendered
text, in which the template's tokens and those of a user cannot be told apart; use `/score` with messages.

**Pickles.** An adapter is read from safetensors only. A whole model that has nothing but `pytorch_model.bin` is read
as tensors, by torch's reader that runs no code; a file with anything else in it is refused. **Code** in a checkpoint
is run only where `trust_remote_code=True` is given, and is never asked about at the terminal.

**What nobody thought of.** `python -m benchmarks.fuzz_data --minutes 31 --seed 20261128` put 1,292,980 mutated rows
through the checks, the converters, evaluation, tokenization and the collator. It and shorter runs before it found
seven ways to fail other than by a `ValueError`, all by arrays or NaN where numbers, tools or settings should be, and
all fixed (`tests/test_properties.py` keeps them). Then `--minutes 24 --seed 2`, 1,373,422 rows, found nothing.

**What is not held off.** A chat template in the data (`chat_template_kwargs`) runs in transformers' sandbox, which has
no way out but sets no limit to its time. JSON whose values are nested hundreds of thousands deep ends the process in
Arrow's reader before any row is seen. A `--config` file may set environment variables, as TRL's do.
"""


def as_table_cell(text: str) -> str:
    """On one line, and with nothing that Markdown reads as more than text."""
    text = text.replace("\\", "\\\\") if "`" not in text else text
    return " ".join(text.split()).replace("|", "\\|")


def shown_input(row: Hostile) -> str:
    """The input in short, as code."""
    if row.shown is not None:
        return row.shown
    given = row.given
    if isinstance(given, list):
        text = json.dumps(given[-1], default=repr) if given else "[]"
    elif isinstance(given, Call):
        as_text = {str: str, list: lambda rows: json.dumps(rows[-1])}
        contents = [as_text.get(type(content), repr)(content) for content in given.files.values()]
        links = [f"{name} → {target}" for name, target in given.links.items()]
        text = ": ".join([given.command, ", ".join([*map(str.strip, contents), *links])])
    elif isinstance(given, Answers):
        columns = "".join(f", {name}={values!r}" for name, values in given.columns.items())
        text = f"{given.prompts!r}, {given.completions!r}{columns}"
    elif isinstance(given, Request):
        text = f"{given.path}: {given.body if isinstance(given.body, str) else repr(given.body)}"
    else:
        named = [f"{name}: {value}" for name, value in (("config.json", given.config),) if value]
        named += [*given.tensors, *given.files]
        text = ", ".join(named)
    text = " ".join(text.split())
    return f"`{text if len(text) <= 110 else text[:107] + '...'}`"


def document() -> str:
    """The table, way by way in."""
    lines = [ABOUT]
    for way, what in WAYS.items():
        rows = [row for row in HOSTILE if row.way == way]
        lines += [f"## {what}", "", f"{len(rows)} rows.", "", "| what | input | answer |", "| --- | --- | --- |"]
        for row in rows:
            status = f"{row.given.status}: " if isinstance(row.given, Request) else ""
            verdict = "refused: " if row.refused else ""
            answer = f"{verdict}{status}{row.answer}".strip().removesuffix(":")
            lines.append(f"| {row.name} | {as_table_cell(shown_input(row))} | {as_table_cell(answer)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(document(), end="")
