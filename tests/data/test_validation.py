"""What `disco_trl.data.validation` refuses, by row and column, and that it changes nothing in what it lets through."""

import json
import math

import pytest
import torch
from datasets import Dataset, load_dataset
from preference_rows import (
    CALL,
    EXPLICIT,
    IMPLICIT,
    LEGACY,
    STANDARD,
    TOKENIZED,
    TOOL,
    TOOLS,
    assistant,
    map_style,
    streamed,
    system,
    user,
)

from disco_trl.data.columns import ROW_COLUMN
from disco_trl.data.validation import check_preferences


# Errors at a row: a good row, the columns that make it bad, and the error's column, complaint and fix.
BAD_ROWS = {
    "empty chosen": (STANDARD, {"chosen": ""}, "chosen", "an empty string", "drop the row"),
    "blank rejected": (STANDARD, {"rejected": " \n"}, "rejected", "an empty string", "drop the row"),
    "chosen None": (STANDARD, {"chosen": None}, "chosen", "None", "drop the row"),
    "prompt None": (STANDARD, {"prompt": None}, "prompt", "None", "fill in the text"),
    "number": (STANDARD, {"rejected": 5}, "rejected", "a value of type int in a dataset of plain text", "a string"),
    "messages among text": (
        *(STANDARD, EXPLICIT, "chosen"),
        *("a list of messages in a dataset of plain text", "the same way as 'chosen' of row 0"),
    ),
    "prompt of messages, sides of text": (
        *(STANDARD, {"prompt": [user()]}, "prompt"),
        *("a list of messages in a dataset of plain text", "the same way as 'chosen' of row 0"),
    ),
    "text among messages": (
        *(EXPLICIT, STANDARD, "chosen"),
        *("a string in a dataset of conversations", 'make it [{"role": "assistant", "content": ...}]'),
    ),
    "prompt of text, sides of messages": (
        *(EXPLICIT, {"prompt": "Two and two?"}, "prompt"),
        *("a string in a dataset of conversations", "data convert DATA OUT.jsonl --rename prompt=instruction` does"),
    ),
    "prompt of text that the sides repeat": (
        *({"prompt": [user()], **IMPLICIT}, {"prompt": "What is two and two?"}, "prompt"),
        *("that hold it already", 'dataset.remove_columns(["prompt"]), or, for `disco-trl train`, list the other'),
    ),
    "one message, not a list": (
        *(EXPLICIT, {"rejected": assistant()}, "rejected"),
        *("a value of type dict in a dataset of conversations", 'make it [{"role": "assistant"'),
    ),
    "rejected None": (EXPLICIT, {"rejected": None}, "rejected", "None", "fill in the messages"),
    "no messages": (EXPLICIT, {"rejected": []}, "rejected", "no messages", "put the answer there"),
    "no messages in the prompt": (EXPLICIT, {"prompt": []}, "prompt", "no messages", "put the user's turn there"),
    "strings for messages": (
        *(IMPLICIT, {"chosen": ["Two and two?", "Four."]}, "chosen"),
        *("turn 0 is a string, not a message", 'write each turn as {"role": ..., "content": ...}'),
    ),
    "other keys": (
        *(IMPLICIT, {"chosen": [{"from": "human", "value": "Two and two?"}]}, "chosen"),
        *("turn 0 has no 'role' that is a string (its keys: 'from', 'value')", 'write each turn as {"role"'),
    ),
    "empty role": (IMPLICIT, {"chosen": [user(), {"role": "", "content": "x"}]}, "chosen", "turn 1 has no 'role'", ""),
    "a picture": (
        *(EXPLICIT, {"prompt": [user([{"type": "image", "image": "a.png"}])]}, "prompt"),
        *("turn 0 ('user') holds a part that is not text ('image')", 'keep its parts {"type": "text", "text": ...}'),
    ),
    "a part without a text": (
        *(EXPLICIT, {"prompt": [user([{"type": "text", "text": None}])]}, "prompt"),
        *("turn 0 ('user') holds a part that is not text ('text')", "drop the row"),
    ),
    "strings for parts": (
        *(EXPLICIT, {"prompt": [user(["Two and two?"])]}, "prompt"),
        *("turn 0 ('user') holds a part that is not text (a string)", "drop the row"),
    ),
    "an answer of empty parts": (
        *(EXPLICIT, {"chosen": [assistant([{"type": "text", "text": " "}])]}, "chosen"),
        *("turn 0, the assistant's answer, is empty", "drop the row"),
    ),
    "number for content": (
        *(EXPLICIT, {"chosen": [assistant(4)]}, "chosen"),
        *("turn 0 ('assistant') has content that is a value of type int, not a text", ""),
    ),
    "user without content": (
        *(EXPLICIT, {"prompt": [user(None)]}, "prompt"),
        *("turn 0 ('user') has no content", "only a tool's turn, and an assistant's with tool_calls, may go without"),
    ),
    "assistant without content or calls": (
        *(EXPLICIT, {"rejected": [{"role": "assistant", "content": None, "tool_calls": []}]}, "rejected"),
        *("turn 0 ('assistant') has no content", "or drop the row"),
    ),
    "blank answer": (
        *(IMPLICIT, {"rejected": [user(), assistant("\n")]}, "rejected"),
        *("turn 1, the assistant's answer, is empty", "drop the row or fill in the answer"),
    ),
    "system after user": (
        *(IMPLICIT, {"chosen": [user(), system(), assistant()]}, "chosen"),
        *("turn 1 is 'system' after 'user'", "move the system turn to the front"),
    ),
    "developer between prompt and side": (
        *(EXPLICIT, {"rejected": [{"role": "developer", "content": "x"}, assistant()]}, "rejected"),
        *("turn 0 is 'developer' after 'user'", "move the developer turn to the front"),
    ),
    "system in the prompt": (
        *(EXPLICIT, {"prompt": [user(), system()]}, "prompt"),
        *("turn 1 is 'system' after 'user'", "move the system turn to the front"),
    ),
    "answer without question": (
        *(IMPLICIT, {"rejected": [assistant("Five.")]}, "rejected"),
        *("turn 0 is 'assistant', but nobody has asked anything yet", "into a column 'prompt'"),
    ),
    "assistant after system": (
        *(EXPLICIT, {"prompt": [system()]}, "chosen"),
        *("turn 0 is 'assistant', but nobody has asked anything yet", "put the user's turn before it"),
    ),
    "tool at the start": (
        *(EXPLICIT, {"prompt": [TOOL, user()]}, "prompt"),
        *("turn 0 is 'tool', but nobody has asked anything yet", ""),
    ),
    "tool after user": (
        *(EXPLICIT, {"prompt": [user(), TOOL]}, "prompt"),
        *("turn 1 is 'tool' after 'user'", "put the assistant's tool call before it"),
    ),
    "no assistant turn": (
        *(IMPLICIT, {"chosen": [user(), {"role": "gpt", "content": "Four."}]}, "chosen"),
        *("no assistant turn, so there is no answer to reward (roles: 'user', 'gpt')", "to 'assistant'"),
    ),
    "user last": (
        *(IMPLICIT, {"chosen": [user(), assistant(), user()]}, "chosen"),
        *("the last turn is 'user', not 'assistant'", "cut the conversation after the assistant's answer"),
    ),
    "tool last": (
        *(EXPLICIT, {"rejected": [CALL, TOOL]}, "rejected"),
        *("the last turn is 'tool', not 'assistant'", ""),
    ),
    "margin None": (
        *({**STANDARD, "margin": 0.5}, {"margin": None}, "margin"),
        *("None is not a finite number", "0.0 for no margin"),
    ),
    "margin nan": ({**STANDARD, "margin": 0.5}, {"margin": math.nan}, "margin", "nan is not a finite number", ""),
    "margin inf": ({**EXPLICIT, "margin": 0.5}, {"margin": math.inf}, "margin", "inf is not a finite number", ""),
    "margin of text": (
        {**TOKENIZED, "margin": 0.5},
        {"margin": "high"},
        "margin",
        "'high' is not a finite number",
        "",
    ),
    "tools that are not JSON": (
        *({**EXPLICIT, "tools": "[]"}, {"tools": "[add]"}, "tools"),
        *("a string that is not JSON", "write it with json.dumps, or give a list"),
    ),
    "template arguments None": (
        *({**EXPLICIT, "chat_template_kwargs": {"thinking": True}}, {"chat_template_kwargs": None}),
        *("chat_template_kwargs", "None where a dict should be", "give every row a dict"),
    ),
    "no tokens": (TOKENIZED, {"rejected_ids": []}, "rejected_ids", "no tokens", "drop the row"),
    "tokens None": (TOKENIZED, {"chosen_ids": None}, "chosen_ids", "None where token ids should be", "integers"),
    "negative token": (
        *(TOKENIZED, {"chosen_ids": [1, -100]}, "chosen_ids"),
        *("token id -100 is negative", "remove padding and label masks"),
    ),
    "token of text": (
        *(LEGACY, {"rejected_input_ids": [1, "two"]}, "rejected_input_ids"),
        *("token ids must be integers, but these are of type int, str", "give a list of integers"),
    ),
    "missing token": (
        *(TOKENIZED, {"chosen_ids": [1, None]}, "chosen_ids"),
        *("token ids must be integers, but these are of type NoneType, int", ""),
    ),
}


