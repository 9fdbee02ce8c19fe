"""`disco-trl data convert`: what each format becomes, which formats are told apart, and what a bad row says."""

import json
import math
from collections import Counter

import pytest
from datasets import load_dataset
from preference_rows import assistant, system, user
from tiny_training import disco_trainer

from disco_trl.cli.main import main
from disco_trl.data.curation.convert import Converter, Report, detect_format, draw_pairs
from disco_trl.data.curation.formats import FORMATS
from disco_trl.data.curation.strength_words import degree_of
from disco_trl.data.values import BadRow


RATED = [{"prompt": "Two and two?", "completion": f"It is {n}.", "ratings": [n, n + 1]} for n in range(4)]
RANKED = {"prompt": "Two and two?", "completions": ["Four.", "Five.", "4"], "ranks": [1, 3, 1]}
ULTRAFEEDBACK = {
    "instruction": "Two and two?",
    "completions": [
        {
            "response": answer,
            "overall_score": score,
            "annotations": {"honesty": {"Rating": honesty, "Rationale": "..."}, "helpfulness": {"Rating": "3"}},
        }
        for answer, score, honesty in [
            ("Five.", 2.0, "4"),
            ("Four.", 8.5, "5"),
            ("Cats.", 1.0, "N/A"),
            ("4", 8.5, "1"),
        ]
    ],
}
STRENGTHS = [-3, -1, 2, 0, 0]
HELPSTEER_3 = {
    "context": [user("Two and two?")],
    "response1": "Four.",
    "response2": "Five.",
    "overall_preference": -1,
    "individual_preference": [{"score": score, "reasoning": "..."} for score in STRENGTHS],
}
HELPSTEER_2 = {
    "prompt": "Hello.\n<extra_id_1>Assistant\nHi.\n<extra_id_1>User\nTwo and two?",
    "response_1": "Five.",
    "response_2": "Four.",
    "preference_strength": 1,
    "all_preferences_unprocessed": [{"strength": 1, "statement": "..."}, {"strength": 3, "statement": "..."}],
}
SOFT = {"prompt": "Two and two?", "completion_a": "Five.", "completion_b": "Four.", "prob_b": 0.9}
ALPACA = {"instruction": "Add.", "input": "2 2", "chosen": "Four.", "rejected": "Five."}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Two and two?"}],
    "chosen": {"from": "gpt", "value": "Four."},
    "rejected": {"from": "gpt", "value": "Five."},
}
HH = {
    "chosen": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Two and two?\n\nAssistant: Four.",
    "rejected": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Two and two?\n\nAssistant: Five.",
}
EXAMPLES = {
    "ratings": RATED,
    "rankings": [RANKED],
    "ultrafeedback": [ULTRAFEEDBACK],
    "strengths": [HELPSTEER_3],
    "soft": [SOFT],
    "alpaca": [ALPACA],
    "sharegpt": [SHAREGPT],
    "hh-rlhf": [HH],
}
QUESTION = [user("Two and two?")]
FOUR_FIVE = {"prompt": QUESTION, "chosen": [assistant("Four.")], "rejected": [assistant("Five.")]}


@pytest.fixture
def convert(tmp_path):
    """`convert(rows, *arguments)` is what the command writes, read back; the files' name is `out`."""

    def run(rows, *arguments, suffix=".jsonl"):
        source, out = tmp_path / "in.jsonl", tmp_path / f"out{suffix}"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        main(["data", "convert", str(source), str(out), *arguments])
        if suffix == ".jsonl":
            return [json.loads(line) for line in out.read_text().splitlines()]
        return list(load_dataset("parquet", data_files=str(out), split="train"))

    return run


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_format_is_told_by_its_columns(name):
    assert detect_format(EXAMPLES[name][0]) == name


def test_unknown_columns_list_what_was_found_and_what_there_is():
    with pytest.raises(ValueError, match=r"'winner_text', 'loser_text'.*\n  ratings: ") as error:
        detect_format({"winner_text": "a", "loser_text": "b"})
    assert all(f"\n  {name}: " in str(error.value) for name in FORMATS)


