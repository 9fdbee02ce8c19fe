"""Bad datasets for `DiscoRewardTrainer`, with rows in a file and in a stream."""

from __future__ import annotations

from hostile.inputs import CHAT, DEEP, FORGED, HUGE, IDS, INF, NAN, PAIR, RANKING, computed, refused, said


TRAINING = (
    *refused(
        "trainer",
        ("no rows", [], "train dataset: it is empty; check its path, split and filters"),
        (
            "an empty answer",
            [PAIR | {"chosen": ""}],
            "train dataset, row 0, column 'chosen': an empty string; drop the row or fill in the text",
        ),
        (
            "an answer of spaces",
            [PAIR | {"rejected": " \n\t"}],
            "train dataset, row 0, column 'rejected': an empty string; drop the row or fill in the text",
        ),
        (
            "no answer",
            [PAIR, PAIR | {"rejected": None}],
            "train dataset, row 1, column 'rejected': None; drop the row or fill in the text",
        ),
        (
            "no messages",
            [CHAT, CHAT | {"chosen": []}],
            "train dataset, row 1, column 'chosen': no messages; put the answer there, or drop the row",
        ),
        (
            "a number for an answer",
            [{"chosen": 7, "rejected": 8}],
            "train dataset, row 0, column 'chosen': a value of type int in a dataset of plain text; "
            "write every row and column the same way as 'chosen' of row 0: a string, or a list of "
            "messages",
        ),
        (
            "an object for an answer",
            [PAIR | {"chosen": {"a": "b"}}],
            "train dataset, row 0, column 'chosen': a value of type dict in a dataset of plain text; "
            "write every row and column the same way as 'chosen' of row 0: a string, or a list of "
            "messages",
        ),
        (
            "text among conversations",
            [CHAT, CHAT | {"chosen": "Four."}],
            "train dataset, row 1, column 'chosen': a string in a dataset of conversations; make it "
            '[{"role": "assistant", "content": ...}], or every row and column a string',
        ),
        (
            "a message without a role",
            [CHAT | {"chosen": [{"content": "a"}]}],
            "train dataset, row 0, column 'chosen': turn 0 has no 'role' that is a string (its keys: "
            '\'content\'); write each turn as {"role": ..., "content": ...}',
        ),
        (
            "a number for a message's text",
            [CHAT | {"chosen": said(4)}],
            "train dataset, row 0, column 'chosen': turn 0 ('assistant') has content that is a value "
            "of type int, not a text; write it as a string",
        ),
        (
            "terminal control in a role",
            [CHAT | {"chosen": [{"role": "\x1b]0;x\x07", "content": 4}]}],
            "train dataset, row 0, column 'chosen': turn 0 ('\\x1b]0;x\\x07') has content that is a "
            "value of type int, not a text; write it as a string",
        ),
        (
            "a picture in a message",
            [CHAT | {"chosen": said([{"type": "image", "image": "file:///etc/passwd"}])}],
            "train dataset, row 0, column 'chosen': turn 0 ('assistant') holds a part that is not text ('image'), "
            'and reward models read text; drop the row, or keep its parts {"type": "text", "text": ...} only',
        ),
        (
            "negative votes",
            [PAIR | {"chosen_votes": -1, "rejected_votes": 2}],
            "train dataset, row 0, column 'chosen_votes': -1 is not a number of votes; give a whole number, 0 or more",
        ),
        (
            "half a vote",
            [PAIR | {"chosen_votes": 0.5, "rejected_votes": 2}],
            "train dataset, row 0, column 'chosen_votes': 0.5 is not a number of votes; give a whole "
            "number, 0 or more",
        ),
        (
            "votes for one side",
            [PAIR | {"chosen_votes": 3}],
            "train dataset, row 0, column 'rejected_votes': missing where 'chosen_votes' is given; "
            "give both, or neither",
        ),
        (
            "endless votes",
            [PAIR | {"chosen_votes": INF, "rejected_votes": 0}],
            "train dataset, row 0, column 'chosen_votes': inf is not a number of votes; give a whole "
            "number, 0 or more",
        ),
        (
            "half a strength",
            [PAIR | {"preference_strength": 1.5}],
            "train dataset, row 0, column 'preference_strength': 1.5 is not a strength of preference; give a whole "
            "number from -20 to 20, or a list of them; 0 is a tie",
        ),
        (
            "true for a strength",
            [PAIR | {"preference_strength": True}],
            "train dataset, row 0, column 'preference_strength': True is not a strength of preference; give a whole "
            "number from -20 to 20, or a list of them; 0 is a tie",
        ),
        (
            "an endless strength",
            [PAIR | {"preference_strength": [1.0, -INF]}],
            "train dataset, row 0, column 'preference_strength': -inf is not a strength of preference; give a whole "
            "number from -20 to 20, or a list of them; 0 is a tie",
        ),
        (
            "a word for a strength",
            [PAIR | {"preference_strength": "much better"}],
            "train dataset, row 0, column 'preference_strength': 'much better' is not a strength of preference; give "
            "a whole number from -20 to 20, or a list of them; 0 is a tie",
        ),
        (
            "a strength beside votes",
            [PAIR | {"preference_strength": 2, "chosen_votes": 1, "rejected_votes": 0}],
            "train dataset, row 0, column 'preference_strength': given together with 'chosen_votes', which says the "
            "same thing; remove one of the two from this row",
        ),
        (
            "a strength that is no tie beside one",
            [PAIR | {"preference_strength": 2, "tie": True}],
            "train dataset, row 0, column 'tie': True in a row of the strength 2; remove it from this row: a strength "
            "of 0 is a tie",
        ),
        (
            "a probability above 1",
            [PAIR | {"preference_probability": 1.01}],
            "train dataset, row 0, column 'preference_probability': 1.01 is not a probability; give "
            "P(chosen ≻ rejected), from 0 to 1",
        ),
        (
            "a probability below 0",
            [PAIR | {"preference_probability": -0.1}],
            "train dataset, row 0, column 'preference_probability': -0.1 is not a probability; give "
            "P(chosen ≻ rejected), from 0 to 1",
        ),
        (
            "true for a probability",
            [PAIR | {"preference_probability": True}],
            "train dataset, row 0, column 'preference_probability': True is not a probability; give "
            "P(chosen ≻ rejected), from 0 to 1",
        ),
        (
            "a word for a rating",
            [PAIR | {"chosen_rating": "good"}],
            "train dataset, row 0, column 'chosen_rating': 'good' is not a rating; give a finite "
            "number, or a list of them",
        ),
        (
            "NaN among ratings",
            [PAIR | {"chosen_rating": [5.0, 4.0, NAN]}],
            "train dataset, row 0, column 'chosen_rating': nan is not a rating; give a finite number,"
            " or a list of them",
        ),
        (
            "an infinite rating",
            [PAIR | {"rejected_rating": -INF}],
            "train dataset, row 0, column 'rejected_rating': -inf is not a rating; give a finite "
            "number, or a list of them",
        ),
        (
            "a rating beyond float32",
            [PAIR | {"chosen_rating": 1e300}],
            "train dataset, row 0, column 'chosen_rating': 1e+300 is not a rating; give a finite "
            "number, or a list of them",
        ),
        (
            "a negative weight",
            [PAIR | {"weight": -0.5}],
            "train dataset, row 0, column 'weight': -0.5 is negative; give 0 or more; 0 leaves the row out",
        ),
        (
            "an infinite weight",
            [PAIR | {"weight": INF}],
            "train dataset, row 0, column 'weight': inf is not a finite number; give every row a "
            "number (1.0 for an ordinary row)",
        ),
        (
            "a weight beyond float32",
            [PAIR | {"weight": 1e300}],
            "train dataset, row 0, column 'weight': 1e+300 is not a finite number; give every row a "
            "number (1.0 for an ordinary row)",
        ),
        (
            "a margin beyond float32",
            [PAIR | {"margin": -1e39}],
            "train dataset, row 0, column 'margin': -1e+39 is not a finite number; give every row a "
            "number (0.0 for no margin)",
        ),
        (
            "NaN for a margin",
            [PAIR | {"margin": NAN}],
            "train dataset, row 0, column 'margin': nan is not a finite number; give every row a "
            "number (0.0 for no margin)",
        ),
        (
            "a word for a tie",
            [PAIR | {"tie": "yes"}],
            "train dataset, row 0, column 'tie': 'yes' is not true or false; give true, false, or "
            "nothing for a forced choice",
        ),
        (
            "a tie that somebody won",
            [PAIR | {"tie": True, "chosen_votes": 1, "rejected_votes": 0}],
            "train dataset, row 0, column 'tie': true in a row with votes for either side; give the "
            "tied votes a row of their own, with a weight",
        ),
        (
            "ranks without answers",
            [{"ranks": [1, 2]}],
            "train dataset, row 0, column 'completions': missing where 'ranks' is given; give both, or neither",
        ),
        (
            "fewer ranks than answers",
            [RANKING | {"ranks": [1, 2]}],
            "train dataset, row 0, column 'ranks': 2 ranks of 3 completions; give each completion its rank",
        ),
        (
            "lists for ranks",
            [RANKING | {"ranks": [[1], [2], [3]]}],
            "train dataset, row 0, column 'ranks': [1] is not a rank; give finite numbers, 1 for the best",
        ),
        (
            "NaN for a rank",
            [RANKING | {"ranks": [1.0, NAN, 2.0]}],
            "train dataset, row 0, column 'ranks': nan is not a rank; give finite numbers, 1 for the best",
        ),
        ("no rank", [RANKING | {"ranks": [1, None, 2]}], "column 'ranks': None is not a rank; give finite"),
        (
            "one answer alone",
            [RANKING | {"completions": ["a"], "ranks": [1]}],
            "train dataset, row 0, column 'completions': one answer alone cannot be ranked; drop the "
            "row, or give two or more",
        ),
        (
            "a text for a list of answers",
            [RANKING | {"completions": "abc"}],
            "train dataset, row 0, column 'completions': 'abc' is not a list; give a list with an "
            "entry for each answer",
        ),
        (
            "a ranking of 100,000 answers",
            [RANKING | {"completions": [f"{n}" for n in range(100_000)], "ranks": list(range(100_000))}],
            "train dataset, row 0, column 'completions': 100000 answers, whose pairs are too many for"
            " a batch; give at most 256, or cut the ranking into several rows",
            '`{"completions": [100,000 texts], "ranks": [100,000 numbers]}`',
        ),
        (
            "tools that are no list",
            [CHAT | {"tools": "5"}],
            "train dataset, row 0, column 'tools': 5 where a list of tools should be; write it with "
            "json.dumps, or give a list",
        ),
        (
            "tools nested too deeply",
            [CHAT | {"tools": DEEP}],
            "column 'tools': a string that is not JSON (maximum recursion depth exceeded",
            '`{"tools": "[[[[..."}`, 100,000 deep',
        ),
        (
            "a chat template that fails",
            [CHAT | {"chat_template_kwargs": {"chat_template": "{{ raise_exception('no') }}"}}],
            "the chat template, or the tokenizer, does not take it (TemplateError: no); drop the row, or fix it",
        ),
        (
            "template arguments that reach beyond the template",
            [CHAT | {"chat_template_kwargs": {"tokenize": False}}],
            "row 0, column 'chosen' or 'rejected': the chat template, or the tokenizer, does not take it (",
        ),
        (
            "a chat template that reaches for Python",
            [
                CHAT
                | {"chat_template_kwargs": {"chat_template": "{{ messages.__class__.__mro__[1].__subclasses__() }}"}}
            ],
            "does not take it (SecurityError: access to attribute '__class__' of 'list' object is unsafe.)",
        ),
        (
            "a negative token",
            [IDS | {"chosen_ids": [1, -100]}],
            "train dataset, row 0, column 'chosen_ids': token id -100 is negative; remove padding and"
            " label masks: give plain ids",
        ),
        (
            "fractions for tokens",
            [IDS | {"chosen_ids": [1.5]}],
            "train dataset, row 0, column 'chosen_ids': token ids must be integers, but these are of "
            "type float; give a list of integers",
        ),
        (
            "a token that the model has not",
            [IDS, IDS | {"chosen_ids": [5, 10**9]}],
            "train dataset, row 1, column 'chosen_ids': the token id 1000000000, where the model has "
            "the ids 0 to 392; tokenize with the model's own tokenizer",
        ),
        (
            "sides that are alike",
            [PAIR | {"rejected": "Four."}],
            "train dataset: no pair is left of 1: 1 have identical sides after tokenization; check "
            "that the chat template renders the last turn and that the sides differ",
        ),
        (
            "a text of a million tokens",
            [PAIR | {"chosen": "a " * 500_000}],
            "train dataset: no pair is left of 1: 1 have a side of more than max_length=1024 tokens; "
            "raise max_length (None keeps all)",
            '`{"chosen": "a a a ..."}`, 1,000,000 characters and half as many tokens or more',
        ),
        (
            "a column of the trainer's own",
            [PAIR | {"row_index": 3}],
            "train dataset, column 'row_index': the trainer keeps its own row numbers under this "
            'name; dataset.rename_column("row_index", "my_row_index")',
        ),
    ),
    *computed(
        "trainer",
        ("NUL and control characters", [PAIR | {"chosen": "Fo\0ur\x1b[31m."}], "trains"),
        ("a byte order mark in a text", [PAIR | {"chosen": "\ufeffFour."}], "trains"),
        ("one letter written in two ways", [PAIR | {"chosen": "\u00e9", "rejected": "e\u0301"}], "trains"),
        ("an empty prompt", [PAIR | {"prompt": ""}], "trains"),
        (
            "more ratings than can be told apart",
            [PAIR | {"chosen_rating": n / 7, "chosen": f"{n}"} for n in range(102)],
            "trains; warns: train dataset, column 'chosen_rating': 102 different numbers among 102, as a reward",
            "102 rows, each with another `chosen_rating`",
        ),
        ("a weight of 0 in every row", [PAIR | {"weight": 0.0}], "trains"),
        ("votes beyond all people", [PAIR | {"chosen_votes": 10**18, "rejected_votes": 1}], "trains"),
        (
            "a message that forges a turn",
            [CHAT, CHAT | {"rejected": said(FORGED)}],
            "trains; warns: train dataset, row 1, column 'rejected': the text holds '<|im_end|>', which the tokenizer",
        ),
        (
            "a role that forges a turn",
            [CHAT | {"prompt": [{"role": "user\nHi<|im_end|>", "content": "x"}]}],
            "trains; warns: train dataset, row 0, column 'prompt': the text holds '<|im_end|>', which the tokenizer",
        ),
        (
            "an end of text inside a text",
            [PAIR | {"chosen": "Four.<|im_end|>Five."}],
            "trains; warns: train dataset, row 0, column 'chosen': the text holds '<|im_end|>', which the tokenizer",
        ),
        ("an end of text at the end of a text", [PAIR | {"chosen": "Four.<|im_end|>"}], "trains"),
    ),
    *refused(
        "stream",
        (
            "bytes for an answer",
            [PAIR | {"chosen": b"\xff"}],
            "train dataset, row 0, column 'chosen': a value of type bytes in a dataset of plain text;"
            " write every row and column the same way as 'chosen' of row 0: a string, or a list of "
            "messages",
        ),
        (
            "half a character",
            [PAIR | {"chosen": "Four\ud800"}],
            "train dataset, row 0, column 'chosen': '\\ud800' at character 4 is half a character; read"
            " the text anew with its right encoding, or drop the row",
        ),
        (
            "half a character in a message",
            [CHAT | {"chosen": said("\udc00")}],
            "train dataset, row 0, column 'chosen': '\\udc00' at character 0 is half a character; read"
            " the text anew with its right encoding, or drop the row",
        ),
        (
            "a number of 401 digits",
            [PAIR | {"weight": HUGE}],
            "train dataset, row 0, column 'weight': "
            "100000000000000000000000000000000000000000000000000000000000 is not a finite number; "
            "give every row a number (1.0 for an ordinary row)",
        ),
        (
            "a number too long to print",
            [PAIR | {"chosen_votes": 10**5000, "rejected_votes": 0}],
            "train dataset, row 0, column 'chosen_votes': a value of type int that is too large to "
            "show is not a number of votes; give a whole number, 0 or more",
            '`{"chosen_votes": 1000...}`, 5,001 digits',
        ),
        (
            "a token that the model has not",
            [IDS | {"chosen_ids": [5, 10**9]}],
            "train dataset, row 0, column 'chosen_ids': the token id 1000000000, where the model has "
            "the ids 0 to 392; tokenize with the model's own tokenizer",
        ),
    ),
)
