"""Fuzz the data path for rows that fail other than by a clear error.

Run as:

    python -m benchmarks.fuzz_data --minutes 8 --seed 0

Rows of every supported kind, and mutations of them, go through everything that reads rows: the validation of training
and of `disco-trl data check`, the converters of `disco-trl data convert`, the items of `disco-trl evaluate`,
tokenization, and the collator with its judgements. A row may pass, or be refused by a `ValueError` (a `BadRow` is
one). Any other error is a finding: it is printed with the row that caused it, and the exit status is 1.

Neither a model nor a network is needed: the tokenizer is a byte-level one that is created here.
"""

import argparse
import copy
import json
import math
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from disco_trl.data.collator import BY_RATER, OF_ATTRIBUTES, DataCollatorForDiscoPreference
from disco_trl.data.columns import OVERALL, PAIRS, RANKED_IDS, RANKING, TOKENIZED_PAIR, find_layout
from disco_trl.data.curation.convert import Converter, Report, detect_format
from disco_trl.data.curation.formats import FORMATS
from disco_trl.data.curation.survey import DataSurvey
from disco_trl.data.findings import Findings
from disco_trl.data.judgements import Survey
from disco_trl.data.look_alikes import find_look_alikes, fix_of_answers
from disco_trl.data.records import MOST_LEVELS, read_record
from disco_trl.data.tokenization import SpecialTokens, tokenize_record
from disco_trl.data.validation import find_special_token
from disco_trl.data.values import Row
from disco_trl.evaluation.held_out import detect_kind, item_reader


CHAT_TEMPLATE = """\
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] or '' }}
{%- for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}<|im_end|>
{% endfor %}"""

USER = {"role": "user", "content": "Two and two?"}
FOUR = {"role": "assistant", "content": "Four."}
FIVE = {"role": "assistant", "content": "Five."}
PLAIN = {"prompt": "Two and two? ", "chosen": "Four.", "rejected": "Five."}
CHAT = {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}

SOUND: list[Row] = [
    PLAIN,
    CHAT,
    {"chosen": [USER, FOUR], "rejected": [USER, FIVE]},
    CHAT | {"tools": [{"type": "function", "function": {"name": "add"}}], "chat_template_kwargs": {"thinking": True}},
    CHAT | {"tools": '[{"type": "function"}]'},
    {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6]},
    {"chosen_input_ids": [5, 6, 7], "rejected_input_ids": [5, 6]},
    PLAIN | {"chosen_votes": 9, "rejected_votes": 1, "weight": 2.0},
    PLAIN | {"preference_probability": 0.9, "margin": 0.5},
    PLAIN | {"preference_strength": [2, -1, 0]},
    PLAIN | {"preference_strength": -3, "margin": 1},
    PLAIN | {"tie": True},
    PLAIN | {"chosen_rating": [5, 4], "rejected_rating": 1, "chosen_votes": 0, "rejected_votes": 0},
    {"prompt": "Two and two? ", "completions": ["Four.", "Five.", "4"], "ranks": [1, 3, 1]},
    {"prompt": [USER], "completions": [[FOUR], [FIVE]], "ranks": [1, 2]},
    PLAIN | {"chosen_rating": {"tone": [5, None], "safety": [4, 3]}, "rejected_rating": {"overall": 2}},
    PLAIN | {"attribute": "safety", "preference_strength": 2},
    {"prompt": "a", "completions": ["b", "c", "d"], "completion_ratings": [{"tone": 1}, None, {"tone": 2, "x": 3}]},
    {
        "prompt": "a",
        "completions": ["b", "c"],
        "ranks": [1, 2],
        "attribute": "tone",
        "completion_ratings": [[1, 2], 3],
    },
    # Formats that are converted
    {"prompt": "a", "completion": "b", "ratings": [1, 2, 3]},
    {"prompt": "a", "responses": ["b", "c"], "scores": [0.5, 1.5]},
    {"prompt": "a", "answers": ["b", "c"], "order": [1, 0]},
    {"prompt": "a", "completions": [{"content": "b", "rank": 1}, {"content": "c", "rank": 2}]},
    {
        "instruction": "a",
        "completions": [{"response": "b", "overall_score": 7.5}, {"response": "c", "overall_score": 2}],
    },
    {
        "instruction": "a",
        "completions": [{"response": r, "annotations": {"helpfulness": {"Rating": "4"}}} for r in "bc"],
        "models": ["x", "y"],
    },
    {"context": [USER], "response1": "b", "response2": "c", "individual_preference": [{"score": -2}, {"score": 0}]},
    {"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 2},
    {"prompt": "a", "chosen": "b", "rejected": "c", "preference_strength": "slightly better"},
    {"text": "a", "completion_a": "b", "completion_b": "c", "expert_worker_annotations": [{"overall_pref": "Tie"}]},
    {"prompt": "a", "response_a": "b", "response_b": "c", "prob_a": 0.3},
    {"instruction": "a", "input": "b", "chosen": "c", "rejected": "d", "history": [["e", "f"]], "system": "g"},
    {
        "conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f"}'}],
        "chosen": {"from": "gpt", "value": "b"},
        "rejected": {"from": "gpt", "value": "c"},
        "tools": "[]",
    },
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    # Benchmarks
    {"prompt": "a", "chosen": "b", "rejected": "c", "subset": "hep-go", "chosen_model": "x", "id": 1},
    {"prompt": "a", "chosen": ["b"], "rejected": ["c", "d"], "subset": "Ties", "num_correct": 1, "id": "ref:1"},
    {"prompt": "a", "chosen": ["b", "c", "d"], "rejected": ["e", "f", "g"], "domain": "chat", "id": 1},
    {"question": "a", "response_A": "b", "response_B": "c", "label": "A>B", "source": "mmlu-pro", "pair_id": "x"},
    {"input": "a", "output_1": "b", "output_2": "c", "label": 1},
]