@pytest.mark.parametrize("kind", ["Dataset", "IterableDataset"])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_named(case, kind, tiny_tokenizer):
    good, change, column, wrong, fix = BAD_ROWS[case]
    rows = [good, good, {**good, **change}, good]
    with pytest.raises(ValueError) as error:
        if kind == "Dataset":
            check_preferences(map_style(rows), tiny_tokenizer, "train")
        else:
            list(check_preferences(streamed(rows), tiny_tokenizer, "train"))
    place, _, complaint = str(error.value).partition(": ")
    assert place == f"train dataset, row 2, column '{column}'"
    assert wrong in complaint.partition("; ")[0]
    assert fix in complaint.partition("; ")[2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": 7, "rejected": 8},
            "eval dataset, row 0, column 'chosen': a value of type int in a dataset of plain text; write every row "
            "and column the same way as 'chosen' of row 0: a string, or a list of messages",
        ),
        (
            {"chosen_ids": [1.0, 2.0], "rejected_ids": [1.0]},
            "eval dataset, row 0, column 'chosen_ids': token ids must be integers, but these are of type float; give "
            "a list of integers",
        ),
        (
            {"chosen": [assistant()], "rejected": [assistant()]},
            "eval dataset, row 0, column 'chosen': turn 0 is 'assistant', but nobody has asked anything yet; put the "
            "user's turn before it, or into a column 'prompt'",
        ),
        (
            {**STANDARD, "margin": True},
            "eval dataset, row 0, column 'margin': True is not a finite number; give every row a number (0.0 for no "
            "margin)",
        ),
    ],
)
def test_whole_message_of_a_bad_first_row(row, message, tiny_tokenizer):
    with pytest.raises(ValueError) as error:
        check_preferences(Dataset.from_list([row, row]), tiny_tokenizer, "eval")
    assert str(error.value) == message