def test_columns_of_two_formats_are_not_guessed():
    with pytest.raises(ValueError, match="may be any of rankings, strengths; choose with --format"):
        detect_format(RANKED | HELPSTEER_3)


# What the rows become


def test_hh_rlhf(convert):
    assert convert([HH]) == [{**FOUR_FIVE, "prompt": [user("Hi."), assistant("Hello."), *QUESTION]}]


def test_hh_rlhf_whose_sides_part_early_keeps_their_turns(convert):
    early = {**HH, "rejected": "\n\nHuman: Hi.\n\nAssistant: Go.\n\nHuman: Two and two?\n\nAssistant: Five."}
    assert convert([early]) == [
        {
            "prompt": [user("Hi.")],
            "chosen": [assistant("Hello."), *QUESTION, assistant("Four.")],
            "rejected": [assistant("Go."), *QUESTION, assistant("Five.")],
        }
    ]


def test_soft_labels_are_for_the_preferred_side(convert):
    rows = convert([SOFT, {**SOFT, "prob_b": 0.25}, {**SOFT, "prob_b": 0.5}])
    assert rows[0] == {**FOUR_FIVE, "preference_probability": 0.9}
    # P(b) = 0.25 is P(a) = 0.75
    assert rows[1]["chosen"] == [assistant("Five.")] and rows[1]["preference_probability"] == 0.75
    assert rows[2]["preference_probability"] == 0.5


def test_strengths_of_several_annotators_are_a_list_of_signed_numbers(convert, capsys):
    # Below 0 the first response is better, which two of three who see a difference say: it is `chosen`, above 0.
    assert convert([HELPSTEER_3]) == [{**FOUR_FIVE, "preference_strength": [3, 1, -2, 0, 0]}]
    shown = capsys.readouterr().out
    assert "judged           1  in 'individual_preference'" in shown
    assert "given            5  strengths from -2 to 3, above 0 for 'chosen'; 2 are 0, a tie" in shown


def test_the_second_response_may_be_the_better_one(convert, capsys):
    prompt = [user("Hello."), assistant("Hi."), *QUESTION]
    # All annotators, rather than the strength of all together
    assert convert([HELPSTEER_2], "--format", "strengths") == [
        {**FOUR_FIVE, "prompt": prompt, "preference_strength": [1, 3]}
    ]
    assert "none is 0: no tie was on offer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "chosen", "strengths"),
    [
        ([-3, 1, 1], "second", [-3, 1, 1]),  # the majority
        ([-3, 1], "first", [3, -1]),  # of two, the more decided
        ([-1, 1], "first", [1, -1]),
        ([0, 0], "first", [0, 0]),
        ([0, 2], "second", [0, 2]),
    ],
)
def test_chosen_is_the_majority_s_and_then_the_stronger_side(given, chosen, strengths):
    row = {"prompt": "?", "response_1": "first", "response_2": "second", "preference_strength": given}
    (converted,) = FORMATS["strengths"].convert(row)
    assert (converted["chosen"], converted["preference_strength"]) == (chosen, strengths)


def test_where_strengths_are_in_several_columns_it_is_shown(convert, capsys):
    without = {**HELPSTEER_3, "individual_preference": None, "overall_preference": -2}
    rows = convert([HELPSTEER_3, HELPSTEER_3, without])
    assert rows[2]["preference_strength"] == [2]
    shown = capsys.readouterr().out
    assert "judged           2  in 'individual_preference'" in shown
    assert "judged           1  in 'overall_preference'" in shown


def preferences_of(*words):
    return [{"evaluator": "x", "overall_pref": word, "helpful_pref": "Tie"} for word in words]


MULTIPREF = {
    "text": "Two and two?",
    "completion_a": "Five.",
    "completion_b": "Four.",
    "normal_worker_annotations": preferences_of("B-is-clearly-better", "B-is-slightly-better"),
    "expert_worker_annotations": preferences_of("A-is-slightly-better", "Tie"),
}


