"""Which columns are taken for misspelt ones, and that what is advised works."""

import pytest
from datasets import Dataset
from preference_rows import STANDARD, assistant, user

from disco_trl.data.curation.check import check_dataset
from disco_trl.data.look_alikes import find_look_alikes, find_renames, fix_of_answers
from disco_trl.data.validation import check_preferences


IDS, MASK, TEXT = [5, 6, 7], [1, 1, 1], "text"
RANKED = [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]
SCORED = [{"response": "a", "overall_score": 8.0}, {"response": "b", "overall_score": 2.0}]


@pytest.mark.parametrize(
    ("column", "value", "meant"),
    [
        ("Chosen", TEXT, "chosen"),
        ("chosen_response", TEXT, "chosen"),
        ("rejectedMessages", [user(), assistant()], "rejected"),
        ("rejcted", TEXT, "rejected"),
        ("question", TEXT, "prompt"),
        ("input", TEXT, "prompt"),
        ("input_ids_chosen", IDS, "chosen_ids"),
        ("reject_ids", IDS, "rejected_ids"),
        ("score_rejected", 2.5, "rejected_rating"),
        ("chosen_ratings", [2, 3], "chosen_rating"),
        ("chosen_vote", 3, "chosen_votes"),
        ("num_chosen_votes", 3, "chosen_votes"),
        ("prefrence_probability", 0.7, "preference_probability"),
        ("soft_label", 0.7, "preference_probability"),
        ("isTie", True, "tie"),
        ("strength", 2, "preference_strength"),
        ("preference_strengths", [2, -1], "preference_strength"),
        ("overall_preference", -3.0, "preference_strength"),
        ("score_diff", 3, "preference_strength"),
        ("rankings", [1, 2], "ranks"),
        ("responses", ["a", "b"], "completions"),
    ],
)
def test_near_misses_of_the_right_type(column, value, meant):
    assert find_look_alikes({column: value}) == {column: meant}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("attention_mask_chosen", MASK),
        ("chosen_model", "gpt-4"),
        ("winner", "model_a"),
        ("accepted", TEXT),
        ("chosen_score", "high"),
        ("chosen_text", 5),
        ("input_ids_chosen", ["5", "6"]),
        ("soft_label", 1),
        ("label", 1),
        ("num_responses", 4),
        ("answers", RANKED),
        ("rank", 2),
        ("time", 3),
        ("height", 1.8),
        ("is_tie", "no"),
        ("prompt_id", TEXT),
        ("source", TEXT),
        ("strength", 0.4),
        ("strength", "strong"),
        ("score_diff", 250),
        ("overall_preference", True),
        ("overall_preference", []),
        ("chosen_score", None),
    ],
)
def test_what_only_sounds_alike_is_no_near_miss(column, value):
    assert find_look_alikes({column: value}) == {}


@pytest.mark.parametrize(
    ("row", "renames"),
    [
        ({"accepted": TEXT, "rejected": TEXT}, {"accepted": "chosen"}),
        (
            {"question": TEXT, "response_j": TEXT, "response_k": TEXT},
            {"response_j": "chosen", "response_k": "rejected", "question": "prompt"},
        ),
        (
            {"attention_mask_chosen": MASK, "input_ids_chosen": IDS, "input_ids_rejected": IDS},
            {"input_ids_chosen": "chosen_ids", "input_ids_rejected": "rejected_ids"},
        ),
        (
            {"messages": [user(), assistant()], "rejected_messages": [user(), assistant("Five.")]},
            {"messages": "chosen", "rejected_messages": "rejected"},
        ),
        # One side alone, or sides of two types, would only be refused later.
        ({"messages": [user(), assistant()], "rejected_response": TEXT}, {}),
        ({"chosen_messages": [user(), assistant()], "rejected_response": TEXT}, {}),
        ({"question": TEXT, "answer_0": TEXT, "answer_1": TEXT, "chosen_model": "a", "rejected_model": "b"}, {}),
        ({"conversation_a": [user()], "conversation_b": [user()], "model_a": "a", "winner": "model_a"}, {}),
        ({"prompt": TEXT, "response_a": TEXT, "response_b": TEXT, "winner": "a"}, {}),
    ],
)
def test_renames_make_a_whole_pair_or_are_not_advised(row, renames, tiny_tokenizer):
    assert find_renames(row) == renames
    dataset = Dataset.from_list([row, row])
    with pytest.raises(ValueError, match="missing") as error:
        check_preferences(dataset, tiny_tokenizer, "train")
    if renames:
        check_preferences(dataset.rename_columns(renames), tiny_tokenizer, "train")  # as advised
    else:
        assert "rename" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "known"),
    [
        ({"prompt": TEXT, "answers": RANKED, "num_responses": 2}, "'rankings'"),
        ({"instruction": TEXT, "completions": SCORED}, "'ultrafeedback'"),
        ({"prompt": TEXT, "completion_a": TEXT, "completion_b": TEXT, "prob_b": 0.9}, "'soft'"),
    ],
)
def test_a_known_format_is_named_before_any_rename(row, known, tiny_tokenizer):
    fix = f"of the format {known}, are converted by `disco-trl data convert DATA OUT.jsonl`"
    assert fix in fix_of_answers(row)
    with pytest.raises(ValueError, match=fix):
        check_preferences(Dataset.from_list([row]), tiny_tokenizer, "train")


def test_sides_that_are_one_message_each_are_of_a_format(tiny_tokenizer):
    row = {
        "conversations": [{"from": "human", "value": "Two and two?"}],
        "chosen": {"from": "gpt", "value": "Four."},
        "rejected": {"from": "gpt", "value": "Five."},
    }
    with pytest.raises(ValueError, match=r"column 'chosen': one message, where a list.*'sharegpt', are converted by"):
        check_preferences(Dataset.from_list([row]), tiny_tokenizer, "train")
    with pytest.raises(ValueError, match=r"^column 'chosen': one message, where a list of them should be; rows like"):
        check_dataset(Dataset.from_list([row]))


def test_an_instruction_with_its_input_is_to_be_converted_and_not_renamed(tiny_tokenizer, caplog):
    row = {"instruction": "Add.", "input": "2 2", "chosen": "Four.", "rejected": "Five."}
    check_preferences(Dataset.from_list([row]), tiny_tokenizer, "train")
    (message,) = caplog.messages
    assert "not read" in message and "'alpaca', are converted by `disco-trl data convert" in message
    assert all(
        "'alpaca', are converted by" in warning for warning in check_dataset(Dataset.from_list([row]))[0]["warnings"]
    )
    caplog.clear()
    check_preferences(Dataset.from_list([STANDARD]), tiny_tokenizer, "train")
    assert caplog.messages == []