def test_json_file_of_mixed_formats_is_refused_at_the_row(tmp_path, tiny_tokenizer):
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, [EXPLICIT, EXPLICIT, STANDARD])))
    dataset = load_dataset("json", data_files=str(path), split="train")
    with pytest.raises(ValueError, match="train dataset, row 2, column 'chosen': a string in a dataset of conver"):
        check_preferences(dataset, tiny_tokenizer, "train")


def test_stream_raises_at_the_row_and_not_before(tiny_tokenizer):
    checked = check_preferences(streamed([STANDARD, STANDARD, {**STANDARD, "chosen": ""}]), tiny_tokenizer, "train")
    rows = iter(checked)
    assert [next(rows)[ROW_COLUMN], next(rows)[ROW_COLUMN]] == [0, 1]
    with pytest.raises(ValueError, match="train dataset, row 2, column 'chosen'"):
        next(rows)


def test_two_processes_name_the_row_of_the_whole_dataset(tiny_tokenizer):
    rows = [EXPLICIT] * 20
    rows[17] = {**EXPLICIT, "chosen": [assistant(" ")]}
    with pytest.raises(ValueError, match="train dataset, row 17, column 'chosen'"):
        check_preferences(Dataset.from_list(rows), tiny_tokenizer, "train", num_proc=2)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            ("prompt", "accepted", "rejected"),
            "column 'chosen': missing (there are 'prompt', 'accepted', 'rejected'); "
            'dataset.rename_column("accepted", "chosen")',
        ),
        (
            ("prompt", "Chosen", "Rejected"),
            "column 'chosen' and 'rejected': missing (there are 'prompt', 'Chosen', 'Rejected'); "
            'dataset.rename_columns({"Chosen": "chosen", "Rejected": "rejected"})',
        ),
        (
            ("question", "response_j", "response_k"),
            "column 'chosen' and 'rejected': missing (there are 'question', 'response_j', 'response_k'); "
            'dataset.rename_columns({"response_j": "chosen", "response_k": "rejected", "question": "prompt"})',
        ),
        (
            ("prompt", "chosen", "rejcted"),
            "column 'rejected': missing (there are 'prompt', 'chosen', 'rejcted'); "
            'dataset.rename_column("rejcted", "rejected")',
        ),
        (
            ("prompt_id", "chosen_text", "rejected"),
            "column 'chosen': missing (there are 'prompt_id', 'chosen_text', 'rejected'); "
            'dataset.rename_column("chosen_text", "chosen")',
        ),
        (
            ("prompt", "chosen"),
            "column 'rejected': missing (there are 'prompt', 'chosen'); name the columns 'chosen' and 'rejected' (and "
            "'prompt'), or 'chosen_ids' and 'rejected_ids'; `disco-trl data convert --help` lists the formats that "
            "can be converted",
        ),
        (
            ("chosen_ids", "reject_ids"),
            "column 'rejected_ids': missing (there are 'chosen_ids', 'reject_ids'); "
            'dataset.rename_column("reject_ids", "rejected_ids")',
        ),
        (
            ("chosen", "rejected", "row_index"),
            "column 'row_index': the trainer keeps its own row numbers under this name; "
            'dataset.rename_column("row_index", "my_row_index")',
        ),
    ],
)
@pytest.mark.parametrize("make", [map_style, streamed])
def test_columns_are_named_with_their_fix(columns, message, make, tiny_tokenizer):
    with pytest.raises(ValueError) as error:
        row = {column: [1, 2] if column.endswith("_ids") else "text" for column in columns}
        check_preferences(make([row]), tiny_tokenizer, "train")
    assert str(error.value) == f"train dataset, {message}"