def test_multipref(convert, capsys):
    assert convert([MULTIPREF]) == [{**FOUR_FIVE, "preference_strength": [2, 1, -1, 0]}]
    shown = capsys.readouterr().out
    assert "in 'normal_worker_annotations and expert_worker_annotations'" in shown
    assert "words              'slightly' 1, 'clearly' 2; equal ones 0" in shown


def test_words_beside_chosen_and_rejected_are_about_chosen(convert, tmp_path):
    words = ["negligibly better / unsure", "slightly better", "better", "significantly better", "Slightly_Better"]
    rows = [
        {"prompt": f"{n}?", "chosen": "a", "rejected": "b", "preference_strength": word}
        for n, word in enumerate(words)
    ]
    assert [row["preference_strength"] for row in convert(rows)] == [[1], [2], [3], [4], [2]]
    (tmp_path / "out.jsonl").unlink()
    # Fewer words may be of several scales, which is not guessed.
    with pytest.raises(
        SystemExit, match=r"words 'better', 'slightly', which may be of .* --strength_words \"better=1,"
    ):
        convert(rows[1:3])
    assert [
        row["preference_strength"] for row in convert(rows[1:3], "--strength_words", "slightly better=1,better=2")
    ] == [
        [1],
        [2],
    ]


@pytest.mark.parametrize(
    ("word", "wrong"),
    [
        (
            "B is awfully good",
            r"'B is awfully good' is none of the words that are read \('slightly'=1, 'much'=2\); give",
        ),
        ("slightly better", "'slightly better' does not say which answer is better; write it as"),
    ],
)
def test_words_that_are_not_known_are_a_bad_row(convert, word, wrong):
    rows = [
        {"response_a": "a", "response_b": "b", "overall_preference": word} for word in ("A is slightly better", word)
    ]
    with pytest.raises(SystemExit, match=f"row 1, column 'overall_preference': {wrong}"):
        convert(rows, "--strength_words", "slightly=1,much better=2")


def test_words_of_no_usual_scale_have_to_be_given(convert):
    rows = [
        {"response_a": "a", "response_b": "b", "overall_preference": word} for word in ("A is ok", "B is great", "Tie")
    ]
    with pytest.raises(SystemExit, match=r"in the words 'great', 'ok', whose order is not known; give the level"):
        convert(rows)
    converted = convert(rows, "--strength_words", "ok=1,great=2")
    assert [(row["chosen"], row["preference_strength"]) for row in converted] == [("a", [1]), ("b", [2]), ("a", [0])]


@pytest.mark.parametrize("argument", ["slightly", "slightly=x", "=1", "A is better=1", "slightly=-1"])
def test_levels_of_words_are_written_in_one_way(convert, argument):
    with pytest.raises(SystemExit, match=r"--strength_words .*: write it as"):
        convert([MULTIPREF], "--strength_words", argument)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("A-is-slightly-better", ("first", "slightly")),
        ("@Response 2 is much better.", ("second", "much")),
        ("B is better", ("second", "better")),
        ("first answer is clearly better", ("first", "clearly")),
        ("negligibly better / unsure", ("", "negligibly")),
        ("about the same", ("", "about the same")),
        ("A better", ("first", "better")),
    ],
)
def test_words_are_taken_apart(words, meant):
    assert degree_of(words) == meant


def test_a_strength_that_is_none_is_a_bad_row():
    for given in (1.5, True, 21, [None], [{"score": 2}], {}):
        with pytest.raises(BadRow, match="column 'preference_strength'"):
            FORMATS["strengths"].convert({"response_1": "a", "response_2": "b", "preference_strength": given})