def nested(depth: int) -> Any:
    """A list nested to the given depth."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, 1.5, -0.0, math.nan, math.inf, -math.inf, 1e39, 1e300, 10**400, 10**5000),
    *(
        "",
        " ",
        "\0",
        "\ud800",
        "\ufeff",
        "<|im_end|>",
        "<|pad|>",
        "a" * 300,
        "1e999",
        "nan",
        "N/A",
        "{{ x }}",
        "[" * 9000,
    ),
    *(
        "\n\nHuman:",
        "\n\nHuman: a\n\nAssistant:",
        "<extra_id_1>User\n",
        "é",
        "e\u0301",
        "[1]",
        "{}",
        "null",
        "1" * 5000,
    ),
    *(
        [],
        {},
        [None],
        [[]],
        [{}],
        [""],
        ["a"],
        [1, 2],
        ["a", 1],
        [math.nan],
        {"a": 1},
        {"content": "a"},
        {"role": "user"},
    ),
    *([USER], [FOUR], [USER, FOUR], [{"role": None, "content": "a"}], [{"role": "system", "content": None}]),
    *([{"role": "assistant", "content": None, "tool_calls": "x"}], [{"role": "user", "content": [{"type": "image"}]}]),
    *({"from": "gpt", "value": "a"}, {"from": ["x"], "value": 1}, {"chat_template": "{{ messages | no_filter }}"}),
    *({"tokenize": False}, {"content": 1}, {"conversation": 1}, {"add_generation_prompt": "x"}, b"\xff", nested(150)),
    *(list(range(300)), ["a"] * 300, torch.tensor(1.0), torch.tensor([1, 2]), torch.tensor([]), object()),
    *(np.array(1), np.array([1, 2]), np.array([]), np.float32("nan"), np.array([["a", "b"]]), np.bool_(True)),
]
NAMES = sorted({name for row in SOUND for name in row} | {"messages", "text", "source", "category"})


def mutated(row: Row, rng: random.Random) -> Row:
    """A copy of a row with one to four random changes, at any depth."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        kind = rng.randrange(5)
        if kind == 0:
            row[rng.choice(NAMES)] = copy.deepcopy(rng.choice(ODD))
        elif kind == 1 and row:
            del row[rng.choice(list(row))]
        elif kind == 2 and row:
            row[rng.choice(NAMES)] = row.pop(rng.choice(list(row)))
        elif kind == 3:
            row |= copy.deepcopy(rng.choice(SOUND))
        else:
            holder: Any = row
            while True:
                keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
                if not keys:
                    break
                key = rng.choice(keys)
                if isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.8:
                    holder = holder[key]
                    continue
                if isinstance(holder, list) and rng.random() < 0.3:
                    holder += [copy.deepcopy(holder[key])] * rng.choice((1, 2))
                else:
                    holder[key] = copy.deepcopy(rng.choice(ODD))
                break
    return row


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes, with a ChatML template."""
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    names = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


class DataPath:
    """Every step that a row goes through. A step may refuse the row by a `ValueError`."""

    def __init__(self) -> None:
        self.tokenizer = make_tokenizer()
        self.special = SpecialTokens(self.tokenizer)
        self.steps: dict[str, Callable[[Row], Any]] = {
            "check and train": self.train,
            "convert": self.convert,
            "evaluate": self.evaluate,
        }

    def train(self, row: Row) -> None:
        """Validates, surveys, tokenizes and collates a row, or advises what to do about its columns."""
        find_look_alikes(row)
        fix_of_answers(row)
        if not any(row.keys() >= {*names} for names in (*PAIRS, RANKING)):
            return
        layout = find_layout(row)
        record = read_record(row, layout)
        Survey().add(record)
        tokens = tokenize_record(record, self.tokenizer)
        if record.kind != "tokenized":
            find_special_token(record, self.special)
        findings = Findings()
        findings.add(row, record, 0)
        findings.messages()
        survey = DataSurvey()
        survey.add(record, 0, list(map(len, tokens)))
        survey.figures()
        read = {name: value for name, value in row.items() if value is not None}
        read |= {RANKED_IDS: tokens} if record.is_ranking else dict(zip(TOKENIZED_PAIR, tokens, strict=True))
        attributes = {OVERALL, *record.rated, record.comparisons[0].attribute}
        known: dict[str, dict[str, Any]] = {
            name: {"strength_levels": MOST_LEVELS, "tie_width": "learned"} for name in attributes
        }
        for name in record.rated:
            known[name]["rating_values"] = sorted({rating for given in record.ratings(name) for rating in given})
        for share_prefixes in (False, True):
            collator = DataCollatorForDiscoPreference(pad_token_id=0, share_prefixes=share_prefixes, likelihoods=known)
            batch = collator([read, read])
            of_attributes = batch.pop(OF_ATTRIBUTES, {})
            batch.pop(BY_RATER, None)  # has nan where a rater did not say
            batch.pop("nodes", None)  # is no tensor
            batch |= {f"{name} of {a}": tensor for a, of_a in of_attributes.items() for name, tensor in of_a.items()}
            for name, tensor in batch.items():
                if not torch.isfinite(tensor).all():
                    raise AssertionError(f"{name} of the batch is not finite")

    def convert(self, row: Row) -> None:
        """Passes a row to every converter, whether or not it recognises the row."""
        for name, known in FORMATS.items():
            known.recognise(row)
            converted = Converter(known.convert, Report(name), skip_bad=True)(row, 0)
            for answer in converted if name == "ratings" else ():
                converted = Converter(known.convert, Report(name), skip_bad=True).pair((0, answer), (0, answer), False)
            for sound in converted:
                self.train(sound)
        detect_format(row)

    def evaluate(self, row: Row) -> None:
        """Reads the items that evaluation makes of a row."""
        item_reader(detect_kind(row))(row, 0)


def described(row: Row) -> str:
    """The row as text, as far as it can be printed."""
    try:
        return repr(row)[:600]
    except (ValueError, RecursionError):
        return ", ".join(f"{name}: {type(value).__name__}" for name, value in row.items())


def main() -> None:
    """Fuzzes until the time is up."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="Duration in minutes (default: %(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the mutations (default: %(default)s).")
    parser.add_argument("--rows", type=int, help="Stop after this number of rows, even if there is time left.")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    path = DataPath()
    ended: Counter[str] = Counter()
    finds: dict[str, tuple[int, str]] = {}
    start = time.monotonic()
    seconds = 60 * args.minutes
    with tqdm(total=round(seconds), unit="s", desc="fuzzing") as bar:
        while (elapsed := time.monotonic() - start) < seconds and ended["rows"] != args.rows:
            bar.update(int(elapsed) - bar.n)
            row = mutated(rng.choice(SOUND), rng)
            ended["rows"] += 1
            for name, step in path.steps.items():
                try:
                    step(copy.copy(row))
                    ended[f"{name}: went through"] += 1
                except ValueError:
                    ended[f"{name}: refused"] += 1
                except Exception as error:
                    frames = traceback.extract_tb(error.__traceback__)
                    last = [frame for frame in frames if "disco_trl" in frame.filename][-1:] or frames[-1:]
                    place = f"{name}: {type(error).__name__} in {last[0].filename}:{last[0].lineno}"
                    ended[f"{name}: failed"] += 1
                    if place not in finds:
                        finds[place] = (ended["rows"], f"{str(error)[:200]}\n    {described(row)}")
                        bar.write(f"{place}: {finds[place][1]}")
    print(json.dumps(ended, indent=2))
    print(f"{len(finds)} finds")
    for place, (number, what) in finds.items():
        print(f"  row {number} of seed {args.seed}, {place}: {what}")
    sys.exit(1 if finds else 0)


if __name__ == "__main__":
    main()