def test_a_score_is_never_taken_for_a_misspelt_side(tiny_tokenizer):
    row = {"chosen_score": 8.0, "answer_chosen": "Four.", "rejected": "Five."}
    with pytest.raises(ValueError, match=r'dataset.rename_column\("answer_chosen", "chosen"\)'):
        check_preferences(Dataset.from_list([row]), tiny_tokenizer, "train")


def test_column_that_would_confuse_trl_about_the_format(tiny_tokenizer):
    # TRL's is_conversational looks at whichever of its known columns a set yields first.
    with pytest.raises(
        ValueError, match=r"column 'completion': a string where 'chosen' is a list of messages.*remove"
    ):
        check_preferences(Dataset.from_list([{**EXPLICIT, "completion": "Four."}]), tiny_tokenizer, "train")
    with pytest.raises(ValueError, match=r"column 'messages': a list of messages where 'chosen' is a string.*remove"):
        check_preferences(Dataset.from_list([{**STANDARD, "messages": [user()]}]), tiny_tokenizer, "train")


@pytest.mark.parametrize("make", [lambda rows: Dataset.from_dict({"chosen": rows, "rejected": rows}), streamed])
def test_empty_dataset(make, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"^train dataset: it is empty; check its path, split and filters$"):
        check_preferences(make([]), tiny_tokenizer, "train")