def test_pairs_of_other_formats_keep_their_strength(convert, tmp_path):
    graded = {**ALPACA, "preference_strength": 2}
    sum_of = {**FOUR_FIVE, "prompt": [user("Add.\n2 2")]}
    assert convert([graded, {**graded, "preference_strength": None}]) == [
        {**sum_of, "preference_strength": [2]},
        {**sum_of, "preference_strength": None},
    ]
    (tmp_path / "out.jsonl").unlink()
    assert convert([{**PAIR, "preference_strength": [1, -2]}], "--rename", "prompt=instruction") == [
        {**FOUR_FIVE, "preference_strength": [1, -2]}
    ]
    for name, row in (("sharegpt", SHAREGPT), ("hh-rlhf", HH)):
        assert FORMATS[name].convert({**row, "preference_strength": -3})[0]["preference_strength"] == [-3]


def test_strengths_that_are_never_negative_are_not_taken_for_signed_ones(convert, capsys, tmp_path):
    # Absolute values, of which every row would say that the second answer is better
    sizes = [{"prompt": "?", "response_1": f"{n}", "response_2": "x", "preference_strength": n % 4} for n in range(8)]
    with pytest.raises(SystemExit, match=r"none of 6 strengths of preference is below 0, .*pass --format strengths"):
        convert(sizes)
    assert not (tmp_path / "out.jsonl").exists()
    assert len(convert(sizes, "--format", "strengths")) == 8
    assert "warning: column 'preference_strength': none of 6 strengths" in capsys.readouterr().out
    (tmp_path / "out.jsonl").unlink()
    assert len(convert([*sizes, {**sizes[0], "preference_strength": -1}])) == 9


def test_a_strength_beside_chosen_and_rejected_is_no_direction():
    row = {"prompt": "?", "chosen": "Four.", "rejected": "Five.", "preference_strength": 3}
    assert not FORMATS["strengths"].recognise(row)  # training reads it as it is
    assert FORMATS["strengths"].convert(row)[0] == {**row, "preference_strength": [3]}
    with pytest.raises(BadRow, match="two answers are missing"):
        FORMATS["strengths"].convert({"prompt": "?", "preference_strength": 3})


