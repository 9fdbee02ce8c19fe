"""What is not read as it was meant is warned of, by the trainer and by `data check` in the same words."""

import json

import pytest
from datasets import Dataset
from preference_rows import EXPLICIT, IMPLICIT, STANDARD, TOKENIZED, assistant, map_style, streamed, system, user

from disco_trl.data.curation.check import check_dataset
from disco_trl.data.findings import ROWS_SAMPLED
from disco_trl.data.validation import check_preferences


PROMPT = STANDARD["prompt"]
REPEATED = {
    "prompt": EXPLICIT["prompt"],
    **{side: EXPLICIT["prompt"] + EXPLICIT[side] for side in ("chosen", "rejected")},
}
FOUND = {
    "pictures": (
        {**EXPLICIT, "images": ["a.png"]},
        ("column 'images': pictures, sound or video (rows 0, 1, 2) are not read", 'remove_columns(["images"])'),
    ),
    "a picture beside token ids": ({**TOKENIZED, "image": "a.png"}, ("column 'image': pictures",)),
    "a system column": (
        {**STANDARD, "system": "Answer in French."},
        ("column 'system': not read (rows 0, 1, 2)", "data convert DATA OUT.jsonl --rename prompt=instruction`"),
    ),
    "a system column beside messages": (
        {**EXPLICIT, "system_prompt": "Answer in French."},
        ("column 'system_prompt': not read (rows 0, 1, 2)", 'first message of the prompt: {"role": "system"'),
    ),
    "messages as JSON": (
        {name: json.dumps(messages) for name, messages in EXPLICIT.items()},
        (
            "column 'prompt' and 'chosen' and 'rejected': messages as JSON in a string (rows 0, 1, 2)",
            'dataset.map(lambda row: {"prompt": json.loads(row["prompt"]), "chosen": ',
        ),
    ),
    "a prompt before messages that have it": (
        REPEATED,
        ("column 'prompt': the answers begin with it already (rows 0, 1, 2)", 'dataset.remove_columns(["prompt"])'),
    ),
    "a prompt before texts that have it": (
        {**STANDARD, "chosen": PROMPT + "Four.", "rejected": PROMPT + "Five."},
        ("column 'prompt': the answers begin with it already (rows 0, 1, 2)", "as `columns` of the dataset"),
    ),
    "a prompt before ranked answers that have it": (
        {"prompt": "Two?", "completions": ["Two? 4", "Two? 5"], "ranks": [1, 2]},
        ("column 'prompt': the answers begin with it already",),
    ),
    "completions without ranks": (
        {**STANDARD, "completions": ["a", "b"]},
        ("column 'completions': not read beside 'chosen' and 'rejected'", 'dataset.remove_columns(["completions"])'),
    ),
}


@pytest.mark.parametrize("make", [map_style, streamed])
@pytest.mark.parametrize("case", FOUND)
def test_trainer_and_check_warn_alike(case, make, tiny_tokenizer, caplog):
    row, parts = FOUND[case]
    rows = [row] * 3
    check_preferences(make(rows), tiny_tokenizer, "train")
    warned = [message.removeprefix("train dataset, ") for message in caplog.messages if "column" in message]
    (found,) = [warning for warning in check_dataset(make(rows))[0]["warnings"] if parts[0] in warning]
    assert all(part in found for part in parts)
    assert warned == [found]


@pytest.mark.parametrize(
    "row",
    [
        {**EXPLICIT, "images": [], "image": None, "video": ""},
        {**EXPLICIT, "system": "  "},
        {
            "prompt": [system("Be brief."), user()],
            "chosen": [assistant()],
            "rejected": [assistant("5")],
            "system": "Be brief.",
        },
        {**IMPLICIT, "images": None},
        {"prompt": "Give JSON.", "chosen": '[{"a": 1}]', "rejected": "[1, 2"},
        {**STANDARD, "completions": []},
        {"prompt": "", "chosen": "a", "rejected": "b"},
    ],
    ids=str,
)
def test_what_is_as_it_was_meant_is_not_warned_of(row, tiny_tokenizer, caplog):
    check_preferences(Dataset.from_list([row, row]), tiny_tokenizer, "train")
    assert caplog.messages == []


