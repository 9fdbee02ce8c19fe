"""Bad files and options for the commands of `disco-trl`."""

from __future__ import annotations

from hostile.inputs import CHAT, DEEP, FORGED, IDS, LAUGHS, PAIR, RANKING, Call, computed, refused, said


COMMANDS = (
    *refused(
        "data check",
        ("an empty file", Call("data check x.jsonl", {"x.jsonl": ""}), "--dataset_name x.jsonl: the file is empty"),
        (
            "rows without columns",
            Call("data check x.jsonl", {"x.jsonl": "{}\n"}),
            "the data is empty; check its path and split",
        ),
        ("binary for JSON", Call("data check x.jsonl", {"x.jsonl": bytes(range(256))}), "JSON parse error: The docum"),
        ("binary for Parquet", Call("data check x.parquet", {"x.parquet": b"\xff" * 99}), "Parquet magic bytes not f"),
        ("a pickle", Call("data check x.pkl", {"x.pkl": b"\x80\x04."}), "cannot tell what kind of file this is"),
        ("UTF-16 for UTF-8", Call("data check x.jsonl", {"x.jsonl": '{"a": 1}'.encode("utf-16")}), "JSON parse error"),
        ("half a character", Call("data check x.jsonl", {"x.jsonl": '{"a": "\\ud800"}'}), "JSON parse error: The"),
        ("a key twice", Call("data check x.jsonl", {"x.jsonl": '{"a": 1, "a": 2}'}), "Column(/a) was specified twice"),
        (
            "a column twice",
            Call("data check x.csv", {"x.csv": "chosen,chosen,rejected\na,b,c\n"}),
            "--dataset_name x.csv: column 'chosen' stands there twice; rename or remove one of them",
        ),
        ("1e999", Call("data check x.jsonl", {"x.jsonl": '{"weight": 1e999}'}), "Number too big to be stored in doub"),
        (
            "a number of 401 digits",
            Call("data check x.jsonl", {"x.jsonl": '{"chosen": "a", "rejected": "b", "weight": 1' + "0" * 400 + "}"}),
            "column 'weight': inf is not a finite number; give every row a number (1.0 for an ordinary row) (row 0)",
        ),
        (
            "a value nested 2,000 deep",
            Call(
                "data check x.jsonl",
                {"x.jsonl": '{"chosen": "a", "rejected": "b", "x": ' + "[" * 2000 + "]" * 2000 + "}"},
            ),
            "--dataset_name x.jsonl: cannot be read: a value in it is nested too deeply",
            '`{"chosen": "a", "rejected": "b", "x": [[[[...`',
        ),
        (
            "a number for answers",
            Call("data check x.jsonl", {"x.jsonl": '{"completions": 5, "ranks": [1]}'}),
            "column 'completions': 5 is not a list; give a list with an entry for each answer (row 0)",
        ),
        (
            "an object for answers",
            Call("data check x.jsonl", {"x.jsonl": '{"completions": {"a": "b"}, "ranks": [1]}'}),
            "column 'completions': {'a': 'b'} is not a list; give a list with an entry for each answer (row 0)",
        ),
        (
            "a split out of the folder",
            Call("data check x.jsonl --dataset_split ../../etc/passwd", {"x.jsonl": [PAIR]}),
            "--dataset_split: the dataset has no split '../../etc/passwd'; it has 'train'. Either pass "
            "--dataset_split with one of these names, or put the data in a folder as train.jsonl and "
            "../../etc/passwd.jsonl and pass the folder.",
        ),
        (
            "a configuration out of the folder",
            Call("data check x.jsonl --dataset_config ../../etc", {"x.jsonl": [PAIR]}),
            "Bad characters from black list",
        ),
        (
            "a chat template that fails",
            Call(
                "data check x.jsonl --model_name_or_path MODEL",
                {"x.jsonl": [CHAT | {"chat_template_kwargs": {"chat_template": "{{ 1 / 0 }}"}}]},
            ),
            "the chat template, or the tokenizer, does not take it (ZeroDivisionError: division by zero); drop the",
        ),
    ),
    *computed(
        "data check",
        ("a byte order mark", Call("data check x.csv", {"x.csv": b"\xef\xbb\xbfchosen,rejected\na,b\n"}), "read: "),
        ("a name that is a pattern", Call("data check a[1].jsonl", {"a[1].jsonl": [PAIR], "a1.jsonl": ""}), "1 row\n"),
        ("a name of a star", Call("data check a*.jsonl", {"a*.jsonl": [PAIR], "ab.jsonl": [PAIR]}), "1 row\n"),
        (
            "a message that forges a turn",
            Call(
                "data check x.jsonl --model_name_or_path MODEL",
                {"x.jsonl": [CHAT, CHAT | {"rejected": said(FORGED)}]},
            ),
            "1 row with a special token of the model in a text (row 1), which the tokenizer takes for a real one",
        ),
    ),
    *refused(
        "data convert",
        (
            "a history that is a number",
            Call(
                "data convert x.jsonl y.jsonl",
                {"x.jsonl": [{"instruction": "a", "chosen": "b", "rejected": "c", "history": 5}]},
            ),
            "row 0, column 'history': 5 is not a list; give pairs of texts (or skip all such rows with --skip_bad)",
        ),
        (
            "a tool call nested too deeply",
            Call(
                "data convert x.jsonl y.jsonl",
                {
                    "x.jsonl": [
                        {
                            "conversations": [{"from": "function_call", "value": DEEP}],
                            "chosen": {"from": "gpt", "value": "b"},
                            "rejected": {"from": "gpt", "value": "c"},
                        }
                    ]
                },
            ),
            "row 0, column 'conversations': a function_call that is not JSON (maximum recursion depth exceeded",
            "a `function_call` of `[[[[...`, 100,000 deep",
        ),
        (
            "a rename onto a column that is there",
            Call("data convert x.jsonl y.jsonl --rename q=prompt", {"x.jsonl": [PAIR | {"q": "other"}]}),
            "--rename q=prompt: another column is called 'prompt' then; rename that one too, or leave this out",
        ),
        (
            "a rename of a column that is not there",
            Call("data convert x.jsonl y.jsonl --rename q=prompt", {"x.jsonl": [PAIR]}),
            "--rename q=prompt: there is no such column (there are 'prompt', 'chosen', 'rejected')",
        ),
        (
            "an output that exists",
            Call("data convert x.jsonl x.jsonl", {"x.jsonl": [PAIR]}),
            "--output_file x.jsonl exists already; delete it, or choose another name",
        ),
        (
            "an output that is a link to nowhere",
            Call("data convert x.jsonl y.jsonl", {"x.jsonl": [PAIR]}, {"y.jsonl": "elsewhere.jsonl"}),
            "--output_file y.jsonl exists already; delete it, or choose another name",
        ),
        (
            "scores of 100,000 answers",
            Call(
                "data convert x.jsonl y.jsonl",
                {"x.jsonl": [{"completions": [f"{n}" for n in range(100_000)], "scores": list(range(100_000))}]},
            ),
            "row 0, column 'completions': once converted, 100000 answers, whose pairs are too many "
            "for a batch; give at most 256, or cut the ranking into several rows (or skip all such "
            "rows with --skip_bad)",
            '`{"completions": [100,000 texts], "scores": [100,000 numbers]}`',
        ),
        (
            "an infinite score",
            Call("data convert x.jsonl y.jsonl", {"x.jsonl": '{"completions": ["a"], "scores": [Infinity]}'}),
            "row 0, column 'scores': inf is not a number; give a finite number (or skip all such rows"
            " with --skip_bad)",
        ),
        (
            "a probability above 1",
            Call("data convert x.jsonl y.jsonl", {"x.jsonl": [{"answer_a": "a", "answer_b": "b", "prob_a": 2}]}),
            "row 0, column 'prob_a': 2 is not a probability; give a number from 0 to 1 (or skip all "
            "such rows with --skip_bad)",
        ),
        (
            "a number for a prompt",
            Call(
                "data convert x.jsonl y.jsonl",
                {"x.jsonl": [{"prompt": 7, "response_a": "a", "response_b": "b", "prob_a": 0.5}]},
            ),
            "row 0, column 'prompt': once converted, a value of type int in a dataset of "
            'conversations; make it [{"role": "user", "content": ...}], or every row and column a '
            "string (or skip all such rows with --skip_bad)",
        ),
    ),
    *refused(
        "train",
        (
            "a tag that makes Python objects",
            Call("train --config x.yaml", {"x.yaml": "output_dir: !!python/object/apply:os.mkdir [pwned]\n"}),
            "x.yaml: it cannot be read: could not determine a constructor for the tag",
        ),
        (
            "aliases of aliases of aliases",
            Call("train --config x.yaml", {"x.yaml": LAUGHS}),
            "train: --config x.yaml: its aliases stand for more than 100000 values; write them out",
            "ten lines, each of ten times the one before",
        ),
        (
            "a list that holds itself",
            Call("train --config x.yaml", {"x.yaml": "output_dir: &a [*a]\n"}),
            "train: --config x.yaml: its aliases stand for more than 100000 values; write them out",
        ),
        (
            "a value nested too deeply",
            Call("train --config x.yaml", {"x.yaml": "output_dir: " + "[" * 1500}),
            "train: --config x.yaml: it is nested too deeply, or holds itself",
            "`output_dir: [[[[...`, 1,500 deep",
        ),
        ("binary", Call("train --config x.yaml", {"x.yaml": b"\xff\xfe\x00"}), "x.yaml: it cannot be read: 'utf-8'"),
        ("no such config", Call("train --config ../../x.yaml"), "../../x.yaml: it cannot be read: [Errno 2] No such"),
    ),
    *refused(
        "score",
        (
            "an empty file",
            Call("score MODEL x.jsonl y.jsonl", {"x.jsonl": ""}),
            "--dataset_name x.jsonl: the file is empty",
        ),
        (
            "no answers",
            Call("score MODEL x.jsonl y.jsonl", {"x.jsonl": [{"prompt": "a"}]}),
            "row 0: no column holds answers (there are 'prompt'); a prompt alone has no answer to "
            "score: add its answer as 'completion'",
        ),
        (
            "an empty answer",
            Call("score MODEL x.jsonl y.jsonl", {"x.jsonl": [{"prompt": "a", "completion": ""}]}),
            "row 0, column 'completion': an empty string; drop the row or fill in the text",
        ),
        (
            "a token that the model has not",
            Call("score MODEL x.jsonl y.jsonl", {"x.jsonl": [IDS, IDS | {"rejected_ids": [10**9]}]}),
            "row 1, column 'rejected_ids': it holds the token id 1000000000, and the model has the "
            "ids 0 to 392; tokenize with the model's own tokenizer",
        ),
        (
            "a text beyond the model's positions",
            Call("score MODEL x.jsonl y.jsonl", {"x.jsonl": [{"text": "ok"}, {"text": "a " * 3000}]}),
            "row 1, column 'text': it has 3002 tokens, and the model has 2048 positions "
            "(max_position_embeddings in its config.json); leave it out, or cut the text yourself",
            "3,000 words for a model of 2,048 positions",
        ),
        (
            "a folder of parts that is a link",
            Call(
                "score MODEL x.jsonl y.jsonl",
                {"x.jsonl": [{"text": "ok"}], "other/settings.json": "{}"},
                {"y.jsonl.parts": "other"},
            ),
            "y.jsonl.parts is a link, and its files would be written and deleted elsewhere; remove it",
        ),
        (
            "a column of a new name",
            Call("score MODEL x.jsonl y.jsonl", {"x.jsonl": [{"text": "ok", "scale": 1}]}),
            "column 'scale': the data has one of this name already; pass --prefix, or rename it in the data",
        ),
        (
            "an option that is no number",
            Call("score MODEL x.jsonl y.jsonl --transform lower_bound --k nan", {"x.jsonl": [PAIR]}),
            "transform 'lower_bound': k=nan must be a finite number of at least 0",
        ),
        (
            "a model out of the folder",
            Call("score ../../etc/passwd x.jsonl y.jsonl", {"x.jsonl": [PAIR]}),
            "../../etc/passwd: there is no such folder",
        ),
    ),
    *refused(
        "evaluate",
        (
            "an empty file",
            Call("evaluate MODEL x.jsonl y", {"x.jsonl": ""}),
            "--dataset_name x.jsonl: the file is empty",
        ),
        (
            "an empty answer",
            Call("evaluate MODEL x.jsonl y", {"x.jsonl": [PAIR, PAIR | {"chosen": ""}]}),
            "row 1, column 'chosen': an empty string; drop the row or fill in the text",
        ),
        (
            "a token that the model has not",
            Call("evaluate MODEL x.jsonl y", {"x.jsonl": [IDS | {"chosen_ids": [10**9]}]}),
            "sequence 0 holds the token id 1000000000, and the model has the ids 0 to 392; tokenize "
            "with the model's own tokenizer",
        ),
        (
            "rated answers, which hold no pairs",
            Call("evaluate MODEL x.jsonl y", {"x.jsonl": [{"completion": "a", "ratings": [1, 2]}]}),
            "rows of the format 'ratings' hold one answer each, and nothing to compare it with; make "
            "pairs of them with `disco-trl data convert`",
        ),
        (
            "a verdict that is none",
            Call(
                "evaluate MODEL x.jsonl y",
                {"x.jsonl": [{"input": "a", "output_1": "b", "output_2": "c", "label": 3}]},
            ),
            "row 0, column 'label': 3; it has to be 1 or 2",
        ),
        (
            "a ranking of 100,000 answers",
            Call(
                "evaluate MODEL x.jsonl y",
                {"x.jsonl": [RANKING | {"completions": ["a"] * 100_000, "ranks": [1] * 100_000}]},
            ),
            "row 0, column 'completions': 100000 answers, whose pairs are too many for a batch; give "
            "at most 256, or cut the ranking into several rows",
            '`{"completions": [100,000 texts], "ranks": [100,000 numbers]}`',
        ),
    ),
)