@pytest.mark.parametrize("make", [map_style, streamed])
def test_conversations_need_a_chat_template(make, tiny_tokenizer):
    template, tiny_tokenizer.chat_template = tiny_tokenizer.chat_template, None
    with pytest.raises(
        ValueError, match=r"^train dataset, column 'chosen': conversations.*chat_template_path="
    ) as error:
        check_preferences(make([EXPLICIT]), tiny_tokenizer, "train")
    assert "processing_class.chat_template" in str(error.value)
    # Plain text needs none, and a row may bring its own.
    check_preferences(make([STANDARD]), tiny_tokenizer, "train")
    check_preferences(
        make([{**EXPLICIT, "chat_template_kwargs": {"chat_template": template}}]), tiny_tokenizer, "train"
    )


def test_prompt_under_another_name_is_warned_of_once(tiny_tokenizer, caplog):
    row = {"question": "Two and two?", "chosen": "Four.", "rejected": "Five."}
    check_preferences(Dataset.from_list([row, row]), tiny_tokenizer, "train")
    assert caplog.messages == [
        "train dataset, column 'question': not read, and 'chosen' of row 0 does not contain it; if it is the prompt, "
        'dataset.rename_column("question", "prompt")'
    ]
    caplog.clear()
    implicit = {"question": "Two and two?", "chosen": "Two and two? Four.", "rejected": "Two and two? Five."}
    check_preferences(Dataset.from_list([implicit]), tiny_tokenizer, "train")
    assert caplog.messages == []


def test_columns_stay_as_they_are(tiny_tokenizer):
    rows = [{**EXPLICIT, "margin": 0.5, "tools": TOOLS, "subset": str(i), "extra": {"deep": [i]}} for i in range(3)]
    dataset = Dataset.from_list(rows)
    checked = check_preferences(dataset, tiny_tokenizer, "train")
    assert checked.remove_columns(ROW_COLUMN).features == dataset.features
    assert list(checked.remove_columns(ROW_COLUMN)) == list(dataset)
    # A stream that knows its columns still knows them, so that nothing has to be read to learn them.
    assert check_preferences(dataset.to_iterable_dataset(), tiny_tokenizer, "train").features == checked.features


def test_rows_are_numbered_as_the_user_sees_them(tiny_tokenizer):
    dataset = Dataset.from_list([{**STANDARD, "chosen": f"Answer {i}."} for i in range(50)]).shuffle(seed=0)
    checked = check_preferences(dataset, tiny_tokenizer, "train", num_proc=2)
    assert checked[ROW_COLUMN][:] == list(range(50))
    assert checked["chosen"][:] == dataset["chosen"][:]


def test_a_format_set_by_the_user_stays(tiny_tokenizer):
    dataset = Dataset.from_list([{**TOKENIZED, "margin": 0.5, "note": "x"}]).with_format("torch", ["chosen_ids"])
    checked = check_preferences(dataset, tiny_tokenizer, "train")
    assert checked.format["type"] == "torch"
    assert checked[0].keys() == {"chosen_ids", ROW_COLUMN}
    # Tensors in a stream are token ids and margins as well.
    stream = Dataset.from_list([{**TOKENIZED, "margin": 0.5}]).to_iterable_dataset().with_format("torch")
    (row,) = check_preferences(stream, tiny_tokenizer, "train")
    assert torch.equal(row["chosen_ids"], torch.tensor([1, 2, 3]))


def test_the_fingerprint_is_stable_so_that_the_tokenization_is_cached(tiny_tokenizer):
    dataset = Dataset.from_list([STANDARD, STANDARD]).shuffle(seed=0)
    fingerprints = {check_preferences(dataset, tiny_tokenizer, "train")._fingerprint for _ in range(2)}
    assert len(fingerprints) == 1