PAIR = {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five."}
ORCA = {
    **{"system": "Be brief.", "input": "Two and two?", "chosen": "Four.", "rejected": "Five."},
    **{"generations": ["Four.", "Five."], "order": ["chosen", "rejected"], "rating": [9.0, 7.0]},
}
SNORKEL = {
    "prompt": "Two and two?",
    "chosen": [*QUESTION, assistant("Four.")],
    "rejected": [*QUESTION, assistant("Five.")],
    **{"all_generated_responses": ["Four.", "Five."], "all_rm_scores": [0.9, 0.1]},
}


@pytest.mark.parametrize(
    ("row", "fix"),
    [
        (ORCA, "make messages of the texts, and of a column 'system', pass --rename input=instruction"),
        (PAIR, "make messages of the texts, and of a column 'system', pass --rename prompt=instruction"),
        (SNORKEL, r"column 'prompt': .* hold it already; leave the column out, .*remove_columns\(\[\"prompt\"\]\)"),
        ({**SNORKEL, "prompt": QUESTION, "chosen": [assistant("Four.")]}, "training reads them as they are"),
    ],
    ids=["orca", "texts", "snorkel", "messages"],
)
def test_pairs_are_pairs_whatever_they_were_made_from(row, fix):
    with pytest.raises(ValueError, match=f"--format auto: 'chosen' and 'rejected' are there already.*{fix}"):
        detect_format(row)


def test_pairs_of_texts_become_messages_as_is_advised(convert, tmp_path):
    [row] = convert([ORCA], "--rename", "input=instruction")
    assert row == {**FOUR_FIVE, "prompt": [system("Be brief."), *QUESTION]}
    (tmp_path / "out.jsonl").unlink()
    assert convert([PAIR], "--rename", "prompt=instruction") == [FOUR_FIVE]
    (tmp_path / "out.jsonl").unlink()
    # Sides that are messages, after a prompt that is a text
    assert convert([{**FOUR_FIVE, "prompt": "Two and two?"}], "--rename", "prompt=instruction") == [FOUR_FIVE]


def test_a_prompt_that_the_answers_repeat_is_not_written(convert):
    with pytest.raises(SystemExit, match="row 0, column 'prompt': the answers begin with it already; cut it off"):
        convert([SNORKEL], "--rename", "prompt=instruction")


def test_pictures_are_not_dropped_in_silence(convert, capsys):
    pictured = {**SHAREGPT, "images": ["a.png"]}
    with pytest.raises(SystemExit, match="row 1, column 'images': pictures, sound or video, without which the texts"):
        convert([{**SHAREGPT, "images": []}, pictured])
    assert convert([{**SHAREGPT, "images": []}, pictured], "--skip_bad") == [FOUR_FIVE]
    assert "skipped          1  column 'images'" in capsys.readouterr().out


def test_what_a_format_does_not_read_is_warned_of(convert, capsys):
    convert([{**SOFT, "system": "Answer in French."}])
    assert "warning: column 'system': not read (row 0), so the model does not see it" in capsys.readouterr().out


def test_alpaca(convert):
    history = {"system": "Be brief.", "history": [["Hi.", "Hello."]]}
    plain, long = convert([{**ALPACA, "system": "", "history": []}, {**ALPACA, **history}])
    assert plain == {**FOUR_FIVE, "prompt": [user("Add.\n2 2")]}
    assert long["prompt"] == [system(), user("Hi."), assistant("Hello."), user("Add.\n2 2")]


def test_alpaca_of_old_with_a_list_of_outputs(convert):
    assert convert([{"instruction": "Two and two?", "input": "", "output": ["Four.", "Five."]}]) == [FOUR_FIVE]


def test_sharegpt(convert):
    called = {
        **SHAREGPT,
        "system": "Be brief.",
        "tools": '[{"name": "add"}]',
        "conversations": [
            *SHAREGPT["conversations"],
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"},
        ],
    }
    assert convert([SHAREGPT]) == [FOUR_FIVE]
    for nothing in (None, "", [], {}, float("nan")):
        assert FORMATS["sharegpt"].convert(SHAREGPT | {"tools": nothing}) == [FOUR_FIVE | {"tools": None}]
    assert FORMATS["sharegpt"].convert(called) == [
        {
            "prompt": [
                system(),
                *QUESTION,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
                },
                {"role": "tool", "content": "4"},
            ],
            "chosen": [assistant("Four.")],
            "rejected": [assistant("Five.")],
            "tools": '[{"name": "add"}]',
        }
    ]


@pytest.mark.parametrize(
    "ranking",
    [
        RANKED,
        {"prompt": RANKED["prompt"], "responses": RANKED["completions"], "scores": [0.5, -2.0, 0.5]},
        {
            "prompt": "\n\nHuman: Two and two?\n\nAssistant: ",
            "answers": [{"answer": text, "rank": rank} for text, rank in [("Four.", 1), ("Five.", 3), ("4", 1)]],
        },
    ],
    ids=["ranks", "scores", "ranks inside"],
)
def test_rankings(convert, ranking):
    assert convert([ranking]) == [
        {
            "prompt": QUESTION,
            "completions": [[assistant(text)] for text in ("Four.", "Five.", "4")],
            "ranks": [1, 3, 1],
        }
    ]


def test_an_order_becomes_ranks():
    row = {"prompt": "?", "candidates": ["worst", "best", "middle"], "order": [1, 2, 0]}
    assert FORMATS["rankings"].convert(row)[0]["ranks"] == [3, 1, 2]
    with pytest.raises(BadRow, match="is not an order of the answers 0 to 2"):
        FORMATS["rankings"].convert({**row, "order": [1, 2, 3]})


def test_ultrafeedback_becomes_rankings(convert):
    [row] = convert([ULTRAFEEDBACK])
    assert [answer[0]["content"] for answer in row["completions"]] == ["Five.", "Four.", "Cats.", "4"]
    assert row["ranks"] == [3, 1, 4, 1]  # of the scores 2, 8.5, 1, 8.5