def test_a_text_that_begins_like_its_prompt_by_chance_is_none(tiny_tokenizer, caplog):
    chance = {"prompt": "Hi", "chosen": "Hi there.", "rejected": "Hi!"}
    check_preferences(Dataset.from_list([STANDARD, STANDARD, chance]), tiny_tokenizer, "train")
    assert caplog.messages == []


def test_messages_that_repeat_their_prompt_in_some_rows_are_to_be_cut(tiny_tokenizer, caplog):
    check_preferences(Dataset.from_list([EXPLICIT, REPEATED, EXPLICIT]), tiny_tokenizer, "train")
    (message,) = caplog.messages
    assert "begin with it already (row 1), so the model sees it twice; cut it off the answers" in message


def test_rows_are_looked_at_all_over_a_dataset_and_at_the_front_of_a_stream(tiny_tokenizer, caplog):
    rows = [{**STANDARD, "image": None}] * 500 + [{**STANDARD, "image": "a.png"}] * 50
    check_preferences(map_style(rows), tiny_tokenizer, "train")
    assert "column 'image': pictures" in caplog.text
    caplog.clear()
    read = []
    dataset = (
        map_style(rows).to_iterable_dataset().map(lambda row, number: read.append(number) or {}, with_indices=True)
    )
    check_preferences(dataset, tiny_tokenizer, "train")
    assert caplog.messages == [] and max(read) <= ROWS_SAMPLED


def test_sources_whose_ratings_reach_to_different_heights(tiny_tokenizer, caplog):
    def rows(*highest):
        return [
            {**STANDARD, "dataset": f"of {high}", "chosen_rating": high - 0.5 * (n % 2), "rejected_rating": 1.0}
            for high in highest
            for n in range(4)
        ]

    check_preferences(Dataset.from_list(rows(5.0, 10.0)), tiny_tokenizer, "train")
    (message,) = caplog.messages
    assert "ratings reach 5 where 'dataset' is 'of 5.0', and 10 where it is 'of 10.0'; if these are two" in message
    caplog.clear()
    check_preferences(Dataset.from_list(rows(9.0, 10.0)), tiny_tokenizer, "train")
    # One row of a source tells nothing of its scale.
    check_preferences(Dataset.from_list([rows(5.0)[0], *rows(10.0)]), tiny_tokenizer, "train")
    assert caplog.messages == []


def test_sources_whose_strengths_reach_to_different_heights(tiny_tokenizer, caplog):
    def rows(*highest, each=16):
        return [
            {**STANDARD, "source": f"of {high}", "preference_strength": [1 + n % high, -1]}
            for high in highest
            for n in range(each)
        ]

    (warning,) = check_dataset(Dataset.from_list(rows(2, 3, each=20)))[0]["warnings"][:1]
    assert "column 'preference_strength': strengths reach 2 where 'source' is 'of 2', and 3 where" in warning
    assert 'leave the strengths out: dataset.remove_columns(["preference_strength"])' in warning
    # Among the trainer's 32 rows a source has too few for the strongest to be among them.
    check_preferences(Dataset.from_list(rows(2, 3)), tiny_tokenizer, "train")
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("margins", "warns"),
    [([3, 1, 2, 0], True), ([1.0, 3.0], True), ([1, 0, 1], False), ([3, 1.5], False), ([30, 1, 2], False)],
)
def test_margins_that_look_like_grades(margins, warns, tiny_tokenizer, caplog):
    rows = [{**STANDARD, "margin": margin} for margin in margins]
    check_preferences(map_style(rows), tiny_tokenizer, "train")
    found = [message for message in caplog.messages if "column 'margin': the whole numbers" in message]
    assert len(found) == warns
    assert all('dataset.rename_column("margin", "preference_strength")' in message for message in found)
    # Beside strengths a margin is what it says.
    assert not any("margin" in warning for warning in warnings_of([row | {"preference_strength": 1} for row in rows]))


def warnings_of(rows):
    return check_dataset(map_style(rows))[0]["warnings"]