def test_ultrafeedback_by_an_aspect_leaves_out_what_the_judge_could_not_tell():
    [row] = FORMATS["ultrafeedback"].convert(ULTRAFEEDBACK, score="honesty")
    assert (row["completions"], row["ranks"]) == (["Five.", "Four.", "4"], [2, 1, 3])
    with pytest.raises(BadRow, match=r"without 'wit'.*--score: 'honesty', 'helpfulness', 'overall_score'"):
        FORMATS["ultrafeedback"].convert(ULTRAFEEDBACK, score="wit")


def test_ultrafeedback_as_pairs_counts_each_rating_once(convert):
    # By honesty: Four. 5, Five. 4, 4 1. The best goes with the worst; Five. is left and goes with the best, whose
    # rating counts in the other pair.
    rows = convert([ULTRAFEEDBACK], "--to", "pairs", "--score", "honesty")
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows] == [
        ("Four.", "4"),
        ("Four.", "Five."),
    ]
    assert [(row["chosen_rating"], row["rejected_rating"]) for row in rows] == [([5], [1]), (None, [4])]
    assert all(row["chosen_votes"] == row["rejected_votes"] == 0 for row in rows)


def test_ratings_become_pairs_nobody_compared(convert):
    rows = convert(RATED)
    assert len(rows) == 2
    seen = Counter()
    for row in rows:
        assert row["prompt"] == QUESTION
        assert (row["chosen_votes"], row["rejected_votes"]) == (0, 0)
        assert sum(row["chosen_rating"]) > sum(row["rejected_rating"])
        for side in ("chosen", "rejected"):
            text = row[side][0]["content"]
            seen[text] += 1
            assert row[f"{side}_rating"] == next(rated["ratings"] for rated in RATED if rated["completion"] == text)
    assert seen == {rated["completion"]: 1 for rated in RATED}


def test_only_answers_to_one_prompt_meet(convert, capsys):
    rows = convert([*RATED, {"prompt": "Alone?", "completion": "Yes.", "ratings": [1]}])
    assert {row["prompt"][0]["content"] for row in rows} == {"Two and two?"}
    assert "1  the only answer to its prompt" in capsys.readouterr().out


def test_texts_without_a_prompt_stay_text(convert):
    rows = convert([{"id": 7, "text": f"Day {n}.", "ratings": [n, 1.5]} for n in range(3)])
    assert len(rows) == 2  # three texts: one of them stands in two pairs, once without its ratings
    assert all(isinstance(row["chosen"], str) and "prompt" not in row for row in rows)
    assert sum(row[side] is not None for row in rows for side in ("chosen_rating", "rejected_rating")) == 3


def test_draw_pairs_depends_on_the_seed_alone_and_puts_each_answer_into_one_pair():
    groups = [list(range(7)), [7, 8], [9]]
    pairs = list(draw_pairs(groups, None, seed=3))
    assert pairs == list(draw_pairs(groups, None, seed=3)) != list(draw_pairs(groups, None, seed=4))
    counted = [position for one, other, first_only in pairs for position in ((one,) if first_only else (one, other))]
    assert sorted(counted) == list(range(9))
    assert len(list(draw_pairs(groups, 2, seed=3))) == 2


def test_draw_pairs_beyond_one_each_are_all_different_and_run_out():
    groups = [list(range(7)), [7, 8]]
    pairs = {frozenset(pair[:2]) for pair in draw_pairs(groups, 22, seed=0)}
    assert len(pairs) == 22  # 7 · 6 / 2 + 1, which are all
    with pytest.raises(ValueError, match="--pairs 23: 9 answers make 22 pairs"):
        list(draw_pairs(groups, 23, seed=0))


# Bad rows and bad arguments


def test_a_bad_row_is_named_with_column_and_fix(convert):
    with pytest.raises(SystemExit, match=r"row 1, column 'prob_b': 1.5 is not a probability; give .*--skip_bad"):
        convert([SOFT, {**SOFT, "prob_b": 1.5}])


def test_what_training_would_refuse_is_refused_here(convert):
    with pytest.raises(
        SystemExit, match=r"row 1, column 'rejected': once converted, turn 0, the assistant's answer, is empty"
    ):
        convert([SOFT, {**SOFT, "completion_a": " "}])


def test_a_prompt_in_some_rows_only_is_refused(convert):
    with pytest.raises(SystemExit, match="row 1, column 'prompt': missing, unlike in the first row"):
        convert([SOFT, {**SOFT, "prompt": None}], suffix=".parquet")


@pytest.mark.parametrize("name", EXAMPLES)
def test_rubbish_is_a_bad_row_and_no_crash(name):
    row = EXAMPLES[name][0]
    for column in row:
        for rubbish in (None, "", "x", 3, math.nan, [], [None], ["x"], [3], {}, [{}], [["x"]], [{"score": "x"}]):
            report = Report(name)
            converted = Converter(FORMATS[name].convert, report, skip_bad=True, flat=True)({**row, column: rubbish}, 0)
            assert bool(converted) != bool(report.bad.figures())


def test_a_tool_call_is_not_lost_in_a_parquet_file(convert):
    turns = [
        *SHAREGPT["conversations"],
        {"from": "function_call", "value": "{}"},
        {"from": "observation", "value": "4"},
    ]
    called = {**SHAREGPT, "conversations": turns}
    with pytest.raises(
        SystemExit, match="row 0, column 'prompt': a tool call, for which Parquet has no type; write to"
    ):
        convert([called], suffix=".parquet")
    assert convert([called])[0]["prompt"][1]["tool_calls"] == [{"type": "function", "function": {}}]


def test_skip_bad_counts(convert, capsys):
    bad = {**SOFT, "prob_b": None}
    assert len(convert([SOFT, bad, bad], "--skip_bad")) == 1
    shown = capsys.readouterr().out
    assert "read             3  as soft" in shown
    assert "skipped          2  column 'prob_b', such as row 1: the probability is missing" in shown


def test_nothing_left_writes_nothing(convert, tmp_path):
    with pytest.raises(SystemExit, match="no row is left"):
        convert([{**SOFT, "prob_b": None}], "--skip_bad", "--format", "soft")
    assert not (tmp_path / "out.jsonl").exists()


def test_rename(convert):
    renamed = {"question": "Two and two?", "first": "Five.", "second": "Four.", "p": 0.9}
    options = ["--rename", "first=completion_a", "second=completion_b", "p=prob_b"]
    assert convert([renamed], *options) == [{**FOUR_FIVE, "preference_probability": 0.9}]


def test_plain_text_stays_text(convert):
    [row] = convert([SOFT], "--plain_text")
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Two and two?", "Four.", "Five.")


def test_options_of_another_format_are_refused(convert):
    with pytest.raises(SystemExit, match="--pairs is for the format ratings or attributes or long, and this is soft"):
        convert([SOFT], "--pairs", "3")


# Files, and what comes after


@pytest.mark.parametrize("name", EXAMPLES)
def test_parquet_holds_the_same_rows(convert, name, tmp_path):
    written = convert(EXAMPLES[name])
    assert convert(EXAMPLES[name], suffix=".parquet") == written


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_format_trains(convert, name, tmp_path, tiny_llama_dir):
    rows = convert(EXAMPLES[name] * 2)
    dataset = load_dataset("json", data_files=str(tmp_path / "out.jsonl"), split="train")
    assert len(dataset) == len(rows)
    trainer = disco_trainer(tmp_path / "run", model=tiny_llama_dir, train_dataset=dataset, max_steps=1)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_a_mixture_of_formats_trains(convert, tmp_path, tiny_llama_dir):
    rows = convert(RATED)
    (tmp_path / "out.jsonl").unlink()
    rows += convert([HELPSTEER_3] * 2)
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset("json", data_files=str(tmp_path / "out.jsonl"), split="train")
    trainer = disco_trainer(tmp_path / "run", model=tiny_llama_dir, train_dataset=dataset, max_steps=2)
    trainer.train()
    assert {"tie_width", "location_error"} <= set().union(*trainer.state.log_history)
